"""What comparing landed KV once more, before its first step, costs: python3 bench/verify.py [BINARY]

One prompt at a time, none cached, remote prefill. Needs `make build model` first; bench/RESULTS-handoff.md holds a result.
"""

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

BINARY = sys.argv[1] if len(sys.argv) > 1 else "target/release/tandem"
ROUTER, DECODE = "127.0.0.1:50074", "127.0.0.1:50075"
LINE = "Line {}: the keeper wrote that the lamp burned {} hours and the wind blew from the south."


def metric(name):
    page = urllib.request.urlopen(f"http://{DECODE}/metrics").read().decode()
    found = re.search(rf"^{name} (\S+)$", page, re.M)
    return float(found[1]) if found else 0.0


def ask(text):
    with tempfile.NamedTemporaryFile("w", suffix=".json") as f:
        json.dump([{"text": text}], f)
        f.flush()
        out = subprocess.run([BINARY, "generate", "--addr", ROUTER, "--prompts", f.name, "--json", "--max-tokens", "4"],
                             capture_output=True, text=True, check=True)
    return json.loads(out.stdout)


def ready(address):
    for _ in range(600):
        try:
            return urllib.request.urlopen(f"http://{address}/health")
        except OSError:
            time.sleep(0.1)


processes = [subprocess.Popen([BINARY, "router", "--listen", ROUTER, "--strategy", "disaggregated"])]
ready(ROUTER)
processes += [subprocess.Popen([BINARY, role, "--registry", ROUTER, "--listen", address, "--threads", "1", "--kv-mib", "512"])
              for role, address in (("prefill", "127.0.0.1:0"), ("decode", DECODE))]
ready(DECODE)
time.sleep(5)
for lines in (1, 22, 87):
    costs, rates, shares = [], [], []
    for r in range(7):
        before = metric("tandem_kv_verified_bytes_total"), metric("tandem_kv_verify_duration_seconds_sum")
        answer = ask(f"Log {r} {lines}. " + " ".join(LINE.format(i, (i + r) % 9) for i in range(lines)))
        seconds = metric("tandem_kv_verify_duration_seconds_sum") - before[1]
        size = metric("tandem_kv_verified_bytes_total") - before[0]
        costs.append(seconds * 1e3)
        rates.append(size / seconds / 1e9)
        shares.append(seconds * 1e5 / answer["timeline"]["ttft_ms"])
    print(answer["prompt_token_count"], "tokens,", size / 1e6, "MB: ms {:.2f} (worst {:.2f}), GB/s {:.1f}, % of TTFT {:.3f}".format(
        statistics.median(costs), max(costs), statistics.median(rates), statistics.median(shares)))
for process in processes:
    process.terminate()
