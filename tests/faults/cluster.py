"""Real processes for the fault checks: etcd, routers, prefill and decode workers, and what they show of themselves."""

import http.client
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.request

# Faster than this a worker does not load its model; slower means that it hangs.
READY_SECONDS = 120
LEASE_SECONDS = 5


class Cluster:
    """Two prefill and two decode workers, one etcd member or more, one router or more, all on one port range below 32768:
    from there on a connection to a port where nobody listens yet may be given that port itself, and meet itself. KV goes as `wire`.
    All workers compute on `device`; `cuda` is one GPU for all of them.

    `hosts` gives a process another address and a command before its own (a network namespace); `advertise` another address
    that peers use (a proxy); `env` more environment. Logs are in `folder`.
    """

    def __init__(self, tandem, model, base, etcds=1, routers=1, hosts=None, advertise=None, env=None, lease=LEASE_SECONDS,
                 kv_mib=128, wire="plain", device="cpu"):
        self.tandem, self.model, self.base, self.lease, self.kv_mib = tandem, model, base, lease, kv_mib
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="tandem-faults-"))
        self.workers = ["prefill-0", "prefill-1", "decode-0", "decode-1"]
        self.routers = [f"router-{i}" for i in range(routers)]
        self.etcds = [f"etcd-{i}" for i in range(etcds)]
        self.hosts, self.advertise, self.env = hosts or {}, advertise or {}, env or {}
        self.wire, self.device, self.processes = wire, device, {}

    def address(self, name):
        return self.hosts.get(name, ("127.0.0.1", []))[0]

    def port(self, name):
        for first, names in ((1, self.routers), (11, self.workers), (21, self.etcds)):
            if name in names:
                return self.base + first + names.index(name)
        raise KeyError(name)

    def at(self, name):
        return f"{self.address(name)}:{self.port(name)}"

    def peer(self, name):
        return f"http://{self.address(name)}:{self.port(name) + 10}"

    def endpoints(self):
        return ",".join(f"http://{self.at(name)}" for name in self.etcds)

    def spawn(self, name, command):
        before = self.hosts.get(name, (None, []))[1]
        with open(self.folder / f"{name}.log", "ab") as log:
            self.processes[name] = subprocess.Popen([*before, *command], stdout=log, stderr=log, env={**os.environ, **self.env})

    def start_one(self, name):
        if name in self.etcds:
            return self.start_etcd(name)
        common = ["--model", self.model, "--etcd", self.endpoints(), "--listen", self.at(name)]
        if name in self.routers:
            return self.spawn(name, [self.tandem, "router", *common, "--strategy", "disaggregated"])
        # The second of each pool uses the network, so that KV takes every mixture of ways; all do where it shall go packed.
        transport = "tcp" if name.endswith("-1") or self.wire != "plain" else "auto"
        advertise = ["--advertise", self.advertise[name]] if name in self.advertise else []
        return self.spawn(name, [self.tandem, name.split("-")[0], *common, "--name", name, "--threads", "1", "--device", self.device,
                                 "--kv-mib", str(self.kv_mib), "--lease-seconds", str(self.lease), "--transport", transport, "--kv-wire", self.wire,
                                 *advertise])

    def start_etcd(self, name):
        client, peer = f"http://{self.at(name)}", self.peer(name)
        everyone = ",".join(f"{other}={self.peer(other)}" for other in self.etcds)
        self.spawn(name, ["etcd", "--name", name, "--data-dir", str(self.folder / name), "--listen-client-urls", client,
                          "--advertise-client-urls", client, "--listen-peer-urls", peer,
                          "--initial-advertise-peer-urls", peer, "--initial-cluster", everyone])

    def start(self):
        for name in [*self.etcds, *self.workers, *self.routers]:
            self.start_one(name)
        for name in [*self.workers, *self.routers]:
            self.wait_ready(name)
        for router in self.routers:
            wait_for(lambda router=router: self.ready_workers(router) == set(self.workers), f"{router} to see all workers")

    def kill(self, name, sig=signal.SIGKILL):
        self.processes[name].send_signal(sig)
        self.processes[name].wait()

    def forget(self, name):
        """An etcd member's data."""
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def name_of(self, pid):
        return next((name for name, process in self.processes.items() if process.pid == pid), None)

    def stop(self):
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
                process.wait()

    # what they show

    def page(self, name, path):
        return fetch(f"http://{self.at(name)}{path}")

    def wait_ready(self, name):
        wait_for(lambda: self.page(name, "/health"), f"{name} to be ready")

    def status(self, router="router-0"):
        page = self.page(router, "/status.json")
        return {worker["worker"]: worker for worker in json.loads(page)["workers"]} if page else {}

    def ready_workers(self, router="router-0"):
        return {name for name, worker in self.status(router).items() if worker["state"] == "ready"}

    def incarnations(self, router="router-0"):
        return {name: worker["incarnation"] for name, worker in self.status(router).items()}

    def members(self):
        """Every member's key as etcd has it: incarnations by name."""
        shown = subprocess.run(["etcdctl", "--endpoints", self.endpoints(), "get", "--prefix", "/tandem/v1/default/members/"],
                               capture_output=True, text=True, check=False, env={**os.environ, "ETCDCTL_API": "3"}).stdout
        lines = shown.splitlines()
        return {key.rsplit("/", 1)[1]: str(json.loads(value)["incarnation"]) for key, value in zip(lines[::2], lines[1::2])}

    def held(self, name):
        """Blocks of a worker that are neither free nor cached; -1 when it does not say."""
        states = dict(re.findall(r'tandem_kv_blocks\{[^}]*state="(\w+)"[^}]*\} (\d+)', self.page(name, "/metrics") or ""))
        return sum(int(count) for state, count in states.items() if state not in ("free", "cached")) if states else -1

    def leaked(self, patience=30):
        """What each worker still holds when nothing runs; a dead writer's blocks leave quarantine within `patience`."""
        end = time.monotonic() + patience
        while any(self.held(name) for name in self.workers) and time.monotonic() < end:
            time.sleep(0.1)
        return {name: held for name in self.workers if (held := self.held(name))}

    def memory(self, name):
        """Resident MiB of a process."""
        status = pathlib.Path(f"/proc/{self.processes[name].pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) // 1024

    def counters(self, name, metric):
        found = re.findall(rf"^{metric}(?:\{{[^}}]*\}})? (\d+)", self.page(name, "/metrics") or "", re.MULTILINE)
        return sum(map(int, found))

    def command(self, verb, worker, router="router-0"):
        subprocess.run([self.tandem, verb, worker, "--addr", self.at(router)], check=False, capture_output=True)

    # asking

    def ask(self, prompts, router="router-0", tokens=60, concurrency=4, more=()):
        """One pass over the prompts through the command line's client: an answer, or an error in words, by id."""
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(prompts, file)
            file.flush()
            command = [self.tandem, "generate", "--addr", self.at(router), "--json", "--concurrency", str(concurrency),
                       "--max-tokens", str(tokens), "--ignore-eos", "--prompts", file.name, *more]
            before = self.hosts.get("client", (None, []))[1]
            done = subprocess.run([*before, *command], capture_output=True, text=True, check=False)
        answers = {answer["id"]: answer for answer in map(json.loads, done.stdout.splitlines())}
        lost = {"error": f"no answer; exit code {done.returncode}: {done.stderr[-400:].strip()}"}
        return {prompt["id"]: answers.get(prompt["id"], lost) for prompt in prompts}


def fetch(url, timeout=2):
    try:
        with urllib.request.urlopen(url, timeout=timeout) as reply:
            return reply.read().decode()
    except (OSError, http.client.HTTPException):
        return None


def wait_for(condition, what, patience=READY_SECONDS):
    end = time.monotonic() + patience
    while time.monotonic() < end:
        value = condition()
        if value is not None and value is not False:
            return value
        time.sleep(0.05)
    raise SystemExit(f"waited {patience} s in vain for {what}")


def tokens_of(answer):
    """All choices' tokens."""
    return [choice["output_token_ids"] for choice in answer.get("choices", [answer])]


def percentile(values, share):
    """The value that this share of all values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0


def conclude(cluster, fine):
    """Ends a check: logs stay where something was wrong."""
    if fine:
        shutil.rmtree(cluster.folder, ignore_errors=True)
    else:
        print(f"logs: {cluster.folder}")
    raise SystemExit(0 if fine else 1)
