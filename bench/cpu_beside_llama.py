#!/usr/bin/env python3
"""The CPU engine beside llama.cpp on the same cores: random weights of one shape, taking turns, medians.

    python3 bench/cpu_beside_llama.py --tandem target/release/tandem --llama BUILD/bin --models DIR --shape smollm2 --threads 1

DIR holds SHAPE-bf16.gguf and SHAPE-q8_0.gguf (bench/random_gguf.py writes them). Turns, because the machine is shared: only the
ratio of what ran side by side says something. With --record FILE every turn is kept there, so that rounds can be run in pieces: the
table is of all turns of this shape and these threads that the file holds; --rounds 0 only prints it.
"""
import argparse
import json
import os
import statistics
import subprocess

KINDS = {"bf16": [], "q8_0": ["--quantize", "int8"]}


def tandem(args, kind):
    command = [args.tandem, "bench", "engine", "--shape", args.shape, "--threads", str(args.threads), "--json", "--runs", "1",
               "--table", "prefill,decode", "--max-prompt", str(max(args.prompts)), "--prompts", ",".join(map(str, args.prompts)),
               "--max-batch", str(max(args.batches)),
               "--context", "64", *KINDS[kind]]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    rows = {row["name"]: row for table in report["tables"] for row in table["rows"]}
    found = {f"prefill {n}": rows[f"1 × {n} tokens"] for n in args.prompts}
    found |= {f"decode, batch {n}": rows[f"batch {n}"] for n in args.batches}
    rates = {name: (row["tokens_per_second"], row["fraction"] or 0) for name, row in found.items()}
    return rates, report["ceilings"], report["peaks"]


def llama(args, kind):
    model = f"{args.models}/{args.shape}-{kind}.gguf"
    tool = [f"{args.llama}/llama-bench", "-m", model, "-t", str(args.threads), "-r", "1", "-o", "json", "-n", "32"]
    tool += ["-p", ",".join(map(str, args.prompts))]
    found = {}
    for row in json.loads(subprocess.run(tool, check=True, capture_output=True, text=True).stdout):
        name = f"prefill {row['n_prompt']}" if row["n_prompt"] else "decode, batch 1"
        found[name] = row["avg_ts"]
    many = [n for n in args.batches if n > 1]
    if not many:
        return found
    # The prompt is shared: computing it for each sequence would take longer than what is measured.
    tool = [f"{args.llama}/llama-batched-bench", "-m", model, "-t", str(args.threads), "-npp", "48", "-ntg", "16", "-c", "4096", "-pps",
            "-npl", ",".join(map(str, many)), "--output-format", "jsonl"]
    for line in subprocess.run(tool, check=True, capture_output=True, text=True).stdout.splitlines():
        if line.startswith("{"):
            row = json.loads(line)
            found[f"decode, batch {row['pl']}"] = row["speed_tg"]
    return found


def measure(args, kind):
    """One turn of both."""
    load = os.getloadavg()[0]
    ours, ceilings, peaks = tandem(args, kind)
    return {"shape": args.shape, "threads": args.threads, "kind": kind, "load": load, "ours": ours, "theirs": llama(args, kind),
            "ceilings": ceilings, "peaks": peaks}


def spread(values):
    return f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


def table(args, turns):
    for kind in KINDS:
        mine = [turn for turn in turns if turn["kind"] == kind]
        if not mine:
            continue
        flops = statistics.median(turn["ceilings"]["flops_per_second"] for turn in mine) / 1e9
        read = [turn["ceilings"]["bytes_per_second"] / 1e9 for turn in mine]
        loads = [turn["load"] for turn in mine]
        print(f"* {kind}: {len(mine)} rounds, load average before {min(loads):.1f} to {max(loads):.1f}; ceilings {flops:.0f} G operations/s, "
              f"read {statistics.median(read):.1f} ({min(read):.1f} to {max(read):.1f}) GB/s; "
              + "; ".join(f"{name} {rate / 1e9:.0f} G/s" for name, rate in mine[-1]["peaks"]))
    print(f"\n| {args.shape}, {args.threads} thread(s) | Tandem tokens/s | llama.cpp | ratio (least to most) | of the floor |\n|---|---|---|---|---|")
    for kind, label in [("bf16", "bf16 / BF16"), ("q8_0", "INT8 / Q8_0")]:
        names = dict.fromkeys(name for turn in turns if turn["kind"] == kind for name in turn["ours"])
        for name in names:
            both = [turn for turn in turns if turn["kind"] == kind and name in turn["ours"] and name in turn["theirs"]]
            ours = [turn["ours"][name][0] for turn in both]
            theirs = [turn["theirs"][name] for turn in both]
            ratios = [a / b for a, b in zip(ours, theirs)]
            reached = statistics.median(turn["ours"][name][1] for turn in both)
            ratio = f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"| {label}, {name} | {spread(ours)} | {spread(theirs)} | {ratio} | {reached * 100:.0f} % |")


def main():
    numbers = lambda text: list(map(int, text.split(",")))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tandem", required=True)
    parser.add_argument("--llama", required=True, help="folder of llama-bench and llama-batched-bench")
    parser.add_argument("--models", required=True)
    parser.add_argument("--shape", default="smollm2", choices=["smollm2", "llama-1b"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(KINDS))
    parser.add_argument("--record", help="file that turns are added to")
    parser.add_argument("--prompts", type=numbers, default=[512, 2048])
    parser.add_argument("--batches", type=numbers, default=[1, 4, 8, 16, 32])
    args = parser.parse_args()
    turns = []
    if args.record and os.path.exists(args.record):
        with open(args.record) as file:
            turns = [turn for turn in map(json.loads, file) if (turn["shape"], turn["threads"]) == (args.shape, args.threads)]
    for turn in range(args.rounds):
        for kind in args.kinds:
            turns.append(measure(args, kind))
            if args.record:
                with open(args.record, "a") as file:
                    file.write(json.dumps(turns[-1]) + "\n")
        print(f"round {turn + 1} of {args.rounds}", flush=True)
    table(args, turns)


if __name__ == "__main__":
    main()
