"""What a client feels when its sequence moves to another decode worker: python3 bench/drain.py [BINARY] [OPTION OF UP ...]

Two decode workers on one machine, three sequences at a time; one worker drains, comes back, the other drains, ... Needs
`make build model` first; prints what bench/RESULTS-drain.md holds.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time

BINARY = sys.argv[1] if len(sys.argv) > 1 else "target/release/tandem"
# On a GPU: --device cuda --kv-mib 1024 --model DIR
OPTIONS = sys.argv[2:] or ["--threads", "1", "--kv-mib", "256"]
ON_GPU = "cuda" in OPTIONS
TOKENS, PAUSE = ("2000", 0.3) if ON_GPU else ("150", 2.0)
ADDRESS = "127.0.0.1:50073"
LINE = "Line {}: the keeper wrote that the lamp burned {} hours and the wind blew from the south."


def drain(command, worker):
    subprocess.run([BINARY, command, worker, "--addr", ADDRESS], check=True, stdout=subprocess.DEVNULL)


def run(prompts, moving):
    """All prompts, three at a time; the answers' timelines."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as f, tempfile.TemporaryFile("w+") as out:
        json.dump([{"text": p} for p in prompts], f)
        f.flush()
        # Into a file: a full pipe would hold the client up while we wait for it.
        asked = subprocess.Popen([BINARY, "generate", "--addr", ADDRESS, "--prompts", f.name, "--concurrency", "3",
                                  "--json", "--max-tokens", TOKENS, "--ignore-eos"], stdout=out, text=True)
        worker = 0
        while moving and asked.poll() is None:
            drain("drain", f"decode-{worker}")
            time.sleep(PAUSE)
            drain("undrain", f"decode-{worker}")
            worker = 1 - worker
        assert asked.wait() == 0
        out.seek(0)
        return [json.loads(line) for line in out]


up = subprocess.Popen([BINARY, "up", "--listen", ADDRESS, "--decode", "2", *OPTIONS],
                      stdout=subprocess.PIPE, text=True)
up.stdout.readline()
prompts = [f"Log {i}. " + " ".join(LINE.format(j, (i + j) % 9) for j in range(15 * (i % 3 + 1))) for i in range(6)]
run([p + " " for p in prompts], False)
still, moved = run(prompts, False), run(prompts, True)
assert [a["output_token_ids"] for a in still] == [a["output_token_ids"] for a in moved], "tokens differ"
print("prompt tokens", sorted({a["prompt_token_count"] for a in still}), "answers", len(moved),
      "moves", sum(a["timeline"]["moves"] for a in moved))
for name, answers in (("undisturbed", still), ("moving", [a for a in moved if a["timeline"]["moves"]])):
    for key in ("itl_mean_ms", "itl_p99_ms", "itl_max_ms"):
        values = [a["timeline"][key] for a in answers]
        print(f"  {name} {key}: median {statistics.median(values):.1f}, worst {max(values):.1f}")
up.terminate()
up.wait()
