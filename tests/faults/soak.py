#!/usr/bin/env python3
"""Soak: real processes on three etcd members under load, a random fault every few seconds, every answer compared.

    python3 tests/faults/soak.py --tandem target/release/tandem --model DIR [--minutes 5] [--seed N] [--json]

One router, two prefill and two decode workers, each behind a proxy of ours. The faults, by seed, are the functions below. The
next one comes when the last one's victim is ready again, so one worker of each pool always lives. Every answer, greedy or
seeded, must equal the undisturbed one token for token; at the end every block must be free or cached, and etcd must have
each worker once, under the incarnation of its last start. Exit code 1 otherwise.
"""

import argparse
import json
import random
import signal
import statistics
import sys
import time

from cluster import LEASE_SECONDS, Cluster, conclude, percentile, wait_for
from load import Load
from proxy import Proxy

# Small, so that prompts are evicted and their KV moves again.
KV_MIB = 48


class Faults:
    """Each fault runs to its end: the victim lives and is whole again when it returns."""

    def __init__(self, cluster, proxies, chance):
        self.cluster, self.proxies, self.chance = cluster, proxies, chance
        self.all = {
            "kill -9 of a worker": self.kill, "SIGSTOP of a worker": self.stop, "drain and undrain": self.drain,
            "kill -9 of one etcd member": self.kill_etcd, "kill -9 of all etcd members": self.kill_all_etcd,
            "etcd loses its data": self.lose_etcd, "connections cut": self.cut, "KV plane flaky": self.flaky_kv,
            "RPC plane flaky": self.flaky_rpc, "a plane slow": self.slow, "a worker heard one way only": self.one_way,
        }

    def kill(self, name):
        self.cluster.kill(name)
        self.cluster.start_one(name)

    def stop(self, name):
        self.cluster.processes[name].send_signal(signal.SIGSTOP)
        time.sleep(3 * LEASE_SECONDS)
        self.cluster.processes[name].send_signal(signal.SIGCONT)

    def drain(self, name):
        self.cluster.command("drain", name)
        time.sleep(2)
        self.cluster.command("undrain", name)

    def kill_etcd(self, _):
        member = self.chance.choice(self.cluster.etcds)
        self.cluster.kill(member)
        time.sleep(2)
        self.cluster.start_one(member)

    def kill_all_etcd(self, _, forget=False):
        for member in self.cluster.etcds:
            self.cluster.kill(member)
        time.sleep(2 * LEASE_SECONDS)
        for member in self.cluster.etcds:
            if forget:
                self.cluster.forget(member)
            self.cluster.start_one(member)

    def lose_etcd(self, name):
        self.kill_all_etcd(name, forget=True)

    def cut(self, name):
        self.proxies[name].cut_all(self.chance.choice(["kv", "rpc"]))

    def flaky_kv(self, name):
        self.harm(name, "kv", corrupt=1 << 20, cut=8 << 20)

    def flaky_rpc(self, name):
        self.harm(name, "rpc", corrupt=4 << 10, cut=64 << 10)

    def slow(self, name):
        self.harm(name, self.chance.choice(["kv", "rpc"]), delay=0.05)

    def one_way(self, name):
        self.harm(name, self.chance.choice(["kv", "rpc"]), swallow=self.chance.choice(["in", "out"]))
        # What was swallowed is missing in the middle of a stream: such a connection never heals.
        self.proxies[name].cut_all("kv")
        self.proxies[name].cut_all("rpc")

    def harm(self, name, plane, **what):
        harm = self.proxies[name].harm[plane]
        vars(harm).update(what)
        time.sleep(LEASE_SECONDS)
        harm.heal()


def whole(cluster):
    """Until everything is ready and known again; otherwise the next fault could take a pool's other worker."""
    for name in cluster.workers:
        cluster.wait_ready(name)
    wait_for(lambda: cluster.ready_workers() == set(cluster.workers), "the router to see all workers")
    wait_for(lambda: cluster.members() == cluster.incarnations(), "etcd to have what runs")


def run(options):
    chance = random.Random(options.seed)
    print(f"seed {options.seed}", file=sys.stderr, flush=True)
    cluster = Cluster(options.tandem, options.model, options.base, etcds=3, kv_mib=KV_MIB)
    proxies = {}
    for number, name in enumerate(cluster.workers):
        listen = ("127.0.0.1", options.base + 51 + number)
        cluster.advertise[name] = f"{listen[0]}:{listen[1]}"
        proxies[name] = Proxy(listen, ("127.0.0.1", cluster.port(name)), chance.random())
    faults, recovery, load = Faults(cluster, proxies, chance), {}, Load(cluster)
    try:
        cluster.start()
        load.learn()
        before = cluster.memory("router-0")
        load.start()
        end = time.monotonic() + 60 * options.minutes
        while time.monotonic() < end:
            time.sleep(chance.uniform(0.5, 3))
            kind, name = chance.choice(list(faults.all)), chance.choice(cluster.workers)
            print(f"{time.strftime('%H:%M:%S')} {kind} ({name}), {load.answered} answers, {len(load.lost)} lost, "
                  f"{len(load.wrong)} wrong", file=sys.stderr, flush=True)
            faults.all[kind](name)
            began = time.monotonic()
            whole(cluster)
            recovery.setdefault(kind, []).append(time.monotonic() - began)
        load.stop()
        blocks = cluster.leaked()
        memory = {"router_mib_before": before, "router_mib_after": cluster.memory("router-0")}
    finally:
        cluster.stop()
    fine = not load.wrong and not load.lost and not blocks
    print(json.dumps(report(options, load, recovery, blocks, proxies) | memory, indent=None if options.json else 2))
    conclude(cluster, fine)


def report(options, load, recovery, blocks, proxies):
    times = [seconds for kind in recovery.values() for seconds in kind]
    harm = [harm for proxy in proxies.values() for harm in proxy.harm.values()]
    return {
        "seed": options.seed, "minutes": options.minutes, "faults": {kind: len(times) for kind, times in recovery.items()},
        "bits_flipped": sum(h.flipped for h in harm), "connections_cut": sum(h.cuts for h in harm),
        "bytes_swallowed": sum(h.swallowed for h in harm),
        "answers": load.answered, "wrong": len(load.wrong), "lost": len(load.lost), "leaked_blocks": blocks,
        "first_wrong": load.wrong[:2], "first_lost": load.lost[:5],
        "answer_ms": {"p50": statistics.median(load.totals), "p99": percentile(load.totals, 0.99), "max": max(load.totals)},
        "largest_gap_ms": {"p99": percentile(load.gaps, 0.99), "max": max(load.gaps)},
        "recovery_seconds": {"p50": statistics.median(times), "p99": percentile(times, 0.99), "max": max(times)},
        "recovery_seconds_max_by_fault": {kind: round(max(times), 2) for kind, times in recovery.items()},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tandem", default="target/release/tandem")
    parser.add_argument("--model", required=True)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--base", type=int, default=22000, help="first port")
    parser.add_argument("--json", action="store_true")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
