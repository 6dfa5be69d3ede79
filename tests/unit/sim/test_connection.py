"""A connection on a loop that the test turns by hand: what is written in which turn, and when."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import orjson
import pytest

from ascproxy.sim.connection import Connection
from ascproxy.sim.server import Server
from ascproxy.sim.settings import Settings

WIRE = Path(__file__).parents[2] / "wire"
RECORDED = (WIRE / "vllm-chat-stream.response.txt").read_bytes()
REPLAY = b"GET / HTTP/1.1\r\nHost: a\r\nx-sim-wire: chat-stream\r\n\r\n"


class Handle:
    def __init__(self, due: float, call: Callable[[], None]) -> None:
        self.due, self.call, self.cancelled = due, call, False

    def cancel(self) -> None:
        self.cancelled = True


class Loop:
    """A clock that moves to the next timer, one callback a turn."""

    def __init__(self) -> None:
        self.now = 0.0
        self.handles: list[Handle] = []

    def time(self) -> float:
        return self.now

    def call_at(self, due: float, call: Callable[[], None]) -> Handle:
        handle = Handle(due, call)
        self.handles.append(handle)
        return handle

    def call_later(self, delay: float, call: Callable[[], None]) -> Handle:
        return self.call_at(self.now + delay, call)

    def call_soon(self, call: Callable[[], None]) -> Handle:
        return self.call_at(self.now, call)

    def turn(self) -> bool:
        self.handles = [handle for handle in self.handles if not handle.cancelled]
        if not self.handles:
            return False
        handle = min(self.handles, key=lambda one: one.due)
        self.handles.remove(handle)
        self.now = max(self.now, handle.due)
        handle.call()
        return True


class Transport:
    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.written: list[tuple[float, bytes]] = []
        self.closed = False

    def get_extra_info(self, name: str) -> None:
        return None

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.written.append((self.loop.now, data))

    def close(self) -> None:
        self.closed = True

    def bytes(self) -> bytes:
        return b"".join(data for _, data in self.written)


def connected(**settings: Any) -> tuple[Connection, Transport, Loop, Server]:
    given = Settings(recordings=WIRE, **settings)
    server = Server(given, wall=lambda: 1795418401.0, entropy=bytes)
    loop = Loop()
    transport = Transport(loop)
    connection = Connection(server, cast(asyncio.AbstractEventLoop, loop))
    connection.connection_made(cast(asyncio.Transport, transport))
    return connection, transport, loop, server


def chat(**members: object) -> bytes:
    body = orjson.dumps({"messages": [], "stream": True, **members})
    fields = b"Host: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    return b"POST /v1/chat/completions HTTP/1.1\r\n" + fields + body


@pytest.mark.parametrize("split", [1, 2, 100, 3206, 3207, 9999])
def test_split_writes_one_piece_a_turn(split: int) -> None:
    connection, transport, loop, _ = connected(split=split)
    connection.data_received(REPLAY)
    turns = 0
    while transport.bytes() != RECORDED:
        assert len(transport.written) == turns + 1, "the transport joins what is written in one turn"
        assert loop.turn()
        turns += 1
    assert [len(data) for _, data in transport.written[:-1]] == [split] * (len(transport.written) - 1)
    assert len(transport.written) == -(-len(RECORDED) // split)


def test_gap_keeps_the_pieces_apart() -> None:
    connection, transport, loop, _ = connected(split=1000, gap=0.25)
    connection.data_received(REPLAY)
    while transport.bytes() != RECORDED:
        assert loop.turn()
    assert [when for when, _ in transport.written] == [0.0, 0.25, 0.5, 0.75]


def test_a_paused_transport_gets_nothing_and_resumes_where_it_was() -> None:
    connection, transport, loop, _ = connected(split=1000)
    connection.data_received(REPLAY)
    connection.pause_writing()
    while loop.turn():
        pass
    assert transport.bytes() == RECORDED[:1000]
    connection.resume_writing()
    while transport.bytes() != RECORDED:
        assert loop.turn()


def test_tokens_come_at_their_rate_and_late_turns_do_not_add_up() -> None:
    connection, transport, loop, server = connected(rate=10.0, tokens=4)
    connection.data_received(chat())
    assert [data.count(b"data: ") for _, data in transport.written] == [1]  # head and role frame at once
    loop.now = 0.15  # the first wake-up is late
    for due in (0.2, 0.3, 0.4):
        loop.turn()
        assert server.gauges.running == 1
        assert min(handle.due for handle in loop.handles if not handle.cancelled) == pytest.approx(due)
    loop.turn()
    assert transport.bytes().endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert loop.now == pytest.approx(0.4)
    assert (server.gauges.running, server.gauges.generated()) == (0, 4)


def test_an_idle_connection_is_closed_after_five_seconds_and_not_before() -> None:
    connection, transport, loop, _ = connected(rate=0)
    connection.data_received(chat())
    done = loop.now
    loop.turn()
    assert transport.closed and loop.now == done + 5.0


def test_a_new_request_stops_the_idle_timer() -> None:
    connection, transport, loop, server = connected(rate=0)
    for _ in range(3):
        connection.data_received(chat())
        loop.now += 4.9
    assert not transport.closed and server.gauges.requests == 3
    assert sum(not handle.cancelled for handle in loop.handles) == 1


def test_half_a_unary_answer_counts_the_tokens_made_so_far() -> None:
    connection, transport, loop, server = connected(rate=10.0, tokens=100)
    connection.data_received(chat(stream=False))
    loop.now = 2.0
    assert server.gauges.generated() == 20 and transport.bytes() == b""
    assert connection.eof_received() is False
    loop.now = 9.0
    gauges = server.gauges
    assert (gauges.generated(), gauges.running, gauges.aborted, gauges.connections_open) == (20, 0, 1, 0)
    assert not loop.turn()


def test_a_body_without_a_content_type_is_refused() -> None:
    """As a real vLLM does: its check has no default."""
    connection, transport, _, _ = connected(rate=0)
    connection.data_received(chat().replace(b"Content-Type: application/json\r\n", b""))
    assert transport.bytes().startswith(b"HTTP/1.1 400 ")
    assert b"Unsupported Media Type: Only 'application/json' is allowed" in transport.bytes()
