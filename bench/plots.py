#!/usr/bin/env python3
"""Plots of measured runs, as SVG, into bench/plots/. Needs matplotlib (pip install matplotlib).

    python3 bench/plots.py loads strategies.json          # latency against load, of bench/strategies.py --out
    python3 bench/plots.py interference --tandem target/release/tandem --model DIR   # what a long prompt does to a sequence that decodes
    python3 bench/plots.py request --tandem target/release/tandem --model DIR        # where the time of one request goes
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import threading
import time
import urllib.request

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "tandem", "svg.fonttype": "none", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3})
import matplotlib.pyplot as plt

import processes

COLOURS = {"shared": "#dc2626", "chunked": "#d97706", "priority": "#7c3aed", "disaggregated": "#2563eb", "adaptive": "#059669"}
PLOTS = pathlib.Path(__file__).parent / "plots"


def save(figure, name):
    PLOTS.mkdir(exist_ok=True)
    figure.tight_layout()
    figure.savefig(PLOTS / f"{name}.svg", metadata={"Date": None})
    print(f"bench/plots/{name}.svg")


def loads(options):
    """TTFT and ITL against load, one line a strategy; the bars are the least and the most of the turns."""
    seen = json.loads(options.runs.read_text())
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4))
    for axis, (key, quantile, title) in zip(axes, (("ttft_ms", "p50", "TTFT p50, ms"), ("ttft_ms", "p99", "TTFT p99, ms"), ("itl_ms", "p99", "ITL p99, ms"))):
        for strategy, colour in COLOURS.items():
            rates = sorted(float(name.split()[1]) for name in seen if name.split()[0] == strategy)
            turns = [[row[key][quantile] for row in seen[f"{strategy} {rate:g}"]] for rate in rates]
            middle = [statistics.median(values) for values in turns]
            spread = [[m - min(v) for m, v in zip(middle, turns)], [max(v) - m for m, v in zip(middle, turns)]]
            axis.errorbar(rates, middle, spread, label=strategy, color=colour, marker="o", markersize=3, capsize=2, linewidth=1.2)
        axis.set(title=title, xlabel="requests a second", yscale="log")
    axes[0].legend(fontsize=7)
    save(figure, "strategies-cpu")


def post(port, body):
    headers = {"content-type": "application/json"}
    return urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), headers), timeout=300)


def gaps(port, model, tokens, started):
    """When each token of one answer came, and how long after the one before."""
    body = {"model": model, "prompt": [7, 11, 13, 17], "max_tokens": tokens, "ignore_eos": True, "stream": True, "temperature": 0}
    seen = []
    with post(port, body) as stream:
        for line in stream:
            if line.startswith(b"data: {"):
                seen.append(time.monotonic())
                started.set()
    return [(at - seen[0], (at - before) * 1e3) for before, at in zip(seen, seen[1:])]


def interference(options):
    """A sequence decodes; 1.5 s on, a long prompt comes. Its gaps, by strategy."""
    name = pathlib.Path(options.model).name
    figure, axes = plt.subplots(1, 4, figsize=(12, 3), sharey=True)
    ways = {"shared": ["decode"], "chunked": ["decode"], "priority": ["decode"], "disaggregated": ["decode", "prefill"]}
    for axis, (strategy, roles) in zip(axes, ways.items()):
        commands, ports = processes.by_strategy(options.tandem, options.model, strategy, roles, options.slo_itl_ms)
        with processes.cluster(strategy, commands, ports, 60):
            started, rows = threading.Event(), []
            reader = threading.Thread(target=lambda: rows.extend(gaps(ports[0], name, options.tokens, started)))
            reader.start()
            started.wait(60)
            time.sleep(1.5)
            prompt = [(i * 7919) % 40000 + 100 for i in range(options.prompt_tokens)]
            asked = time.monotonic()
            post(ports[0], {"model": name, "prompt": prompt, "max_tokens": 1, "temperature": 0}).read()
            took = time.monotonic() - asked
            reader.join()
        worst = max(gap for _, gap in rows)
        axis.plot([at for at, _ in rows], [gap for _, gap in rows], ".", markersize=3, color=COLOURS[strategy])
        axis.axvspan(1.5, 1.5 + took, color="#000", alpha=0.07, linewidth=0)
        axis.set(title=f"{strategy}: worst gap {worst:.0f} ms,\nprompt answered in {took:.2f} s", xlabel="seconds", yscale="log")
        print(f"{strategy}: gaps p50 {statistics.median(g for _, g in rows):.1f} ms, worst {worst:.1f} ms; the prompt took {took:.2f} s", flush=True)
    axes[0].set_ylabel("gap before a token, ms")
    save(figure, "interference-cpu")


def request(options):
    """One request's stages, prefilled on the prefill worker and on the decode worker: the router's own timeline."""
    stages = (("tokenize_ms", "tokenize"), ("queue_ms", "queue"), ("placement_ms", "place"), ("reserve_ms", "reserve"),
              ("prefill_ms", "prefill"), ("exposed_transfer_ms", "KV still to come"), ("decode_ms", "decode"))
    text = "The harbour master wrote every arrival down. " * (options.prompt_tokens // 9)
    figure, axis = plt.subplots(figsize=(9, 2.2))
    for row, way in enumerate(("remote", "local")):
        command = [options.tandem, "generate", "--json", "--model", options.model, "--kv-mib", "512", "--temperature", "0",
                   "--max-tokens", options.tokens, "--prefill-on", way, text]
        told = json.loads(subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout)
        timeline, at = told["timeline"], 0.0
        for (key, name), colour in zip(stages, plt.get_cmap("tab10").colors):
            axis.barh(row, timeline.get(key, 0.0), left=at, color=colour, label=name if row == 0 else None, height=0.5)
            at += timeline.get(key, 0.0)
        print(f"{way}: {json.dumps({key: round(timeline.get(key, 0.0), 2) for key, _ in stages})}")
    axis.set(yticks=[0, 1], yticklabels=["on the prefill worker", "on the decode worker"], xlabel="ms since the request came", ylim=(-0.5, 1.5))
    axis.legend(ncol=7, fontsize=7, loc="upper center", bbox_to_anchor=(0.45, 1.25), frameon=False)
    save(figure, "request-cpu")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("loads")
    one.add_argument("runs", type=pathlib.Path)
    one.set_defaults(run=loads)
    for run, tokens, prompt in ((interference, 300, 1500), (request, 48, 512)):
        live = commands.add_parser(run.__name__)
        live.add_argument("--tandem", default="target/release/tandem")
        live.add_argument("--model", required=True)
        live.add_argument("--tokens", type=int, default=tokens)
        live.add_argument("--prompt-tokens", type=int, default=prompt)
        live.add_argument("--slo-itl-ms", type=int, default=60)
        live.set_defaults(run=run)
    options = parser.parse_args()
    options.run(options)


main()
