"""Notifications that cannot be delivered."""

from __future__ import annotations

import socket
from pathlib import Path

from ascproxy.net.notify import Notifier


def test_without_a_manager_nothing_is_sent_and_nothing_fails() -> None:
    notifier = Notifier({"WATCHDOG_USEC": "1000000"}, 1)
    assert notifier.watchdog_ns is None
    notifier.ready("x")
    notifier.close()


def test_a_manager_that_is_gone_or_does_not_read_never_stops_us(tmp_path: Path) -> None:
    path = tmp_path / "notify"
    gone = Notifier({"NOTIFY_SOCKET": str(path)}, 1)
    gone.ready("x")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        full = Notifier({"NOTIFY_SOCKET": str(path)}, 1)
        for _ in range(5_000):  # a datagram socket holds a few hundred at most
            full.watchdog()
        assert manager.recv(100) == b"WATCHDOG=1"
    gone.close()
    full.close()


def test_the_watchdog_is_ours_only_with_our_pid() -> None:
    given = {"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "3000000"}
    assert Notifier(given, 7).watchdog_ns == 1_500_000_000
    assert Notifier({**given, "WATCHDOG_PID": "7"}, 7).watchdog_ns == 1_500_000_000
    assert Notifier({**given, "WATCHDOG_PID": "8"}, 7).watchdog_ns is None
    assert Notifier({**given, "WATCHDOG_USEC": "soon"}, 7).watchdog_ns is None
