"""The access log's sink: whole lines or none, counted, never blocking."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ascproxy.errors import AscproxyError
from ascproxy.telemetry.outlet import Outlet
from ascproxy.worker import accesslog
from ascproxy.worker.accesslog import Sink

LINE = b'{"path":"/v1/chat/completions","status":200,"n":%d}' + b" " * 900 + b"\n"


def pipe() -> tuple[int, Sink]:
    read, write = os.pipe()
    os.set_blocking(read, False)
    sink = Sink(Outlet(write), readable=False)
    assert os.get_blocking(write)  # it is not ours alone
    os.close(write)
    return read, sink


def drain(read: int) -> bytes:
    data = b""
    while True:
        try:
            part = os.read(read, 1 << 16)
        except BlockingIOError:
            return data
        data += part


def test_a_full_sink_drops_whole_lines_and_counts_them() -> None:
    read, sink = pipe()
    sent, received = 0, b""
    for batch in range(40):
        sink.write(b"".join(LINE % (10 * batch + i) for i in range(10)))
        sent += 10
        if batch in (25, 33):
            received += drain(read)
    received += drain(read)
    sink.write(LINE % sent)  # first finishes what was torn
    received += drain(read)
    lines = received.splitlines(keepends=True)
    numbers = [int(line.split(b'"n":')[1].split(b"}")[0]) for line in lines]
    assert all(line == LINE % number for line, number in zip(lines, numbers, strict=True))
    assert numbers == sorted(set(numbers))
    assert sink.dropped > 0
    assert len(lines) + sink.dropped == sent + 1


def test_a_reader_that_went_away_costs_lines_only() -> None:
    read, sink = pipe()
    os.close(read)
    sink.write(LINE % 1)
    assert sink.dropped == 1


def test_files_are_appended_to_and_none_is_no_sink(tmp_path: Path) -> None:
    for n in (1, 2):
        sink = accesslog.open_sink(str(tmp_path / "access.log"))
        assert sink is not None
        sink.write(LINE % n)
        sink.close()
    assert (tmp_path / "access.log").read_bytes() == LINE % 1 + LINE % 2
    assert accesslog.open_sink("none") is None
    with pytest.raises(AscproxyError, match="cannot write access_log"):
        accesslog.open_sink(str(tmp_path / "missing" / "access.log"))


def test_a_terminal_gets_a_line_to_read_without_control_characters() -> None:
    shown = accesslog.render(b'{"status":502,"method":"POST","path":"/v1/\\u001b[2J","code":"upstream_failed","ms":3}')
    assert shown.startswith(accesslog.RED.encode() + b"POST /v1/\\x1b[2J 502 upstream_failed")
    assert b"ms=3" in shown
    assert accesslog.render(b"not json") == b"not json\n"
