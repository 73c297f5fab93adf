"""A TCP proxy that counts: what the sockets between nodes and server really carry, TLS and HTTP included."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress


class Meter:
    """Listens on `port` and passes everything on to `target`. `up` and `down` are the bytes so far, from
    those who connect and to them."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target, self.up, self.down = target, 0, 0
        self.lock = threading.Lock()
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.server.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                near, _ = self.server.accept()
                threading.Thread(target=self.join, args=(near,), daemon=True).start()

    def join(self, near: socket.socket) -> None:
        try:
            far = socket.create_connection(self.target)
        except OSError:
            near.close()
            return
        ways = (near, far, "up"), (far, near, "down")
        threads = [threading.Thread(target=self.pump, args=way, daemon=True) for way in ways]
        for thread in threads:
            thread.start()

    def pump(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        with suppress(OSError):
            while block := source.recv(2**16):
                sink.sendall(block)
                with self.lock:
                    setattr(self, way, getattr(self, way) + len(block))
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.server.close()
