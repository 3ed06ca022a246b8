"""A proxy before a worker's one address: delays, cuts, corrupts and swallows, by plane and direction, by a seed.

The first byte of a connection tells its plane: `kv` begins with the transport's magic, `rpc` is router or worker speaking HTTP/2.
"""

import random
import socket
import threading
import time

KV_MAGIC = 0xF7  # kv-transport/src/wire.rs
PIECE = 1 << 16


class Harm:
    """What is done to one plane. All off at first; may be changed while connections run.

    delay     seconds that every piece waits
    corrupt   bytes between two flipped bits, on average; 0 is none
    cut       bytes after which a connection breaks, on average; 0 is never
    swallow   "in" (towards the worker) or "out": that direction's bytes go nowhere, the connection stays open
    """

    def __init__(self):
        self.heal()
        self.flipped = self.cuts = self.swallowed = 0

    def heal(self):
        self.delay, self.corrupt, self.cut, self.swallow = 0.0, 0, 0, None


class Proxy:
    """Listens on `listen` and passes connections on to `target`, both (host, port)."""

    def __init__(self, listen, target, seed):
        self.target, self.chance = target, random.Random(seed)
        self.harm = {"kv": Harm(), "rpc": Harm()}
        self.connections = set()
        self.listener = socket.create_server(listen, backlog=128)
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def serve(self, client):
        try:
            first = client.recv(1, socket.MSG_PEEK)
            worker = socket.create_connection(self.target, timeout=5)
        except OSError:
            client.close()
            return
        worker.settimeout(None)
        for side in (client, worker):
            side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        plane = "kv" if first[:1] == bytes([KV_MAGIC]) else "rpc"
        pair = (plane, client, worker)
        self.connections.add(pair)
        back = threading.Thread(target=self.pump, args=(worker, client, "out", plane), daemon=True)
        back.start()
        self.pump(client, worker, "in", plane)
        back.join()
        self.connections.discard(pair)
        client.close()
        worker.close()

    def pump(self, source, sink, direction, plane):
        harm = self.harm[plane]
        try:
            while piece := source.recv(PIECE):
                if harm.delay:
                    time.sleep(harm.delay)
                if harm.swallow == direction:
                    harm.swallowed += len(piece)
                    continue
                if self.strikes(len(piece), harm.cut):
                    harm.cuts += 1
                    sink.sendall(piece[: self.chance.randrange(len(piece))])
                    break
                if self.strikes(len(piece), harm.corrupt):
                    harm.flipped += 1
                    piece = bytearray(piece)
                    piece[self.chance.randrange(len(piece))] ^= 1 << self.chance.randrange(8)
                sink.sendall(piece)
        except OSError:
            pass
        for side in (source, sink):
            try:
                side.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def strikes(self, length, every):
        return bool(every) and self.chance.random() < length / every

    def cut_all(self, plane):
        """Breaks every connection of a plane now."""
        for other, client, worker in list(self.connections):
            if other == plane:
                self.harm[plane].cuts += 1
                for side in (client, worker):
                    try:
                        side.shutdown(socket.SHUT_RDWR)
                    except OSError:
                        pass

    def heal(self):
        for harm in self.harm.values():
            harm.heal()

    def close(self):
        self.listener.close()
