#!/usr/bin/env python3
"""Runs every fuzz target so many times and prints a row of bench/RESULTS-faults.md for each: `make fuzz RUNS=1000000`.

Each target works on a copy of its seeds, so the folder of seeds stays small. A crash leaves its input in fuzz/artifacts;
the campaign goes on and ends with an error.
"""

import argparse
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).parent
BINARIES = HERE / "target/x86_64-unknown-linux-gnu/release"


def run(target, runs, jobs, limit):
    """Splits the runs over `jobs` processes; what came of them."""
    artifacts = HERE / "artifacts" / target
    artifacts.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        going = []
        for job in range(jobs):
            corpus = pathlib.Path(scratch) / str(job)
            shutil.copytree(HERE / "corpus" / target, corpus)
            log = open(pathlib.Path(scratch) / f"log-{job}", "w+")
            command = [BINARIES / target, corpus, f"-runs={-(-runs // jobs)}", "-max_len=4096", "-rss_limit_mb=2048",
                       "-malloc_limit_mb=512", "-timeout=30", f"-artifact_prefix={artifacts}/", "-print_final_stats=1",
                       f"-seed={job + 1}"]
            if limit:
                command.append(f"-max_total_time={limit}")
            going.append((subprocess.Popen(command, stdout=log, stderr=log), log))
        done, peak, crashed = 0, 0, []
        for process, log in going:
            code = process.wait()
            log.seek(0)
            said = log.read()
            done += sum(map(int, re.findall(r"stat::number_of_executed_units:\s*(\d+)", said)))
            peak = max(peak, *map(int, re.findall(r"stat::peak_rss_mb:\s*(\d+)", said)), 0)
            if code:
                crashed.append(said[-2000:])
    return done, peak, crashed, time.monotonic() - began


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("targets", nargs="*", help="all, unless named")
    args.add_argument("--runs", type=int, default=1_000_000, help="of each target (default %(default)s)")
    args.add_argument("--jobs", type=int, default=1, help="processes that share the runs of a target")
    args.add_argument("--seconds", type=int, default=0, help="longest for one target; 0 is no limit")
    args = args.parse_args()
    known = sorted(path.stem for path in (HERE / "fuzz_targets").glob("*.rs"))
    unknown = set(args.targets) - set(known)
    if unknown:
        sys.exit(f"no such target: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    print("| target | runs | outcome | peak memory | took |\n|---|---|---|---|---|", flush=True)
    bad = 0
    for target in args.targets or known:
        done, peak, crashed, took = run(target, args.runs, args.jobs, args.seconds)
        outcome = "**ended with an error**" if crashed else "clean" if done >= args.runs else "clean, stopped after its time"
        print(f"| {target} | {done:,} | {outcome} | {peak} MiB | {took:.0f} s |", flush=True)
        for said in crashed:
            print(said, file=sys.stderr, flush=True)
        bad += len(crashed)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
