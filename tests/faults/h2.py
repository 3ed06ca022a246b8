"""HTTP/2 by hand, as much as a hostile client needs: frames and headers, nothing checked."""

import socket
import struct

DATA, HEADERS, RESET, SETTINGS, PING, GOAWAY, WINDOW, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, END_HEADERS = 1, 4
GENERATE = "/tandem.v1.Inference/Generate"


def frame(kind, flags, stream, body=b""):
    return struct.pack(">I", len(body))[1:] + struct.pack(">BBI", kind, flags, stream) + body


def header(name, value):
    """A literal that is not indexed, without Huffman's code; shorter than 127 bytes each."""
    return b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


def call(stream, path=GENERATE, flags=END_HEADERS):
    headers = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "router", "te": "trailers",
               "content-type": "application/grpc"}
    return frame(HEADERS, flags, stream, b"".join(header(*pair) for pair in headers.items()))


def message(body, length=None):
    """A gRPC message, or the beginning of one that says it were longer."""
    return b"\0" + struct.pack(">I", len(body) if length is None else length) + body


def varint(n):
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def generate(text, tokens):
    """A GenerateRequest: the text and how many tokens, greedy, to their end."""
    sampling = struct.pack("<Bf", 1 << 3 | 5, 0.0) + bytes([9 << 3]) + varint(tokens) + bytes([13 << 3, 1])
    return bytes([2 << 3 | 2]) + varint(len(text)) + text + bytes([5 << 3 | 2]) + varint(len(sampling)) + sampling


class Connection:
    """A connection that has said hello."""

    def __init__(self, address, timeout=30):
        self.socket = socket.create_connection(address, timeout=timeout)
        # A window so large that the server never waits for us.
        settings = struct.pack(">HI", 4, (1 << 31) - 1)
        self.socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0, settings) + frame(SETTINGS, 1, 0))
        self.held = b""

    def send(self, data):
        self.socket.sendall(data)

    def receive(self):
        """The next frame: kind, flags, stream, body. None at the end. Pings are answered."""
        while True:
            head = self.take(9)
            if head is None:
                return None
            length = int.from_bytes(head[:3], "big")
            kind, flags, stream = struct.unpack(">BBI", head[3:])
            body = self.take(length)
            if body is None:
                return None
            if kind == PING and not flags & 1:
                self.send(frame(PING, 1, 0, body))
                continue
            return kind, flags, stream, body

    def take(self, count):
        while len(self.held) < count:
            try:
                piece = self.socket.recv(1 << 16)
            except ConnectionError:
                return None
            if not piece:
                return None
            self.held += piece
        taken, self.held = self.held[:count], self.held[count:]
        return taken

    def close(self):
        self.socket.close()
