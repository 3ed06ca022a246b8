#!/usr/bin/env python3
"""The CPU engine beside llama.cpp on the same cores: random weights of one shape, taking turns, medians.

    python3 bench/cpu_beside_llama.py --tandem target/release/tandem --llama BUILD/bin --models DIR --shape smollm2 --threads 1

DIR holds SHAPE-bf16.gguf and SHAPE-q8_0.gguf (bench/random_gguf.py writes them). Turns, because the machine is shared: only the
ratio of what ran side by side says something.
"""
import argparse
import json
import statistics
import subprocess

KINDS = {"bf16": [], "q8_0": ["--quantize", "int8"]}


def tandem(args, kind):
    command = [args.tandem, "bench", "engine", "--shape", args.shape, "--threads", str(args.threads), "--json", "--runs", "1",
               "--table", "prefill,decode", "--max-prompt", str(max(args.prompts)), "--max-batch", str(max(args.batches)),
               "--context", "64", *KINDS[kind]]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    rows = {row["name"]: row for table in report["tables"] for row in table["rows"]}
    found = {f"prefill {n}": rows[f"1 × {n} tokens"] for n in args.prompts}
    found |= {f"decode, batch {n}": rows[f"batch {n}"] for n in args.batches}
    return {name: (row["tokens_per_second"], row["fraction"] or 0) for name, row in found.items()}, report


def llama(args, kind):
    model = f"{args.models}/{args.shape}-{kind}.gguf"
    tool = [f"{args.llama}/llama-bench", "-m", model, "-t", str(args.threads), "-r", "1", "-o", "json", "-n", "32"]
    tool += ["-p", ",".join(map(str, args.prompts))]
    found = {}
    for row in json.loads(subprocess.run(tool, check=True, capture_output=True, text=True).stdout):
        name = f"prefill {row['n_prompt']}" if row["n_prompt"] else "decode, batch 1"
        found[name] = row["avg_ts"]
    many = [n for n in args.batches if n > 1]
    tool = [f"{args.llama}/llama-batched-bench", "-m", model, "-t", str(args.threads), "-npp", "48", "-ntg", "16", "-c", "4096",
            "-npl", ",".join(map(str, many)), "--output-format", "jsonl"]
    for line in subprocess.run(tool, check=True, capture_output=True, text=True).stdout.splitlines():
        if line.startswith("{"):
            row = json.loads(line)
            found[f"decode, batch {row['pl']}"] = row["speed_tg"]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tandem", required=True)
    parser.add_argument("--llama", required=True, help="folder of llama-bench and llama-batched-bench")
    parser.add_argument("--models", required=True)
    parser.add_argument("--shape", default="smollm2", choices=["smollm2", "llama-1b"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=lambda text: list(map(int, text.split(","))), default=[512, 2048])
    parser.add_argument("--batches", type=lambda text: list(map(int, text.split(","))), default=[1, 4, 8, 16, 32])
    args = parser.parse_args()
    ours, theirs, ceilings = {}, {}, []
    for turn in range(args.rounds):
        for kind in KINDS:
            rows, report = tandem(args, kind)
            ceilings.append((kind, report["ceilings"], report["peaks"]))
            for name, (rate, reached) in rows.items():
                ours.setdefault((kind, name), []).append((rate, reached))
            for name, rate in llama(args, kind).items():
                theirs.setdefault((kind, name), []).append(rate)
        print(f"round {turn + 1} of {args.rounds}", flush=True)
    for kind in KINDS:
        mine = [c for c in ceilings if c[0] == kind]
        flops = statistics.median(c[1]["flops_per_second"] for c in mine) / 1e9
        read = statistics.median(c[1]["bytes_per_second"] for c in mine) / 1e9
        print(f"{kind}: ceilings {flops:.0f} G operations/s, read {read:.1f} GB/s;", "; ".join(f"{n} {r / 1e9:.0f} G/s" for n, r in mine[-1][2]))
    print(f"\n| {args.shape}, {args.threads} thread(s) | Tandem tokens/s | llama.cpp | ratio | of the floor |\n|---|---|---|---|---|")
    for (kind, name), values in ours.items():
        rate, reached = (statistics.median(v[i] for v in values) for i in (0, 1))
        other = statistics.median(theirs[kind, name])
        label = "bf16 / BF16" if kind == "bf16" else "INT8 / Q8_0"
        print(f"| {label}, {name} | {rate:.0f} | {other:.0f} | {rate / other:.2f} | {reached * 100:.0f} % |")


if __name__ == "__main__":
    main()
