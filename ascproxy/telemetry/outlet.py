"""Writing to a descriptor that others hold too, without ever waiting.

O_NONBLOCK belongs to the open file and not to the descriptor: set on the terminal, pipe or socket that a process was
started with, it would surprise the shell and everybody else who writes there. So a terminal or pipe is opened anew, a
socket is written with MSG_DONTWAIT, and a regular file is written as it is.
"""

from __future__ import annotations

import os
import socket
import stat

FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


class Outlet:
    """Standard output or error, or any descriptor like them. ``terminal``: a person may be reading."""

    def __init__(self, descriptor: int) -> None:
        self.terminal = os.isatty(descriptor)
        mode = os.fstat(descriptor).st_mode
        self._socket = socket.socket(fileno=os.dup(descriptor)) if stat.S_ISSOCK(mode) else None
        self._descriptor = descriptor
        self._opened = False
        if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
            try:
                self._descriptor = os.open(f"/proc/self/fd/{descriptor}", FLAGS)
                self._opened = True
            except OSError:  # a terminal of another user, say: written as it is
                self._descriptor = descriptor

    @classmethod
    def appending(cls, path: str) -> Outlet:
        """A file, made if it is not there. Raises OSError."""
        descriptor = os.open(path, FLAGS | os.O_CREAT, 0o640)
        outlet = cls.__new__(cls)
        outlet.terminal, outlet._socket, outlet._descriptor, outlet._opened = False, None, descriptor, True
        return outlet

    def write(self, data: bytes) -> int:
        """Write what goes at once; the bytes written. Raises OSError: BlockingIOError when nothing does."""
        if self._socket is not None:
            return self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        return os.write(self._descriptor, data)

    def close(self) -> None:
        """Close what was opened here; the given descriptor stays."""
        if self._socket is not None:
            self._socket.close()
        if self._opened:
            os.close(self._descriptor)
