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
