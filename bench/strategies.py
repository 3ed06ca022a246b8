#!/usr/bin/env python3
"""Every strategy on one machine's CPU: the same open-loop load on two workers of one thread each, strategies in turn, several times.

    python3 bench/strategies.py --tandem target/release/tandem --model ~/.cache/tandem/models/smollm2-135m-instruct --rates 1,2 --times 2 --out strategies.json

shared, chunked and priority run on two decode workers, disaggregated and adaptive on a prefill and a decode worker.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

import processes

TOGETHER, APART = ["decode", "decode"], ["prefill", "decode"]
STRATEGIES = {"shared": TOGETHER, "chunked": TOGETHER, "priority": TOGETHER, "disaggregated": APART, "adaptive": APART}


def one(options, strategy, rate, seed):
    """One load on a fresh cluster: no prompt is in a cache."""
    commands, ports = processes.by_strategy(options.tandem, options.model, strategy, STRATEGIES[strategy], options.slo_itl_ms)
    with processes.cluster(strategy, commands, ports, 60):
        command = [options.tandem, "bench", "serve", "--addr", f"127.0.0.1:{ports[0]}", "--json", "--rate", rate, "--seconds", options.seconds, "--warm-up", 4,
                   "--prompt-tokens", options.prompt_tokens, "--output-tokens", options.output_tokens, "--spread", 0.5, "--vocab", 40000, "--seed", seed]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"{strategy}: {done.stderr}")
        return json.loads(done.stdout)["loads"][0]


def spread(rows, key, quantile):
    values = [row[key][quantile] for row in rows]
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tandem", default="target/release/tandem")
    parser.add_argument("--model", required=True)
    parser.add_argument("--rates", default="1,2")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=24)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--slo-itl-ms", type=int, default=60)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    seen = {}
    for turn in range(options.times):
        for rate in options.rates.split(","):
            for strategy in STRATEGIES:
                seen.setdefault(f"{strategy} {rate}", []).append(one(options, strategy, rate, 11 + turn))
                if options.out:
                    options.out.write_text(json.dumps(seen, indent=1))
    print("| strategy | req/s | TTFT p50 ms | p99 | ITL p50 ms | p99 | output tok/s | not answered |\n|---|---|---|---|---|---|---|---|")
    for name, rows in seen.items():
        strategy, rate = name.split()
        tokens = statistics.median(row["output_tokens_per_second"] for row in rows)
        bad = sum(row["shed"] + row["failed"] for row in rows)
        cells = [spread(rows, key, q) for key in ("ttft_ms", "itl_ms") for q in ("p50", "p99")]
        print(f"| {strategy} | {rate} | {' | '.join(cells)} | {tokens:.0f} | {bad} |", flush=True)


main()
