#!/usr/bin/env python3
"""What a router costs: Tandem's beside sglang's and vLLM's (PyPI), the same workers that compute nothing, the same load, one run.

    cargo build --release -p tandem-tests --examples && cargo build --release --bin tandem
    python3 -m venv VENV && VENV/bin/pip install sglang-router==0.3.2 vllm-router==0.1.17
    python3 bench/router.py --venv VENV [--rounds 3] [--seconds 12] [--json FILE]

Every router stands between one load generator and one prefill and one decode mock (tests/examples/mock_worker.rs). In each round the
cases run one after the other, so that what else the machine does falls on all. `cpu_ms` is user and system time of the router's
process, all threads, per request; memory is its resident set at the end of the case.
"""
import argparse
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

ROOT = pathlib.Path(__file__).parent.parent
TICK = os.sysconf("SC_CLK_TCK")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def threads_cpu(pid):
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def resident_mib(pid):
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024


class Bench:
    def __init__(self, args):
        self.args, self.children, self.log = args, [], open(args.log, "w")
        self.target = pathlib.Path(args.target)

    def start(self, *command, **more):
        child = subprocess.Popen([str(part) for part in command], stdout=self.log, stderr=self.log, **more)
        self.children.append(child)
        return child

    def mock(self, role, *gap_ms):
        port = free_port()
        self.start(self.target / "examples/mock_worker", role, f"127.0.0.1:{port}", *gap_ms)
        return port

    def long_model(self):
        """The model's tokenizer with room for long prompts: a router reads no weights."""
        folder = pathlib.Path(tempfile.mkdtemp(prefix="bench-router-")) / "mock"
        folder.mkdir()
        for file in pathlib.Path(self.args.model).iterdir():
            (folder / file.name).symlink_to(file)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1 << 18}))
        return folder

    def routers(self, gap_ms):
        """name → (port, pid)."""
        prefill, decode = self.mock("prefill"), self.mock("decode", gap_ms)
        ports = {name: free_port() for name in ("tandem", "sglang", "vllm")}
        pids = {}
        pids["tandem"] = self.start(self.target / "tandem", "router", "--listen", f"127.0.0.1:{ports['tandem']}",
                                    "--strategy", "disaggregated", "--max-running", 4096, "--model", self.long_model()).pid
        pool = ["--prefill", f"http://127.0.0.1:{prefill}", "--decode", f"http://127.0.0.1:{decode}"]
        python = pathlib.Path(self.args.venv) / "bin/python"
        quiet = ["--log-level", "error", "--policy", "round_robin"]
        pids["sglang"] = self.start(python, "-m", "sglang_router.launch_router", "--pd-disaggregation", *pool, *quiet,
                                    "--host", "127.0.0.1", "--port", ports["sglang"], "--prometheus-port", free_port()).pid
        pids["vllm"] = self.start(pathlib.Path(self.args.venv) / "bin/vllm-router", "--vllm-pd-disaggregation", *pool, *quiet,
                                  "--host", "127.0.0.1", "--port", ports["vllm"], "--prometheus-port", free_port()).pid
        for name, port in ports.items():
            self.wait(port, name)
        self.start(self.target / "examples/mock_worker", "tandem", f"127.0.0.1:{ports['tandem']}", gap_ms)
        return {"direct": (decode, None), **{name: (port, pids[name]) for name, port in ports.items()}}

    def wait(self, port, name):
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).read()
                return
            except OSError:
                time.sleep(0.2)
        sys.exit(f"{name} did not start; see {self.args.log}")

    def load(self, target, streams, tokens, prompt):
        port, pid = target
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(prompt, file)
            file.flush()
            before = threads_cpu(pid) if pid else 0
            done = subprocess.run([self.target / "examples/stream_load", f"127.0.0.1:{port}", "mock", str(streams),
                                   str(self.args.seconds), str(tokens), file.name], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        seen = json.loads(done.stdout)
        if seen["failed"] or not seen["requests"]:
            print(f"  {seen['failed']} failed of {seen['requests']}: {done.stderr.strip()[:300]}", file=sys.stderr)
        # The generator counts the last four fifths, the processor time is of all.
        seen["rate"] = seen["requests"] / seen["seconds"]
        if pid and seen["requests"]:
            seen["cpu_ms"] = (threads_cpu(pid) - before) / (seen["requests"] * 1.25) * 1e3
            seen["rss_mib"] = resident_mib(pid)
        return seen

    def stop(self):
        for child in self.children:
            child.kill()
        for child in self.children:
            child.wait()
        self.children = []


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", required=True)
    parser.add_argument("--model", default=os.path.expanduser("~/.cache/tandem/models/smollm2-135m-instruct"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=12)
    parser.add_argument("--gap-ms", type=float, default=20)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--target", default=str(ROOT / "target/release"), help="where the release build is")
    parser.add_argument("--json")
    parser.add_argument("--log", default="/tmp/tandem-bench-router.log")
    args = parser.parse_args()
    words = "the quick brown fox jumps over a lazy dog " * 12
    cases = [(f"{n} streams, prompt of 100 words", n, args.tokens, words) for n in (10, 100, 1000)]
    cases += [("4 streams, 100,000 tokens as text", 4, args.tokens, " word" * 100_000),
              ("4 streams, 100,000 token ids", 4, args.tokens, [2229] * 100_000)]
    bench, results = Bench(args), {}
    try:
        targets = bench.routers(args.gap_ms)
        for round in range(args.rounds):
            for case, streams, tokens, prompt in cases:
                for name, target in targets.items():
                    seen = bench.load(target, streams, tokens, prompt)
                    results.setdefault(case, {}).setdefault(name, []).append(seen)
                    print(f"{round + 1} {case:44} {name:7} {seen['rate']:8.1f} req/s  first {seen['first_ms']['p50']:7.2f} / {seen['first_ms']['p99']:8.2f} ms"
                          f"  gap p99 {seen['gap_ms']['p99']:7.2f} ms  cpu {seen.get('cpu_ms', 0):6.2f} ms/req  {seen.get('rss_mib', 0):6.1f} MiB", flush=True)
    finally:
        bench.stop()
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(results, indent=1))
    table(results)


def table(results):
    print("\n| case | router | requests/s | requests per CPU second | added to first token p50 (ms) | p99 | gap p99 (ms) | resident MiB |\n|---|---|---|---|---|---|---|---|")
    middle = lambda runs, of: statistics.median(of(run) for run in runs)
    for case, routers in results.items():
        routers = {name: [run for run in runs if run["requests"]] for name, runs in routers.items()}
        base = [middle(routers["direct"], lambda r, q=q: r["first_ms"][q]) for q in ("p50", "p99")]
        for name, runs in routers.items():
            if not runs:
                print(f"| {case} | {name} | refuses it | | | | | |")
                continue
            added = [middle(runs, lambda r, q=q: r["first_ms"][q]) - b for q, b in zip(("p50", "p99"), base)]
            per_cpu = middle(runs, lambda r: 1e3 / r["cpu_ms"]) if "cpu_ms" in runs[0] else 0
            spread = f"({min(1e3 / r['cpu_ms'] for r in runs):.0f} to {max(1e3 / r['cpu_ms'] for r in runs):.0f})" if per_cpu else ""
            print(f"| {case} | {name} | {middle(runs, lambda r: r['rate']):.1f} | {per_cpu:.0f} {spread} | {added[0]:.2f} | {added[1]:.2f} |"
                  f" {middle(runs, lambda r: r['gap_ms']['p99']):.1f} | {middle(runs, lambda r: r.get('rss_mib', 0)):.0f} |")


main()
