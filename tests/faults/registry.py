#!/usr/bin/env python3
"""etcd and the network away, in every way, under load: no request fails, no member is doubled, no incarnation changes.

    sudo python3 tests/faults/registry.py --tandem target/release/tandem --model DIR [--outage 300] [--cut 20] [--only WORD]

Three etcd members and four workers, each in a network namespace of its own; router and clients outside. No worker is started
again, so each must be the same member, under the same incarnation, after every step. Exit code 1 otherwise.
"""

import argparse
import json
import signal
import sys
import time

from cluster import Cluster, conclude, wait_for
from load import Load
from namespaces import Network


class Steps:
    """Each step harms and heals; its name says what."""

    def __init__(self, cluster, network, options):
        self.cluster, self.network, self.options = cluster, network, options
        self.all = {
            "the leader killed": self.leader,
            "all members killed, restarted with their data": self.all_killed,
            "all members killed, restarted without their data": lambda: self.all_killed(forget=True),
            "etcd does not hear us": lambda: self.cut(lambda etcd: network.deaf(etcd, "us"), cluster.etcds),
            "etcd hears us, we do not hear it": lambda: self.cut(lambda etcd: network.dumb(etcd, "us"), cluster.etcds),
            "etcd's leader is not heard by the others": self.leader_dumb,
            "etcd hears no worker, the router hears etcd": self.workers_unheard,
            "a prefill worker hears nobody": lambda: self.cut(network.deaf, ["prefill-0"]),
            "nobody hears a prefill worker": lambda: self.cut(network.dumb, ["prefill-1"]),
            "a decode worker hears nobody": lambda: self.cut(network.deaf, ["decode-0"]),
            "nobody hears a decode worker": lambda: self.cut(network.dumb, ["decode-1"]),
            "a prefill worker stopped for 30 s": lambda: self.stopped("prefill-0"),
            "a decode worker stopped for 30 s": lambda: self.stopped("decode-0"),
            f"etcd down for {options.outage:g} s": lambda: self.all_killed(seconds=options.outage),
        }

    def find_leader(self):
        for name in self.cluster.etcds:
            page = self.cluster.page(name, "/metrics") or ""
            if "etcd_server_is_leader 1" in page:
                return name
        return self.cluster.etcds[0]

    def leader(self):
        name = self.find_leader()
        self.cluster.kill(name)
        time.sleep(self.options.cut)
        self.cluster.start_one(name)

    def all_killed(self, forget=False, seconds=None):
        for name in self.cluster.etcds:
            self.cluster.kill(name)
        time.sleep(self.options.cut if seconds is None else seconds)
        for name in self.cluster.etcds:
            if forget:
                self.cluster.forget(name)
            self.cluster.start_one(name)

    def cut(self, how, names):
        for name in names:
            how(name)
        time.sleep(self.options.cut)
        self.network.heal()

    def leader_dumb(self):
        leader = self.find_leader()
        others = [name for name in self.cluster.etcds if name != leader]
        self.cut(lambda other: self.network.dumb(leader, other), others)

    def workers_unheard(self):
        self.cut(lambda pair: self.network.deaf(*pair), [(e, w) for e in self.cluster.etcds for w in self.cluster.workers])

    def stopped(self, name):
        self.cluster.processes[name].send_signal(signal.SIGSTOP)
        time.sleep(30)
        self.cluster.processes[name].send_signal(signal.SIGCONT)


def whole(cluster, incarnations):
    """Until the router and etcd have every worker, once, as it was at the start; how long that took."""
    began = time.monotonic()
    wait_for(lambda: cluster.members() == incarnations, "etcd to have every worker, once, as it was")
    wait_for(lambda: cluster.ready_workers() == set(cluster.workers), "the router to see all workers")
    if cluster.incarnations() != incarnations:
        raise SystemExit(f"incarnations changed: {cluster.incarnations()} were {incarnations}")
    return time.monotonic() - began


def run(options):
    network = Network([*(f"etcd-{i}" for i in range(3)), "prefill-0", "prefill-1", "decode-0", "decode-1"])
    cluster = Cluster(options.tandem, options.model, options.base, etcds=3, hosts=network.hosts(), kv_mib=48)
    steps, rows, load = Steps(cluster, network, options), [], Load(cluster, concurrency=2)
    try:
        cluster.start()
        load.learn()
        incarnations = cluster.incarnations()
        load.start()
        for what, step in steps.all.items():
            if options.only and options.only not in what:
                continue
            before = (load.answered, len(load.lost), len(load.wrong))
            print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)
            step()
            seconds = whole(cluster, incarnations)
            now = (load.answered, len(load.lost), len(load.wrong))
            rows.append((what, *(b - a for a, b in zip(before, now)), seconds))
        load.stop()
        blocks = cluster.leaked()
    finally:
        cluster.stop()
        network.close()
    print("| | answers meanwhile | failed | wrong | whole again after |\n|---|---|---|---|---|")
    for what, answered, lost, wrong, seconds in rows:
        print(f"| {what} | {answered} | {lost} | {wrong} | {seconds:.1f} s |")
    print(json.dumps({"answers": load.answered, "failed": len(load.lost), "wrong": len(load.wrong), "leaked_blocks": blocks,
                      "largest_gap_ms": max(load.gaps), "first_failed": load.lost[:5], "first_wrong": load.wrong[:2]}, indent=2))
    conclude(cluster, not load.lost and not load.wrong and not blocks)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tandem", default="target/release/tandem")
    parser.add_argument("--model", required=True)
    parser.add_argument("--outage", type=float, default=300, help="seconds of the long outage")
    parser.add_argument("--cut", type=float, default=20, help="seconds of all others")
    parser.add_argument("--only", default="", help="only steps with this word in their name")
    parser.add_argument("--base", type=int, default=24000, help="first port")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
