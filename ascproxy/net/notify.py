"""What the service manager is told, and what it asks for (sd_notify(3), sd_watchdog_enabled(3)). Never blocks."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping


class Notifier:
    """Sends state to ``NOTIFY_SOCKET``; without one it does nothing.

    ``watchdog_ns`` is how often to call :meth:`watchdog`, half of what the manager allows; None if it does not watch.
    """

    def __init__(self, environment: Mapping[str, str], pid: int) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) if address else None
        if self._socket is not None:
            self._socket.setblocking(False)
        watched = environment.get("WATCHDOG_PID", str(pid)) == str(pid)
        usec = environment.get("WATCHDOG_USEC", "")
        self.watchdog_ns = int(usec) * 1000 // 2 if address and watched and usec.isdecimal() else None

    def ready(self, status: str) -> None:
        self._send("READY=1", f"STATUS={status}")

    def reloading(self, now_ns: int) -> None:
        """``now_ns`` is monotonic: the manager matches READY to it (Type=notify-reload)."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={now_ns // 1000}")

    def stopping(self, status: str) -> None:
        self._send("STOPPING=1", f"STATUS={status}")

    def status(self, status: str) -> None:
        self._send(f"STATUS={status}")

    def watchdog(self) -> None:
        self._send("WATCHDOG=1")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()

    def _send(self, *lines: str) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):  # a manager that does not listen must not stop the service
                self._socket.sendto("\n".join(lines).encode(), self._address)
