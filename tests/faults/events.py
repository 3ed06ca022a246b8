"""Where the events of all processes arrive, one after the other: each process waits at its event for the answer."""

import socketserver
import threading

# As in failpoints/src/lib.rs.
EVENTS = ["received", "admitted", "placed", "reserved", "prefill-started", "layer-pushed", "committed", "token"]


class Events:
    """Listens on a port of its own. `on(pid, event, index, about)` decides while the process stands at its event."""

    def __init__(self):
        self.on = lambda pid, event, index, about: None
        lock = threading.Lock()
        events = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self):
                try:
                    pid, event, index, about = self.rfile.readline().decode().rstrip("\n").split(" ", 3)
                    with lock:
                        events.on(int(pid), event, int(index), about)
                    self.wfile.write(b"go\n")
                except (ValueError, ConnectionError):
                    pass  # It was killed while it asked.

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads, request_queue_size, allow_reuse_address = True, 128, True

        self.server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def environment(self):
        host, port = self.server.server_address
        return {"FAILPOINTS": ";".join(f"{event}=return({host}:{port})" for event in EVENTS)}

    def close(self):
        self.server.shutdown()
        self.server.server_close()
