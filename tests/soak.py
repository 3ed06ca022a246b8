#!/usr/bin/env python3
"""Soak: real processes on a real etcd under load, a random fault every few seconds, every answer compared.

    python3 tests/soak.py --tandem target/release/tandem --model DIR [--minutes 5] [--seed N] [--json]

Two prefill and two decode workers, one router, one etcd. Faults, by seed: kill -9 of a worker (started again at once), SIGSTOP
of one for longer than its lease, kill -9 of etcd (down for some seconds, same data), drain and undrain. The next fault comes
when the last one's victim is ready again, so one worker of each pool always lives. Every answer must equal the
undisturbed run token for token; at the end every worker's blocks must be free or cached. Exit code 1 otherwise.
"""

import argparse
import json
import pathlib
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

LEASE_SECONDS = 5
STOPPED_SECONDS = 3 * LEASE_SECONDS
# Faster than this a worker does not load its model; slower means that it hangs.
READY_SECONDS = 90
ROUTER, ETCD, PEER, WORKERS = 52051, 52379, 52380, 52061


class Cluster:
    def __init__(self, options, folder):
        self.options, self.folder = options, folder
        self.names = ["prefill-0", "prefill-1", "decode-0", "decode-1"]
        self.processes = {}

    def spawn(self, name, command):
        log = open(self.folder / f"{name}.log", "ab")
        self.processes[name] = subprocess.Popen(command, stdout=log, stderr=log)

    def start_etcd(self):
        urls = f"http://127.0.0.1:{ETCD}"
        peers = f"http://127.0.0.1:{PEER}"
        self.spawn("etcd", ["etcd", "--data-dir", str(self.folder / "etcd"), "--listen-client-urls", urls,
                            "--advertise-client-urls", urls, "--listen-peer-urls", peers,
                            "--initial-advertise-peer-urls", peers, "--initial-cluster", f"default={peers}"])

    def start_worker(self, name):
        common = ["--model", self.options.model, "--etcd", f"http://127.0.0.1:{ETCD}"]
        self.spawn(name, [self.options.tandem, name.split("-")[0], *common, "--listen", f"127.0.0.1:{self.port(name)}",
                          "--name", name, "--threads", "1", "--kv-mib", "128", "--lease-seconds", str(LEASE_SECONDS)])

    def start(self):
        self.start_etcd()
        for name in self.names:
            self.start_worker(name)
        self.spawn("router", [self.options.tandem, "router", "--model", self.options.model, "--etcd",
                              f"http://127.0.0.1:{ETCD}", "--listen", f"127.0.0.1:{ROUTER}"])
        for port in [ROUTER, *map(self.port, self.names)]:
            wait_for(lambda port=port: answers(port, "/health"), f"port {port} to be ready")

    def port(self, name):
        return WORKERS + self.names.index(name)

    def kill(self, name):
        self.processes[name].kill()
        self.processes[name].wait()

    def stop(self):
        for process in self.processes.values():
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()


def answers(port, path):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2) as reply:
            return reply.read().decode()
    except OSError:
        return None


def wait_for(condition, what):
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end:
        value = condition()
        if value is not None and value is not False:
            return value
        time.sleep(0.1)
    raise SystemExit(f"waited {READY_SECONDS} s in vain for {what}")


def ask(options, prompts):
    """One pass over all prompts: the answers by id, or why there are none."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file, tempfile.TemporaryFile("w+") as out:
        json.dump(prompts, file)
        file.flush()
        command = [options.tandem, "generate", "--addr", f"127.0.0.1:{ROUTER}", "--json", "--concurrency", "4",
                   "--max-tokens", "60", "--ignore-eos", "--prompts", file.name]
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, check=False)
        out.seek(0)
        return {a["id"]: a for a in map(json.loads, out)}, done.returncode, done.stderr


class Load(threading.Thread):
    """Asks again and again until told to stop; counts what comes back."""

    def __init__(self, options, prompts, expected):
        super().__init__()
        self.options, self.prompts, self.expected = options, prompts, expected
        self.over = threading.Event()
        self.answered, self.wrong, self.lost, self.totals, self.gaps = 0, [], [], [], []

    def run(self):
        while not self.over.is_set():
            answers_now, code, errors = ask(self.options, self.prompts)
            for prompt in self.prompts:
                answer = answers_now.get(prompt["id"])
                if answer is None or "output_token_ids" not in answer:
                    self.lost.append((prompt["id"], code, errors[-400:]))
                    continue
                self.answered += 1
                if answer["output_token_ids"] != self.expected[prompt["id"]]:
                    self.wrong.append(prompt["id"])
                self.totals.append(answer["timeline"]["total_ms"])
                self.gaps.append(answer["timeline"]["itl_max_ms"])


def drain(options, verb, worker):
    subprocess.run([options.tandem, verb, worker, "--addr", f"127.0.0.1:{ROUTER}"], check=False, capture_output=True)


def fault(cluster, kind, name):
    """One fault, to its end: the victim is ready again. Seconds from its end to readiness."""
    if kind == "kill worker":
        cluster.kill(name)
        cluster.start_worker(name)
    elif kind == "stop worker":
        cluster.processes[name].send_signal(signal.SIGSTOP)
        time.sleep(STOPPED_SECONDS)
        cluster.processes[name].send_signal(signal.SIGCONT)
    elif kind == "kill etcd":
        cluster.kill("etcd")
        time.sleep(2 * LEASE_SECONDS)
        cluster.start_etcd()
    elif kind == "drain":
        drain(cluster.options, "drain", name)
        time.sleep(2)
        drain(cluster.options, "undrain", name)
    started = time.monotonic()
    wait_for(lambda: answers(cluster.port(name), "/health"), f"{name} after: {kind}")
    if kind != "kill etcd":
        router_sees(cluster, name)
    return time.monotonic() - started


def router_sees(cluster, name):
    """Until the router places on it again: otherwise the next fault could take the pool's other one."""
    key = f"/tandem/v1/default/members/{name}"
    command = ["etcdctl", "--endpoints", f"http://127.0.0.1:{ETCD}", "get", key]
    wait_for(lambda: name in subprocess.run(command, capture_output=True, text=True, check=False).stdout, f"{name}'s key")


def leaked(cluster):
    """Per worker, blocks that are neither free nor cached, once nothing runs."""
    def held(name):
        page = answers(cluster.port(name), "/metrics") or ""
        states = dict(re.findall(r'tandem_kv_blocks\{[^}]*state="(\w+)"[^}]*\} (\d+)', page))
        return sum(int(count) for state, count in states.items() if state not in ("free", "cached")) if states else -1
    end = time.monotonic() + 30
    while any(held(name) for name in cluster.names) and time.monotonic() < end:
        time.sleep(0.5)
    return {name: held(name) for name in cluster.names}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tandem", default="target/release/tandem")
    parser.add_argument("--model", required=True)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    print(f"seed {options.seed}", file=sys.stderr)
    prompts = [{"id": str(i), "text": f"Entry {i} of the log: " + "the lamp burned, the wind blew. " * (1 + 7 * (i % 4))}
               for i in range(12)]
    folder = pathlib.Path(tempfile.mkdtemp(prefix="tandem-soak-"))
    cluster = Cluster(options, folder)
    faults, recovery = {}, []
    try:
        cluster.start()
        first, code, errors = ask(options, prompts)
        if code != 0 or len(first) != len(prompts):
            raise SystemExit(f"the undisturbed run failed: {errors}")
        load = Load(options, prompts, {key: answer["output_token_ids"] for key, answer in first.items()})
        load.start()
        end = time.monotonic() + 60 * options.minutes
        while time.monotonic() < end:
            time.sleep(chance.uniform(1, 4))
            kind = chance.choice(["kill worker", "kill worker", "stop worker", "kill etcd", "drain"])
            name = chance.choice(cluster.names)
            print(f"{time.strftime('%H:%M:%S')} {kind} {'' if kind == 'kill etcd' else name}", file=sys.stderr)
            recovery.append(fault(cluster, kind, name))
            faults[kind] = faults.get(kind, 0) + 1
        load.over.set()
        load.join()
        blocks = leaked(cluster)
    finally:
        cluster.stop()
    report = {
        "seed": options.seed, "minutes": options.minutes, "faults": faults, "answers": load.answered,
        "wrong": len(load.wrong), "lost": len(load.lost), "first_lost": load.lost[:3], "leaked_blocks": blocks,
        "answer_ms_p50": statistics.median(load.totals), "answer_ms_max": max(load.totals),
        "largest_gap_ms": max(load.gaps),
        "ready_again_seconds_p50": statistics.median(recovery), "ready_again_seconds_max": max(recovery),
    }
    print(json.dumps(report, indent=None if options.json else 2))
    fine = not load.wrong and not load.lost and not any(blocks.values())
    if fine:
        shutil.rmtree(folder)
    else:
        print(f"logs: {folder}", file=sys.stderr)
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
