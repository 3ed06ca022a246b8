"""Remote against local prefill on one machine, interleaved: python3 bench/handoff.py [BINARY]

One prompt at a time, none cached. Needs `make build model` first; prints what bench/RESULTS-handoff.md holds.
"""

import json
import statistics
import subprocess
import sys
import tempfile

BINARY = sys.argv[1] if len(sys.argv) > 1 else "target/release/tandem"
ROUNDS = 9
LINE = "Line {}: the keeper wrote that the lamp burned {} hours and the wind blew from the south."


def start(mode, port):
    up = subprocess.Popen([BINARY, "up", "--listen", f"127.0.0.1:{port}", "--strategy", mode],
                          stdout=subprocess.PIPE, text=True)
    up.stdout.readline()  # says so when it serves
    return up, port


def ask(port, text):
    with tempfile.NamedTemporaryFile("w", suffix=".json") as f:
        json.dump([{"text": text}], f)
        f.flush()
        out = subprocess.run([BINARY, "generate", "--addr", f"127.0.0.1:{port}", "--prompts", f.name,
                              "--json", "--max-tokens", "8"], capture_output=True, text=True, check=True)
    return json.loads(out.stdout)


def spread(values):
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


clusters = {mode: start(mode, port) for mode, port in (("remote", 50071), ("local", 50072))}
results = {}
for r in range(ROUNDS):
    for lines in (1, 87):
        for mode in ("remote", "local")[:: 1 if r % 2 == 0 else -1]:
            text = f"Log {r} {mode}. " + " ".join(LINE.format(i, (i + r) % 9) for i in range(lines))
            results.setdefault((lines, mode), []).append(ask(clusters[mode][1], text))
for lines in (1, 87):
    ttft = {m: [d["timeline"]["ttft_ms"] for d in results[lines, m]] for m in clusters}
    remote = results[lines, "remote"]
    print(remote[0]["prompt_token_count"], "tokens, KV", remote[0]["kv"]["bytes"], "bytes")
    for mode, values in ttft.items():
        print(f"  TTFT {mode} ms", spread(values))
    print("  exposed transfer ms", spread([d["timeline"]["exposed_transfer_ms"] for d in remote]))
    print("  TTFT remote / local", spread([a / b for a, b in zip(ttft["remote"], ttft["local"])]))
for up, _ in clusters.values():
    up.terminate()
    up.wait()
