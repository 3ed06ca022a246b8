#!/usr/bin/env python3
"""The status page in a real browser (headless Chromium), on a desk and on a phone.

    tests/clients/page.py http://127.0.0.1:50051 [FOLDER FOR SCREENSHOTS]
"""
import shutil
import sys

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

BASE = sys.argv[1].rstrip("/")
SHOTS = sys.argv[2] if len(sys.argv) > 2 else None


def check(what, holds, seen=None):
    print(f"{'ok  ' if holds else 'FAIL'} {what}" + ("" if holds else f": {seen!r}"))
    if not holds:
        sys.exit(1)


def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))


def main():
    driver = browser()
    try:
        wait = WebDriverWait(driver, 60)
        text = lambda id: driver.find_element(By.ID, id).text
        driver.set_window_size(1200, 1250)
        driver.get(BASE)
        wait.until(lambda d: "Tandem" in d.title and "running" in text("state"))
        check("page: / leads to it", driver.current_url.endswith("/status"), driver.current_url)
        rows = driver.find_elements(By.CSS_SELECTOR, "#workers tr")
        check("page: both workers", len(rows) == 3 and "prefill-0" in text("workers") and "decode-0" in text("workers"), text("workers"))
        driver.find_element(By.ID, "prompt").send_keys("What is the capital of France?")
        driver.find_element(By.ID, "send").click()
        wait.until(lambda d: "Paris" in text("answer"))
        wait.until(lambda d: "first text after" in text("timing"))
        check("page: the prompt box streams an answer", True)
        wait.until(lambda d: d.find_elements(By.CSS_SELECTOR, "#slow .bar i"))
        check("page: its waterfall appears", "ms" in text("slow"), text("slow"))
        first = lambda: driver.find_elements(By.CSS_SELECTOR, "#workers td")[0].text
        before = first()
        for _ in range(2):
            driver.find_elements(By.CSS_SELECTOR, "#workers th")[0].click()
        check("page: tables sort", first() in ("prefill-0", "decode-0") and before in ("prefill-0", "decode-0"))
        if SHOTS:
            driver.save_screenshot(f"{SHOTS}/status.png")
        driver.set_window_size(500, 1200)
        sideways = driver.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
        check("page: a phone need not scroll sideways", sideways <= 0, sideways)
        if SHOTS:
            driver.save_screenshot(f"{SHOTS}/status-phone.png")
        errors = [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
        check("page: no errors, nothing from elsewhere", not errors, errors)
    finally:
        driver.quit()


main()
