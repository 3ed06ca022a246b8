#!/usr/bin/env python3
"""A grid of loads through `tandem sim`: where adaptive stands beside the best fixed strategy, and who loses where.

    python3 bench/simulator.py --tandem target/release/tandem grid
    python3 bench/simulator.py --tandem target/release/tandem against real-0.3.json real-0.6.json ... --profile cpu.json

`against` compares reports of `tandem bench serve --json` with the simulator's runs of the same requests.
"""

import argparse
import json
import subprocess

FIXED = ["shared", "chunked", "priority", "disaggregated"]
SHAPES = [(128, 128), (1024, 128), (4096, 256), (8192, 64)]
RATES = [2, 8, 16, 24, 32, 48, 64, 96]


def sim(tandem, *flags):
    done = subprocess.run([tandem, "sim", "--json", *map(str, flags)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def grid(args):
    print("| prompt / answer | req/s | best fixed, share in time | adaptive | others | E2E p50 ms: best fixed, adaptive | adaptive: prompts local |")
    print("|---|---|---|---|---|---|---|")
    worst = (0.0, "")
    for prompt, output in SHAPES:
        for rate in RATES:
            # Beyond what four cards can do with prompts alone there is nothing to compare.
            if rate * prompt > 4 * 45_000:
                continue
            reports = sim(
                args.tandem, "--shape", "llama-8b", "--profile", "h100", "--prefill", 2, "--decode", 2,
                "--rate", rate, "--seconds", 90, "--warm-up", 15, "--prompt-tokens", prompt, "--output-tokens", output,
                "--spread", 0.5, "--slo-ttft-ms", args.slo_ttft_ms, "--slo-itl-ms", args.slo_itl_ms, *args.flags,
            )
            by = {r["strategy"]: r for r in reports}
            best = max(FIXED, key=lambda s: (round(by[s]["within_slo"], 3), -by[s]["e2e_ms"]["p50"]))
            good, ours = by[best]["within_slo"], by["adaptive"]["within_slo"]
            if good - ours > worst[0]:
                worst = (good - ours, f"{prompt}/{output} at {rate} req/s")
            others = ", ".join(f"{s} {by[s]['within_slo']:.0%}" for s in FIXED if s != best)
            local, remote = by["adaptive"]["local_remote"]
            e2e = f"{min(by[s]['e2e_ms']['p50'] for s in FIXED):.0f}, {by['adaptive']['e2e_ms']['p50']:.0f}"
            print(f"| {prompt} / {output} | {rate} | {best} {good:.1%} | {ours:.1%} | {others} | {e2e} | {local / max(1, local + remote):.0%} |", flush=True)
    print(f"\nadaptive is at most {worst[0]:.1%} of requests behind ({worst[1]})" if worst[1] else "\nadaptive is never behind")


def against(args):
    print("| load | TTFT p50 real / simulated | TTFT p99 | ITL p50 | ITL p99 |")
    print("|---|---|---|---|---|")
    for path in args.reports:
        with open(path, encoding="utf-8") as file:
            report = json.load(file)
        for load in report["loads"]:
            rate = load["load"].split()[0]
            ours = sim(args.tandem, "--profile", args.profile, "--rate", rate, "--seed", report["seed"], *args.flags)[0]
            cells = []
            for key in ["ttft_ms", "itl_ms"]:
                for q in ["p50", "p99"]:
                    real, made = load[key][q], ours[key][q]
                    cells.append(f"{real:.1f} / {made:.1f} ({made / real - 1:+.0%})")
            print(f"| {load['load']} ({load['ok']} requests) | " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tandem", default="target/release/tandem")
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("grid")
    one.add_argument("--slo-ttft-ms", default=1000)
    one.add_argument("--slo-itl-ms", default=20)
    one.set_defaults(run=grid)
    two = commands.add_parser("against")
    two.add_argument("reports", nargs="+")
    two.add_argument("--profile", required=True)
    two.set_defaults(run=against)
    args, args.flags = parser.parse_known_args()
    args.run(args)


if __name__ == "__main__":
    main()
