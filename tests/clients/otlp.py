#!/usr/bin/env python3
"""One request, one trace: spans of router, prefill worker and decode worker, received by a real collector (rotel).

    tests/clients/otlp.py TANDEM CACHE ROTEL_AGENT
"""
import json
import re
import socket
import subprocess
import sys
import tempfile
import urllib.request

TANDEM, CACHE, ROTEL = sys.argv[1:4]
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def read_until(stream, pattern, what):
    for line in stream:
        if found := re.search(pattern, line):
            return found
    sys.exit(f"{what} ended early")


def received():
    """What the collector printed of the trace of one chat request: [(service, name, id, parent)]."""
    grpc, http = free_port(), free_port()
    with tempfile.NamedTemporaryFile("r", suffix=".log") as log:
        agent = subprocess.Popen(
            [ROTEL, "start", "--exporter", "blackhole", "--debug-log", "traces", "--debug-log-verbosity", "detailed",
             "--otlp-grpc-endpoint", f"127.0.0.1:{grpc}", "--otlp-http-endpoint", f"127.0.0.1:{http}"],
            stdout=open(log.name, "w"), stderr=subprocess.STDOUT)
        try:
            ask(grpc)
        finally:
            agent.terminate()
            agent.wait(30)
        return spans(log.read())


def ask(grpc):
    up = subprocess.Popen(
        [TANDEM, "up", "--listen", "127.0.0.1:0", "--cache-dir", CACHE, "--strategy", "disaggregated",
         "--otlp-endpoint", f"http://127.0.0.1:{grpc}"],
        stdout=subprocess.PIPE, text=True)
    try:
        address = read_until(up.stdout, r"^serving .* on (\S+) ", "tandem up")[1]
        body = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
        call = urllib.request.Request(
            f"http://{address}/v1/chat/completions", json.dumps(body).encode(), {"traceparent": f"00-{TRACE}-{CALLER}-01"})
        with urllib.request.urlopen(call, timeout=120) as answer:
            assert "Paris" in answer.read().decode()
    finally:
        # Every process sends what it has left before it ends.
        up.terminate()
        up.wait(60)


def spans(text):
    found, service = [], None
    for block in re.split(r"(?=ResourceSpans #)|(?=\nSpan #)", text):
        if name := re.search(r"service\.name: Str\((.*)\)", block):
            service = name[1]
        field = lambda name: re.search(rf"^\s+{name}\s*: (\S.*)?$", block, re.M)
        if (trace := field("Trace ID")) and trace[1] == TRACE:
            found.append((service, field("Name")[1], field("ID")[1], field("Parent ID")[1]))
    return found


def main():
    seen = received()
    for service, name, span, parent in sorted(seen):
        print(f"{service:16} {name:28} {span} in {parent}")
    by_name = {(service, name): (span, parent) for service, name, span, parent in seen}
    root, root_parent = by_name["tandem-router", "chat smollm2-135m-instruct"]
    assert root_parent == CALLER, "the router's span belongs to the caller's"
    for worker in [("tandem-prefill", "prefill"), ("tandem-decode", "decode")]:
        assert by_name[worker][1] == root, f"{worker} belongs to the router's span"
    for part in ["tokenize", "queue", "reserve", "decode"]:
        assert by_name["tandem-router", part][1] == root, part
    for part in ["open ticket", "queue", "compute", "exposed transfer"]:
        assert by_name["tandem-prefill", part][1] == by_name["tandem-prefill", "prefill"][0], part
    print(f"one trace of {len(seen)} spans from three processes")


main()
