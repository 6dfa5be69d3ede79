"""Log lines."""

from __future__ import annotations

import os
import socket

import orjson

from ascproxy.telemetry.log import MAX_LINE, Level, Log
from ascproxy.telemetry.outlet import Outlet


def written(readable: bool, write: object) -> bytes:
    read, end = os.pipe()
    outlet = Outlet(end)
    write(Log("supervisor", outlet=outlet, readable=readable, wall_ns=lambda: 1_700_000_000_123_000_000))  # type: ignore[operator]
    outlet.close()
    os.close(end)
    with os.fdopen(read, "rb") as lines:
        return lines.read()


def test_a_line_is_one_json_object() -> None:
    line = written(False, lambda log: log.warning("worker exited", slot=3, why=["a", "b"]))
    assert orjson.loads(line) == {
        "time": "2023-11-14T22:13:20.123+00:00",
        "level": "warning",
        "process": "supervisor",
        "message": "worker exited",
        "slot": 3,
        "why": ["a", "b"],
    }


def test_a_terminal_is_not_driven_by_what_a_peer_sent() -> None:
    line = written(True, lambda log: log.error("bad", reason="x\x1b[2Jy"))
    assert b"reason=x\\x1b[2Jy" in line
    assert line.count(b"\x1b") == 2  # our own colour and its end


def test_levels_and_names() -> None:
    assert written(False, lambda log: log.debug("no")) == b""
    line = written(False, lambda log: log.named("worker-1").info("yes"))
    assert orjson.loads(line)["process"] == "worker-1"
    assert Level.INFO < Level.ERROR


def test_a_line_never_exceeds_what_a_pipe_writes_at_once() -> None:
    line = written(False, lambda log: log.info("m" * 9000, field="f" * 9000))
    assert len(line) <= MAX_LINE
    assert orjson.loads(line)["message"].endswith("...")


def test_a_full_sink_drops_and_counts() -> None:
    read, end = os.pipe()
    log = Log("x", outlet=Outlet(end), readable=False)
    while not log.dropped:
        log.info("m" * 2000)
    assert log.dropped == 1
    os.close(read)
    os.close(end)


def test_a_full_socket_drops_too_and_stays_blocking_for_others() -> None:
    read, end = socket.socketpair()
    log = Log("x", outlet=Outlet(end.fileno()), readable=False)
    while not log.dropped:
        log.info("m" * 2000)
    assert end.getblocking()
    assert read.recv(10) == b'{"time":"2'
    read.close()
    end.close()
