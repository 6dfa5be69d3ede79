"""A model server that remembers every byte that reached it, and answers each request with the same few words.

It believes nothing: what it reads is kept raw, so that a test can say that nothing came, or exactly what.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading

from tests.kit.rig import free_port

BODY = b'{"object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"seen"}}]}'
GOOD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
LENGTH = re.compile(rb"\r\ncontent-length: (\d+)\r\n", re.IGNORECASE)


class Witness:
    """``with Witness() as witness``: listens at ``witness.url``; ``connections`` were accepted so far; ``answer`` is
    what each request gets."""

    def __init__(self) -> None:
        self.connections = 0
        self.answer = GOOD
        self._seen = bytearray()
        self._lock = threading.Lock()
        self._open: list[socket.socket] = []
        self._listening = socket.create_server(("127.0.0.1", free_port()), backlog=256)
        self.port: int = self._listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._accepting = threading.Thread(target=self._accept, daemon=True)

    def take(self) -> bytes:
        """All bytes since the last call."""
        with self._lock:
            seen = bytes(self._seen)
            self._seen.clear()
        return seen

    def push(self, data: bytes) -> int:
        """Say something unasked on every connection; on how many it went."""
        pushed = 0
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.sendall(data)
                pushed += 1
        return pushed

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed at the end
            while True:
                connection, _ = self._listening.accept()
                self.connections += 1
                self._open.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        waiting = b""
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(65536):
                with self._lock:
                    self._seen += data
                waiting += data
                while (rest := _behind_one(waiting)) is not None:
                    waiting = rest
                    connection.sendall(self.answer)

    def __enter__(self) -> Witness:
        self._accepting.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _behind_one(data: bytes) -> bytes | None:
    """What is behind the first whole request, None when there is none yet."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return None
    length = LENGTH.search(data, 0, end + 2)
    behind = end + 4 + (int(length[1]) if length else 0)
    return data[behind:] if behind <= len(data) else None
