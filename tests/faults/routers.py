#!/usr/bin/env python3
"""Two routers on one etcd over the same workers: one is killed again and again, the other one's clients notice nothing.

    python3 tests/faults/routers.py --tandem target/debug/tandem --model DIR [--times 5]

What must hold: every answer through either router is right; the surviving router fails nothing; the killed one's clients see
UNAVAILABLE or nothing; the same request id through both at once is two requests; a drain told to one router is seen by the
other; afterwards no worker holds a block.
"""

import argparse
import sys
import threading

from cluster import Cluster, conclude, tokens_of, wait_for
from kills import UNAVAILABLE
from load import Load


def same_id_through_both(cluster):
    request = [{"id": "0", "request_id": "twice", "text": "Both ways at once. " * 8}]
    answers = {}

    def ask(router):
        answers[router] = cluster.ask(request, router)["0"]
    threads = [threading.Thread(target=ask, args=(router,)) for router in cluster.routers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [answer["error"] for answer in answers.values() if "error" in answer]
    if errors or tokens_of(answers["router-0"]) != tokens_of(answers["router-1"]):
        raise SystemExit(f"the same id through both routers: {errors or answers}")


def drain_is_seen(cluster):
    def state():
        return cluster.status("router-1")["decode-0"]["state"]
    cluster.command("drain", "decode-0", "router-0")
    wait_for(lambda: state() == "draining", "the other router to see the drain")
    cluster.command("undrain", "decode-0", "router-0")
    wait_for(lambda: state() == "ready", "the other router to see the end of the drain")


def run(options):
    cluster = Cluster(options.tandem, options.model, options.base, routers=2)
    try:
        cluster.start()
        killed, other = Load(cluster, ["router-0"], tokens=30, concurrency=2), Load(cluster, ["router-1"], tokens=30, concurrency=2)
        killed.learn()
        other.expected = killed.expected
        same_id_through_both(cluster)
        killed.start()
        other.start()
        drain_is_seen(cluster)
        for _ in range(options.times):
            enough = other.answered + 8
            wait_for(lambda enough=enough: other.answered >= enough, "answers between two kills")
            cluster.kill("router-0")
            cluster.start_one("router-0")
            cluster.wait_ready("router-0")
        killed.stop()
        other.stop()
        blocks = cluster.leaked()
    finally:
        cluster.stop()
    # A client that connects while nobody listens, or whose stream breaks.
    expected = (UNAVAILABLE, "no answer; exit code 3")
    unclear = [error for _, _, error in killed.lost if not error.startswith(expected)]
    print(f"{options.times} kills of one router: its clients {killed.answered} answers, {len(killed.lost)} refused, {len(unclear)} of them without "
          f"a clear error, {len(killed.wrong)} wrong; the other's {other.answered} answers, {len(other.lost)} refused, {len(other.wrong)} wrong; "
          f"leaked blocks: {blocks or 'none'}")
    for error in [*unclear[:3], *other.lost[:3]]:
        print(error, file=sys.stderr)
    conclude(cluster, not (unclear or killed.wrong or other.lost or other.wrong or blocks))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tandem", default="target/debug/tandem")
    parser.add_argument("--model", required=True)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--base", type=int, default=26000, help="first port")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
