"""Checks alarms and dashboard: promtool on rules, their unit tests and real pages; every name against the documents.

usage: observability.py TOOLS [TANDEM MODEL_DIR]   with the binary also the /metrics pages of a running cluster
"""

import json
import pathlib
import re
import socket
import subprocess
import sys
import time
import urllib.request

TOOLS = pathlib.Path(sys.argv[1])
sys.path.insert(0, str(TOOLS / "python"))

import yaml  # noqa: E402

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "observability"
failures = []


def check(ok, what):
    if not ok:
        failures.append(what)
        print(f"FAIL {what}")


def promtool(*args, stdin=None):
    done = subprocess.run([TOOLS / "promtool", *args], capture_output=True, text=True, input=stdin, cwd=FOLDER, check=False)
    check(done.returncode == 0, f"promtool {' '.join(args[:2])}: {done.stdout}{done.stderr}")


def documented():
    """Metric → (type, {label: values}) from the table of docs/METRICS.md."""
    table = {}
    for line in (ROOT / "docs" / "METRICS.md").read_text().splitlines():
        cells = [c.strip() for c in line.split("|")]
        if len(cells) > 4 and cells[1].startswith("`tandem_"):
            labels = {}
            for label, values in re.findall(r"`(\w+)`: ([^`|;]+)", cells[3]):
                labels[label] = {v.strip() for v in values.rstrip(" ;").split(",")}
            table[cells[1].strip("`")] = (cells[2], labels)
    return table


# Labels that Prometheus and the Prometheus operator add.
FROM_SCRAPE = {"instance", "job", "namespace", "pod", "le"}


def expression(text, table, where):
    """Every metric and every label value of an expression is in the table."""
    def base_of(name):
        return name if name in table else re.sub(r"_(bucket|sum|count)$", "", name)

    for name, selector in re.findall(r"\b(tandem_\w+)(\{[^}]*\})?", text):
        base = base_of(name)
        if base not in table:
            check(False, f"{where}: no metric {name} in docs/METRICS.md")
            continue
        kind, labels = table[base]
        check((base == name) != (kind == "histogram"), f"{where}: {name} is not how a {kind} is shown")
        for label, values in re.findall(r'(\w+)=~?"([^"]*)"', selector):
            if label in FROM_SCRAPE:
                continue
            check(label in labels, f"{where}: {name} has no label {label}")
            for value in values.split("|"):
                check({value, "any"} & labels.get(label, set()), f"{where}: {name} has no {label}={value}")
    for label in re.findall(r"by \(([^)]*)\)", text):
        known = FROM_SCRAPE | {x for name in re.findall(r"tandem_\w+", text) for x in table.get(base_of(name), ("", {}))[1]}
        check(set(re.split(r",\s*", label)) <= known, f"{where}: grouped by an unknown label: {label}")


def alarms(table):
    promtool("check", "rules", "rules.yaml")
    promtool("test", "rules", "rules.test.yaml")
    rules = [r for g in yaml.safe_load((FOLDER / "rules.yaml").read_text())["groups"] for r in g["rules"]]
    tests = yaml.safe_load((FOLDER / "rules.test.yaml").read_text())["tests"]
    ringing = {a["alertname"] for t in tests for a in t["alert_rule_test"] if a["exp_alerts"]}
    guide = (ROOT / "docs" / "OPERATOR.md").read_text()
    section = guide.split("## When it breaks")[1].split("\n## ")[0]
    rows = {line.split("|")[1].strip() for line in section.splitlines() if line.startswith("|")}
    for rule in rules:
        name, notes = rule["alert"], rule["annotations"]
        check(name in ringing, f"{name}: no unit test makes it ring")
        check(notes["row"] in rows, f"{name}: no row '{notes['row']}' in the failure table of docs/OPERATOR.md")
        check(notes["runbook"] == "docs/OPERATOR.md#when-it-breaks", f"{name}: runbook {notes['runbook']}")
        expression(rule["expr"], table, name)
    print(f"ok   {len(rules)} alarms, each with a unit test and a row of the failure table")


def dashboard(table):
    program = subprocess.run([sys.executable, FOLDER / "dashboard.py"], capture_output=True, text=True, check=True).stdout
    check(program == (FOLDER / "dashboard.json").read_text(), "dashboard.json is not what dashboard.py writes")
    panels = json.loads(program)["panels"]
    shown = set()
    for panel in panels:
        for target in panel.get("targets", []):
            expression(target["expr"], table, f"panel '{panel['title']}'")
            shown |= set(re.findall(r"tandem_\w+", target["expr"]))
    rules = "".join(f"  - {{record: 'panel:{i}', expr: {json.dumps(t['expr'].replace('$__rate_interval', '1m').replace('$namespace', '.*'))}}}\n"
                    for i, t in enumerate(t for p in panels for t in p.get("targets", [])))
    check_expressions(rules)
    unseen = {m for m in table if not {m, f"{m}_bucket", f"{m}_sum"} & shown}
    check(not unseen, f"metrics that no panel shows: {sorted(unseen)}")
    print(f"ok   dashboard: {sum(p['type'] != 'row' for p in panels)} panels show all {len(table)} documented metrics")


def check_expressions(rules):
    """promtool parses the panels' expressions as recording rules."""
    promtool("check", "rules", "/dev/stdin", stdin=f"groups:\n- name: panels\n  rules:\n{rules}")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def pages(tandem, model):
    """promtool's opinion of the real pages, after a request."""
    ports = {role: free_port() for role in ("router", "prefill", "decode")}
    common = ["--model", model, "--listen"]
    commands = {role: [tandem, role, *common, f"127.0.0.1:{port}"] for role, port in ports.items()}
    for role in ("prefill", "decode"):
        commands[role] += ["--registry", f"127.0.0.1:{ports['router']}", "--kv-mib", "64", "--threads", "1"]
    running = [subprocess.Popen(list(map(str, command))) for command in commands.values()]
    try:
        deadline = time.monotonic() + 60
        waiting = [f"http://127.0.0.1:{port}" for port in ports.values()]
        while waiting and time.monotonic() < deadline:
            waiting = [url for url in waiting if not fetch(f"{url}/health")]
            time.sleep(0.1)
        ask = [tandem, "generate", "--addr", f"127.0.0.1:{ports['router']}", "--quiet", "--max-tokens", "4", "Hello"]
        subprocess.run(list(map(str, ask)), check=True, capture_output=True, timeout=60)
        for role, port in ports.items():
            page = fetch(f"http://127.0.0.1:{port}/metrics")
            check("tandem_" in page, f"{role}: no metrics page")
            promtool("check", "metrics", stdin=page)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait(timeout=60)
    print("ok   promtool check metrics on the pages of a running router, prefill and decode worker")


def fetch(url):
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return answer.read().decode()
    except OSError:
        return ""


def main():
    table = documented()
    check(len(table) > 30, "docs/METRICS.md was not understood")
    alarms(table)
    dashboard(table)
    if len(sys.argv) > 3:
        pages(pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]))
    print(f"observability: {len(failures)} failures")
    sys.exit(1 if failures else 0)


main()
