#!/usr/bin/env python3
"""kill -9 of each process kind at each event of a request's life; every outcome checked and counted.

    python3 tests/faults/kills.py --tandem target/debug/tandem --model DIR [--times 20] [--seed N] [--cells 8]

Needs a development build: release builds have no failpoints (failpoints/src/lib.rs). One router, two prefill and two decode
workers, one etcd. Every process reports its events here and waits for the answer, so the victim dies while the request stands
exactly there. `--cells N` takes a sample of N cells by the seed, `--only EVENT` one row. With `--kv-wire int8` or `fp8` KV goes packed, over
TCP only; answers are then compared where no token was drawn before the kill, since KV of drawn tokens is packed only when it is sent
again. With `--device cuda` all workers share a GPU, and KV goes through CUDA IPC and through TCP. Each worker times its products
when it starts, so two may add up in another order and a near tie may fall the other way: answers have the same length, and how many
are equal is counted. What must hold:

* worker or etcd killed: the answer equals the undisturbed one, token for token
* router killed: the client sees UNAVAILABLE, and the same id sent again to the restarted router is a new request
  with the same answer
* always: afterwards no worker holds a block of it
"""

import argparse
import collections
import json
import random
import sys
import time

from cluster import Cluster, conclude, tokens_of, wait_for
from events import Events

# What a row of the table is called, the event it stands for, and at which index: a number, or drawn from this range.
MOMENTS = {
    "received": ("received", 0),
    "admitted": ("admitted", 0),
    "placed": ("placed", 0),
    "reserved": ("reserved", 0),
    "prefill started": ("prefill-started", 0),
    "layer pushed": ("layer-pushed", range(30)),
    "committed": ("committed", 0),
    "first token": ("token", 1),
    "mid decode": ("token", range(2, 20)),
}
KINDS = ["router", "prefill", "decode", "etcd"]
TOKENS = 20
UNAVAILABLE = "The service is currently unavailable"


class Killer:
    """Kills one process of a kind when the request is at its moment, and starts it again."""

    def __init__(self, cluster, chance):
        self.cluster, self.chance = cluster, chance
        self.armed, self.placed, self.victim = None, {}, None

    def arm(self, kind, event, index):
        self.armed, self.placed, self.victim = (kind, event, index), {}, None

    def on(self, pid, event, index, about):
        if event == "placed":
            prefill, _, decode = about.partition(" ")
            self.placed = {"prefill": prefill, "decode": decode}
        if self.armed and self.armed[1:] == (event, index):
            kind, self.armed = self.armed[0], None
            self.victim = self.choose(kind)
            self.cluster.kill(self.victim)
            self.cluster.start_one(self.victim)

    def choose(self, kind):
        """The worker that has the request; before anything was placed, any."""
        fixed = {"router": "router-0", "etcd": "etcd-0"}
        return fixed.get(kind) or self.placed.get(kind) or f"{kind}-{self.chance.randrange(2)}"


def prompt(number):
    # The number comes first: no two prompts share a block, so every run has layers to push.
    return f"{number} lamps burned in the harbour. " + "The wind blew and the water was dark and cold that night. " * 4


def one(cluster, killer, ways, number, kind, moment):
    """One run of a cell. What came of it, and whether that is allowed; counts the ways that KV went."""
    event, index = MOMENTS[moment]
    index = killer.chance.choice(index) if isinstance(index, range) else index
    request = [{"id": "0", "request_id": f"kill-{number}", "text": prompt(number)}]
    killer.arm(kind, event, index)
    began = time.monotonic()
    answer = cluster.ask(request, tokens=TOKENS)["0"]
    seconds = time.monotonic() - began
    killer.armed = None
    if killer.victim is None:
        return f"never reached: {answer.get('error')}", False, seconds
    settle(cluster)
    again = cluster.ask(request, tokens=TOKENS)["0"]
    ways.update(a["kv"]["transport"] for a in (answer, again) if a.get("kv"))
    if "error" in again:
        return f"asked again: {again['error']}", False, seconds
    if "error" in answer:
        fine = kind == "router" and answer["error"].startswith(UNAVAILABLE)
        outcome = "UNAVAILABLE, same answer to the same id" if fine else answer["error"]
    else:
        same, whole = tokens_of(answer) == tokens_of(again), len(tokens_of(answer)[0]) == TOKENS
        fine = (same or cluster.device == "cuda") and whole and kind != "router"
        outcome = f"another answer: {tokens_of(answer)} for {tokens_of(again)}"
        if fine:
            outcome = "same answer" if same else "whole answer"
    leaked = cluster.leaked()
    return (outcome, fine, seconds) if not leaked else (f"{outcome}, leaked {leaked}", False, seconds)


def settle(cluster):
    """Until everything lives and the router places on every worker, so that each run meets the same cluster."""
    wait_for(lambda: cluster.members().keys() >= set(cluster.workers), "all members in etcd")
    wait_for(lambda: cluster.ready_workers() == set(cluster.workers), "the router to see all workers")


def run(options):
    chance = random.Random(options.seed)
    moments = [moment for moment in MOMENTS if options.only in (None, moment)]
    if options.kv_wire != "plain":
        moments = [moment for moment in moments if MOMENTS[moment][0] != "token"]
    cells = [(kind, moment) for moment in moments for kind in KINDS if kind in options.kinds.split(",")]
    cells = chance.sample(cells, min(options.cells, len(cells))) if options.cells else cells
    events = Events()
    cluster = Cluster(options.tandem, options.model, options.base, env=events.environment(), wire=options.kv_wire,
                      device=options.device)
    killer = Killer(cluster, chance)
    table, bad = collections.defaultdict(collections.Counter), 0
    slowest, ways = collections.Counter(), collections.Counter()
    try:
        cluster.start()
        events.on = killer.on
        for number in range(options.times * len(cells)):
            kind, moment = cells[number % len(cells)]
            outcome, fine, seconds = one(cluster, killer, ways, number, kind, moment)
            table[moment, kind][outcome] += 1
            slowest[kind] = max(slowest[kind], seconds)
            bad += not fine
            if not fine or options.verbose:
                print(f"{number}: {moment}, {kind} ({killer.victim}) killed: {outcome} ({seconds:.1f} s)", file=sys.stderr)
        if options.kv_wire != "plain":
            packed = sum(cluster.counters(name, "tandem_kv_packed_sent_bytes_total") for name in cluster.workers)
            print(f"{packed / 1e6:.1f} MB went packed from the processes that live now")
            bad += packed == 0
    finally:
        cluster.stop()
        events.close()
    show(table, slowest, ways, options)
    conclude(cluster, bad == 0)


def show(table, slowest, ways, options):
    if options.json:
        print(json.dumps({"seed": options.seed, "cells": {f"{m}/{k}": dict(v) for (m, k), v in table.items()}}))
        return
    print(f"seed {options.seed}, {options.times} times each")
    print("| killed at | " + " | ".join(KINDS) + " |\n" + "|---" * (1 + len(KINDS)) + "|")
    for moment in MOMENTS:
        cells = ["; ".join(f"{n} × {outcome}" for outcome, n in table[moment, kind].items()) for kind in KINDS]
        if any(cells):
            print(f"| {moment} | " + " | ".join(cells) + " |")
    print("KV of answers went by: " + ", ".join(f"{way} {count} times" for way, count in sorted(ways.items())))
    print("slowest answer: " + ", ".join(f"{kind} {slowest[kind]:.1f} s" for kind in KINDS))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tandem", default="target/debug/tandem")
    parser.add_argument("--model", required=True)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--cells", type=int, default=0, help="a sample of so many cells; 0 is all 36")
    parser.add_argument("--only", choices=MOMENTS, help="one row")
    parser.add_argument("--kinds", default=",".join(KINDS), help="columns, by commas")
    parser.add_argument("--kv-wire", choices=["plain", "int8", "fp8"], default="plain")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--base", type=int, default=23000, help="first port")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--verbose", action="store_true")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
