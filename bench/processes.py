"""A cluster of processes for a measurement: free ports, ready when all are healthy, stopped at the end."""

import contextlib
import socket
import subprocess
import sys
import time
import urllib.request


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def healthy(port):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


def by_strategy(tandem, model, strategy, roles, slo_itl_ms):
    """A router and workers of one thread each: the commands, their ports, the router's first."""
    ports = [free_port() for _ in range(1 + len(roles))]
    common = ["--model", model, "--strategy", strategy, "--log", "error"]
    commands = [[tandem, "router", *common, "--listen", f"127.0.0.1:{ports[0]}"]]
    for role, port in zip(roles, ports[1:]):
        commands.append([tandem, role, *common, "--registry", f"127.0.0.1:{ports[0]}", "--listen", f"127.0.0.1:{port}",
                         "--threads", "1", "--kv-mib", "512", "--slo-itl-ms", slo_itl_ms])
    return commands, ports


@contextlib.contextmanager
def cluster(name, commands, ports, patience):
    """Starts the commands; yields them, once every port is healthy, with the seconds that took."""
    running = [subprocess.Popen(list(map(str, command))) for command in commands]
    try:
        began = time.monotonic()
        while not all(healthy(port) for port in ports):
            if any(process.poll() is not None for process in running) or time.monotonic() - began > patience:
                sys.exit(f"{name}: a process ended or never became ready")
            time.sleep(0.1)
        yield running, time.monotonic() - began
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait(timeout=60)
