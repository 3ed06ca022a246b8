#!/usr/bin/env python3
"""Hostile clients against a real router and real workers: what each costs, and that others are served meanwhile.

    python3 tests/faults/hostile.py --tandem target/release/tandem --model DIR [--scale 1.0] [--only WORD]

One router, two prefill and two decode workers, one etcd. While each attack runs, an honest client asks again and again; its
answers must be right. The router's memory must stay within a bound and come back. `--scale 0.1` is a tenth of every number.
Exit code 1 when something does not hold.
"""

import argparse
import json
import os
import resource
import select
import socket
import struct
import sys
import threading
import time

import h2
from cluster import Cluster, conclude, fetch, tokens_of, wait_for
from proxy import Proxy

# What the router may grow by under any attack, MiB.
MEMORY_MIB = 768


class Honest(threading.Thread):
    """One who asks and is answered, whatever others do. It names itself: those who do not wait in one queue together."""

    def __init__(self, cluster):
        super().__init__(daemon=True)
        os.environ["TANDEM_API_KEY"] = "honest"
        self.cluster, self.over, self.bad, self.answers, self.slowest = cluster, threading.Event(), [], 0, 0.0
        self.prompts = [{"id": "0", "text": "The lamp burned and the wind blew."}]
        self.expected = tokens_of(cluster.ask(self.prompts, tokens=16)["0"])

    def run(self):
        while not self.over.is_set():
            began = time.monotonic()
            answer = self.cluster.ask(self.prompts, tokens=16)["0"]
            self.slowest = max(self.slowest, time.monotonic() - began)
            self.answers += 1
            if "error" in answer or tokens_of(answer) != self.expected:
                self.bad.append(str(answer.get("error", "another answer"))[:200])


def connect(address, count):
    return [socket.create_connection(address, timeout=30) for _ in range(count)]


class Attacks:
    def __init__(self, cluster, scale):
        self.cluster, self.scale = cluster, scale
        self.router = ("127.0.0.1", cluster.port("router-0"))
        self.all = {
            "nothing said": self.silent, "slowloris, HTTP/1 headers": self.slow_headers,
            "slowloris, HTTP/1 body": self.slow_body, "slowloris, HTTP/2 headers": self.slow_h2_headers,
            "slowloris, HTTP/2 body": self.slow_h2_body, "prompt of 1 GB, HTTP/1": self.large_http,
            "prompt of 1 GB, gRPC": self.large_grpc, "16 MB bodies that never end": self.large_unfinished,
            "open streams": self.streams, "HTTP/2 rapid reset": self.rapid_reset, "forged tickets": self.forged,
            "replayed KV connections": self.replayed,
        }

    def count(self, number):
        return max(1, int(number * self.scale))

    def silent(self):
        sockets = connect(self.router, self.count(2000))
        return self.dribble(sockets, b"", 45)

    def slow_headers(self):
        sockets = connect(self.router, self.count(2000))
        for one in sockets:
            one.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: router\r\n")
        return self.dribble(sockets, b"X: y\r\n", 75)

    def slow_body(self):
        sockets = connect(self.router, self.count(2000))
        for one in sockets:
            one.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: router\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n{")
        return self.dribble(sockets, b" ", 75)

    def slow_h2_headers(self):
        connections = [h2.Connection(self.router) for _ in range(self.count(500))]
        for one in connections:
            one.send(h2.call(1, flags=0))
        return self.dribble([c.socket for c in connections], h2.frame(h2.CONTINUATION, 0, 1, h2.header("x", "y")), 45)

    def slow_h2_body(self):
        connections = [h2.Connection(self.router) for _ in range(self.count(100))]
        for one in connections:
            one.send(b"".join(h2.call(stream) + h2.frame(h2.DATA, 0, stream, h2.message(b"", 1000)) for stream in range(1, 200, 2)))
        return self.dribble([c.socket for c in connections], b"".join(h2.frame(h2.DATA, 0, s, b"x") for s in range(1, 200, 2)), 75)

    def dribble(self, sockets, piece, seconds):
        """A piece a second on each, until the server has closed all or the time is over."""
        began, left = time.monotonic(), set(sockets)
        for one in sockets:
            one.setblocking(False)
        while left and time.monotonic() - began < seconds:
            left -= {one for one in left if is_closed(one, piece)}
            time.sleep(1)
        for one in sockets:
            one.close()
        return f"{len(sockets)} connections: {len(sockets) - len(left)} closed by the router within {time.monotonic() - began:.0f} s"

    def large_http(self):
        one = socket.create_connection(self.router, timeout=60)
        one.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: router\r\nContent-Type: application/json\r\nContent-Length: 1073741824\r\n\r\n{\"prompt\": \"")
        sent = 0
        try:
            while sent < 1 << 30:
                one.sendall(b"a" * (1 << 20))
                sent += 1 << 20
                if select.select([one], [], [], 0)[0]:
                    break
        except OSError:
            pass
        try:
            said = one.recv(200).split(b"\r\n")[0].decode()
        except OSError:
            said = "connection reset"
        return f"{said!r} after {sent >> 20} MiB"

    def large_grpc(self):
        one = h2.Connection(self.router)
        one.send(h2.call(1) + h2.frame(h2.DATA, 0, 1, h2.message(b"\x12", 1 << 30)))
        while True:
            got = one.receive()
            if got is None:
                return "the connection was closed"
            if got[0] in (h2.HEADERS, h2.RESET) and got[2] == 1:
                status = got[3].find(b"grpc-status")
                return f"refused before a second frame ({'with a status' if status >= 0 or got[0] == h2.HEADERS else 'reset'})"

    def large_unfinished(self):
        body = b"POST /v1/completions HTTP/1.1\r\nHost: router\r\nContent-Type: application/json\r\nContent-Length: 16700000\r\n\r\n" + b"[" * 16_600_000
        sockets = connect(self.router, self.count(300))
        for one in sockets:
            one.setblocking(False)
        left, sent = {s: 0 for s in sockets}, 0
        end = time.monotonic() + 60
        while left and time.monotonic() < end:
            _, writable, _ = select.select([], list(left)[:1000], [], 1)
            for one in writable:
                try:
                    left[one] += one.send(body[left[one]:left[one] + (1 << 18)])
                except BlockingIOError:
                    continue
                except OSError:
                    left.pop(one)
                    continue
                if left[one] >= len(body):
                    sent += 1
                    left.pop(one)
        peak = self.cluster.memory("router-0")
        for one in sockets:
            one.close()
        return f"{len(sockets)} connections, {sent} bodies taken but for their end; router at {peak} MiB"

    def streams(self):
        each, wanted = 100, self.count(10_000)
        body = h2.frame(h2.DATA, h2.END_STREAM, 0, h2.message(h2.generate(b"Tell me a long story.", 2000)))
        connections, frames = [], {"tokens": 0, "shed": 0}
        for _ in range(max(1, wanted // each)):
            one = h2.Connection(self.router)
            one.send(b"".join(h2.call(s) + body[:5] + struct.pack(">I", s) + body[9:] for s in range(1, 2 * each, 2)))
            connections.append(one)
        end, peak, running = time.monotonic() + 20, 0, 0
        while time.monotonic() < end:
            ready, _, _ = select.select([c.socket for c in connections], [], [], 0.5)
            for one in (c for c in connections if c.socket in ready):
                data = one.socket.recv(1 << 20)
                frames["shed"] += data.count(b"queue is full")
                frames["tokens"] += len(data)
            status = json.loads(self.cluster.page("router-0", "/status.json") or "{}")
            running = max(running, status.get("running", 0) + status.get("queued", 0))
            peak = max(peak, self.cluster.memory("router-0"))
        for one in connections:
            one.close()
        wait_for(lambda: self.idle(), "the router to drop what nobody waits for")
        return (f"{len(connections) * each} streams on {len(connections)} connections: at most {running} running or queued, "
                f"{frames['shed']} messages of shedding, router at most {peak} MiB")

    def idle(self):
        status = json.loads(self.cluster.page("router-0", "/status.json") or "{}")
        return status.get("running") == 0 and status.get("queued") == 0

    def rapid_reset(self):
        """CVE-2023-44487: open and reset at once, again and again."""
        ends, sent = 0, 0
        cancel = struct.pack(">I", 8)
        for _ in range(self.count(50)):
            one, stream = h2.Connection(self.router), 1
            try:
                while stream < 20_000:
                    one.send(b"".join(h2.call(s) + h2.frame(h2.RESET, 0, s, cancel) for s in range(stream, stream + 200, 2)))
                    stream, sent = stream + 200, sent + 100
                    if select.select([one.socket], [], [], 0)[0] and b"" == one.socket.recv(1 << 16):
                        raise ConnectionError
            except OSError:
                ends += 1
            one.close()
        return f"{sent} streams opened and reset on {self.count(50)} connections, of which the router ended {ends}"

    def forged(self):
        """Right magic and checksums, invented transfers."""
        refused = 0
        for number in range(self.count(1000)):
            one = self.kv_hello("prefill-0", "decode-0")
            attach = kv_frame(ATTACH, transfer=number.to_bytes(16, "little"), body=b"s" * 16 + struct.pack("<QI", 1, 1))
            commit = kv_frame(COMMIT, transfer=number.to_bytes(16, "little"), body=b"\n\x04\x10\x07\x18\x00")
            refused += self.unheard(one, attach + commit)
        return f"{self.count(1000)} attaches and commits of invented transfers: {refused} answered with a refusal or the end of the connection"

    def kv_hello(self, me, to):
        one = socket.create_connection(("127.0.0.1", self.cluster.port(to)), timeout=10)
        incarnation = int(self.cluster.incarnations()[to])
        body = struct.pack("<H", 1) + name(me) + struct.pack("<Q", 1) + name(to) + struct.pack("<Q", incarnation)
        one.sendall(KV_MAGIC + guarded(body))
        return one

    def unheard(self, one, data):
        """True unless something was accepted."""
        try:
            one.sendall(data)
            one.shutdown(socket.SHUT_WR)
            heard = b""
            while piece := one.recv(4096):
                heard += piece
        except OSError:
            heard = b""
        finally:
            one.close()
        frames = heard[kv_ack_bytes(heard):]
        kinds = {frames[at] for at in range(0, len(frames) - 47, 48)}
        return not kinds & {ATTACHED, ACK, COMMIT_ACK}

    def replayed(self):
        """Whole KV connections, recorded at a proxy, sent again byte for byte."""
        replays, refused = 0, 0
        for target, recorded in list(RECORDED):
            for _ in range(5):
                one = socket.create_connection(target, timeout=10)
                refused += self.unheard(one, recorded)
                replays += 1
        return f"{replays} replays of {len(RECORDED)} recorded connections, commits included: {refused} got nothing accepted"


RECORDED = []
KV_MAGIC = b"\xf7TDMKV\r\n"
ATTACH, COMMIT, ATTACHED, ACK, COMMIT_ACK = 1, 3, 17, 18, 19


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def entry(n):
    for _ in range(8):
        n = n >> 1 ^ 0x82F63B78 * (n & 1)
    return n


TABLE = [entry(n) for n in range(256)]


def name(text):
    return bytes([len(text)]) + text.encode()


def guarded(body):
    whole = struct.pack("<H", len(body)) + body
    return whole + struct.pack("<I", crc32c(whole))


def kv_frame(kind, transfer, body):
    head = struct.pack("<BBHIII16sQI", kind, 0, 0, len(body), 0, crc32c(body), transfer, 0, 0)
    return head + struct.pack("<I", crc32c(head)) + body


def kv_ack_bytes(heard):
    """Length of the answer to a hello."""
    return 2 + struct.unpack("<H", heard[:2])[0] + 4 if len(heard) >= 2 else 0


def is_closed(one, piece):
    """Says the piece; whether the server has closed the connection. For sockets that do not block."""
    try:
        one.send(piece)
        while one.recv(1 << 16):
            pass
        return True
    except BlockingIOError:
        return False
    except OSError:
        return True


class Recorder(Proxy):
    """Keeps what senders say on KV connections."""

    def pump(self, source, sink, direction, plane):
        if plane == "kv" and direction == "in":
            recorded = bytearray()
            receive = source.recv

            class Tap:
                def recv(self, count):
                    piece = receive(count)
                    recorded.extend(piece)
                    return piece

                def shutdown(self, how):
                    RECORDED.append((target, bytes(recorded)))
                    source.shutdown(how)
            target = self.target
            return super().pump(Tap(), sink, direction, plane)
        return super().pump(source, sink, direction, plane)


def run(options):
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    cluster = Cluster(options.tandem, options.model, options.base)
    proxies = []
    for number, worker in enumerate(["decode-0", "decode-1"]):
        listen = ("127.0.0.1", options.base + 51 + number)
        cluster.advertise[worker] = f"{listen[0]}:{listen[1]}"
        proxies.append(Recorder(listen, ("127.0.0.1", cluster.port(worker)), number))
    attacks, rows, fine = Attacks(cluster, options.scale), [], True
    try:
        cluster.start()
        honest = Honest(cluster)
        # Something to replay: transfers under way when their connections end.
        cluster.ask([{"id": str(i), "text": f"{i} ships. " + "The water was dark. " * 20} for i in range(4)], tokens=4)
        for proxy in proxies:
            proxy.cut_all("kv")
        before = cluster.memory("router-0")
        for what, attack in attacks.all.items():
            if options.only and options.only not in what:
                continue
            honest = Honest(cluster)
            honest.start()
            said = attack()
            honest.over.set()
            honest.join()
            memory = cluster.memory("router-0") - before
            ok = not honest.bad and memory < MEMORY_MIB and fetch(f"http://{cluster.at('router-0')}/health") is not None
            fine &= ok
            rows.append((what, said, f"{honest.answers} answers, {len(honest.bad)} wrong or refused, slowest {honest.slowest:.1f} s", f"{memory:+} MiB"))
            print(*rows[-1], honest.bad[:1], sep=" | ", file=sys.stderr, flush=True)
        blocks = cluster.leaked()
    finally:
        cluster.stop()
    print("| attack | outcome | an honest client meanwhile | router's memory after |\n|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(f"leaked blocks: {blocks or 'none'}")
    conclude(cluster, fine and not blocks)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tandem", default="target/release/tandem")
    parser.add_argument("--model", required=True)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--only", default="", help="only attacks with this word in their name")
    parser.add_argument("--base", type=int, default=25000, help="first port")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
