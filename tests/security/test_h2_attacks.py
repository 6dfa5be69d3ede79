"""Known attacks on HTTP/2 servers: each ends within its bound, and a caller on another connection notices nothing.

What is sent is made frame by frame: a library would refuse to. Incidents are named where a class of attack is known by
one (docs/decisions/0012-http2.md says what counts, and why it is counted before nghttp2 sees it).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import hpack
import hyperframe.frame as frames
import pytest

from tests.contract.test_core_h2 import CALM, PROTOCOL, Held, answers
from tests.contract.test_core_limits import trips
from tests.kit.frames import Client
from tests.kit.rig import Rig, read_request, run, until

COMPRESSION, FLOW, SIZE, CLOSED = 9, 3, 6, 5
HEAD = [(":method", "POST"), (":scheme", "http"), (":authority", "gateway"), (":path", "/v1/chat/completions")]


MORE = hpack.Encoder().encode([("x", "y" * 200)])
PAUSE = b""  # what came before is answered, so that no limit of streams is met


def headers(stream: int, fields: list[tuple[str, str]] = HEAD, *flags: str) -> frames.HeadersFrame:
    """A head without references to the dynamic table, so that any number of them can be made at once."""
    return frames.HeadersFrame(stream, hpack.Encoder().encode(fields, huffman=False), flags=flags or ("END_HEADERS",))


def request(stream: int) -> frames.HeadersFrame:
    return headers(stream, HEAD, "END_HEADERS", "END_STREAM")


def unknown(stream: int = 0) -> bytes:
    return b"\0\0\0\x42\0" + stream.to_bytes(4, "big")


def reset(stream: int) -> frames.RstStreamFrame:
    return frames.RstStreamFrame(stream, 8)


def rapid_reset() -> Iterator[frames.Frame | bytes]:  # CVE-2023-44487
    for n in range(1, 2_000, 2):
        yield request(n)
        yield reset(n)


def made_you_reset(*after: Callable[[int], frames.Frame | bytes]) -> Callable[[], Iterator[frames.Frame | bytes]]:
    """CVE-2025-8671: what makes the server reset the stream that it has begun to work for."""

    def attack() -> Iterator[frames.Frame | bytes]:
        for n in range(1, 2_000, 2):
            yield request(n) if after[0] is not more_than_declared else headers(n, [*HEAD, ("content-length", "1")])
            for each in after:
                yield each(n)
            if n % 50 == 49:
                yield PAUSE

    return attack


def zero_increment(stream: int) -> bytes:
    return b"\0\0\4\x08\0" + stream.to_bytes(4, "big") + bytes(4)


def window_overflow(stream: int) -> bytes:
    return b"\0\0\4\x08\0" + stream.to_bytes(4, "big") + b"\x7f\xff\xff\xff"


def more_than_declared(stream: int) -> frames.Frame:
    return frames.DataFrame(stream, b"xx")


def malformed() -> Iterator[frames.Frame | bytes]:
    for n in range(1, 2_000, 2):
        yield headers(n, [*HEAD, ("connection", "close")], "END_HEADERS", "END_STREAM")
        if n % 50 == 49:
            yield PAUSE


def continuations(n: int, payload: bytes) -> Callable[[], Iterator[frames.Frame]]:  # CVE-2024-27316 and its kin
    def attack() -> Iterator[frames.Frame]:
        yield frames.HeadersFrame(1, hpack.Encoder().encode(HEAD), flags=())
        for _ in range(n):
            yield frames.ContinuationFrame(1, payload)

    return attack


def that_we_reset() -> Iterator[frames.Frame | bytes]:
    """A stream whose next frames might have been on their way."""
    yield headers(1, [*HEAD, ("connection", "close")])
    yield PAUSE


def continuations_of_a_closed_stream() -> Iterator[frames.Frame | bytes]:
    """nghttp2 ignores them, and tells nobody."""
    yield from that_we_reset()
    yield frames.HeadersFrame(1, hpack.Encoder().encode(HEAD), flags=())
    for _ in range(20):
        yield frames.ContinuationFrame(1, hpack.Encoder().encode([("x", "y" * 100)]))


def hpack_bomb() -> Iterator[frames.Frame]:  # CVE-2016-6581
    """One entry that fills the table, then a byte for each time that it is named."""
    entry = hpack.Encoder().encode([*HEAD, ("x", "y" * 3_900)], huffman=False)
    yield frames.HeadersFrame(1, entry + b"\xbe" * 12_000, flags=("END_HEADERS", "END_STREAM"))


def table_churn() -> Iterator[frames.Frame]:
    """A head whose fields are the shortest there are."""
    yield frames.HeadersFrame(1, hpack.Encoder().encode(HEAD) + b"\x8f" * 15_000, flags=("END_HEADERS",))


def settings(n: int, entries: int = 1) -> Callable[[], Iterator[frames.Frame | bytes]]:  # CVE-2019-9515
    def attack() -> Iterator[frames.Frame | bytes]:
        payload = b"\0\4\0\0\xff\xff" * entries
        for _ in range(n):
            yield len(payload).to_bytes(3, "big") + b"\4\0\0\0\0\0" + payload

    return attack


def pings() -> Iterator[frames.Frame]:  # CVE-2019-9512
    for _ in range(100):
        yield frames.PingFrame(0, b"12345678")


def priorities() -> Iterator[frames.Frame]:  # CVE-2019-9513
    for n in range(400):
        yield frames.PriorityFrame(2 * n + 1, depends_on=0, stream_weight=n % 255)


def priorities_of_streams() -> Iterator[frames.Frame]:
    """One for each stream is free, so that they cannot be counted by streams alone."""
    for n in range(1, 200, 2):
        yield request(n)
        for _ in range(3):
            yield frames.PriorityFrame(n, depends_on=0, stream_weight=5)


def empty_data(padded: bool) -> Callable[[], Iterator[frames.Frame]]:  # CVE-2019-9518
    def attack() -> Iterator[frames.Frame]:
        yield headers(1)
        for _ in range(50):
            data = frames.DataFrame(1, b"", flags=("PADDED",) if padded else ())
            data.pad_length = 100 if padded else 0
            yield data

    return attack


def of_nothing(frame: Callable[[int], frames.Frame | bytes]) -> Callable[[], Iterator[frames.Frame | bytes]]:
    def attack() -> Iterator[frames.Frame | bytes]:
        for n in range(3_000):
            yield frame(n)

    return attack


def data_of_a_closed_stream() -> Iterator[frames.Frame | bytes]:
    yield from that_we_reset()
    for _ in range(3_000):
        yield frames.DataFrame(1, b"x")


def too_many_streams() -> Iterator[frames.Frame]:
    """More than we allow, before the client has read what we allow."""
    for n in range(1, 2 * 600, 2):
        yield headers(n)


@dataclass(frozen=True)
class Attack:
    make: Callable[[], Iterator[frames.Frame | bytes]]
    trip: str
    code: int = CALM
    limits: dict[str, int] = field(default_factory=dict)
    most: int = 0  # upstream connections it may have cost


ATTACKS = {
    "rapid reset": Attack(rapid_reset, "h2_resets", most=201),
    "a window too large": Attack(made_you_reset(window_overflow), "h2_resets", most=201),
    "more data than declared": Attack(made_you_reset(more_than_declared), "h2_resets"),
    "malformed requests": Attack(malformed, "h2_resets"),
    "CONTINUATION without end": Attack(continuations(1_000, MORE), "h2_continuations"),
    "empty CONTINUATION": Attack(continuations(2, b""), "h2_continuations"),
    "CONTINUATION of a closed stream": Attack(continuations_of_a_closed_stream, "h2_continuations"),
    "HPACK bomb": Attack(hpack_bomb, "max_head"),
    "a head of short fields": Attack(table_churn, "max_fields"),
    "SETTINGS": Attack(settings(100), "h2_settings"),
    "empty SETTINGS": Attack(settings(100, 0), "h2_settings"),
    "settings in one frame": Attack(settings(1, 33), "h2_settings_entries"),
    "PING": Attack(pings, "h2_pings"),
    "PRIORITY": Attack(priorities, "h2_priorities"),
    "PRIORITY of streams": Attack(priorities_of_streams, "h2_priorities", most=100),
    "empty DATA": Attack(empty_data(padded=False), "h2_empty_data"),
    "padding alone": Attack(empty_data(padded=True), "h2_empty_data"),
    "unknown frames": Attack(of_nothing(lambda n: unknown()), "h2_glitches"),
    "unknown frames of streams": Attack(of_nothing(lambda n: unknown(2 * n + 1)), "h2_glitches"),
    "WINDOW_UPDATE": Attack(of_nothing(lambda n: frames.WindowUpdateFrame(0, 1)), "h2_glitches"),
    "PING answers that nobody asked for": Attack(
        of_nothing(lambda n: frames.PingFrame(0, b"12345678", flags=("ACK",))), "h2_glitches"
    ),
    "GOAWAY": Attack(of_nothing(lambda n: frames.GoAwayFrame(0)), "h2_glitches"),
    "DATA of a closed stream": Attack(data_of_a_closed_stream, "h2_glitches"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_ends_in_its_bound_and_nobody_else_notices(name: str) -> None:
    attack = ATTACKS[name]

    async def main() -> None:
        async with Rig(answers, **attack.limits) as rig, Client(rig.port) as good, Client(rig.port) as bad:
            assert (await good.answer(good.ask({"model": "m"}))).status == 200
            before = rig.upstream_connections
            await bad.until(lambda: bool(bad.events), "SETTINGS")
            ended = asyncio.create_task(bad.ended())
            for frame in attack.make():
                bad.raw(frame)
                if frame == PAUSE:
                    assert (await good.answer(good.ask({"model": "m"}))).status == 200
            for _ in range(5):
                assert (await good.answer(good.ask({"model": "m"}))).status == 200
            assert await ended == attack.code
            assert trips(rig).get(attack.trip) == 1
            assert set(trips(rig)) <= {attack.trip, "h2_streams"}
            assert rig.upstream_connections - before <= attack.most
            await until(lambda: rig.core.in_flight == 0, "nothing of it is left")
            assert rig.core.body_bytes == 0
            assert (await good.answer(good.ask({"model": "m"}))).status == 200
            assert good.goaway is None

    run(main())


def test_the_requests_that_an_attack_ends_say_so() -> None:
    async def main() -> None:
        held = Held()
        async with Rig(held) as rig, Client(rig.port) as c:
            await c.until(lambda: bool(c.events), "SETTINGS")
            c.ask({"model": "m"})
            await until(lambda: held.asked == 1, "a request is under way")
            c.raw(*pings())
            assert await c.ended() == CALM
            await until(lambda: held.gone == 1, "its upstream is closed")
            (line,) = [json.loads(each) for each in rig.core.take_log().splitlines()]
            assert (line["limit"], line["outcome"], line["status"]) == ("h2_pings", "client_gone", 499)
            assert trips(rig) == {"h2_pings": 1}

    run(main())


def test_streams_beyond_the_limit_are_refused_and_cost_nothing() -> None:
    async def main() -> None:
        async with Rig(answers, h2_streams=10) as rig, Client(rig.port) as c:
            for n in range(1, 2 * 30, 2):
                c.raw(headers(n))
            await until(lambda: rig.core.in_flight == 10, "as many as are allowed")
            await until(lambda: trips(rig).get("h2_streams", 0) == 20, "the others are refused")
            assert rig.upstream_connections == 0

    run(main())


def test_streams_beyond_the_limit_without_end_are_an_attack() -> None:
    async def main() -> None:
        async with Rig(answers) as rig, Client(rig.port) as c:
            c.raw(*too_many_streams())
            assert await c.ended() in (CALM, PROTOCOL)
            await until(lambda: rig.core.in_flight == 0, "nothing of it is left")

    run(main())


# What breaks the protocol itself ends the connection, too: GOAWAY with its own code (h2spec has many more).
BROKEN: dict[str, tuple[Callable[[], Iterator[frames.Frame | bytes]], int]] = {
    "a stream of ours": (lambda: iter([headers(2)]), PROTOCOL),
    "a stream that goes back": (lambda: iter([request(5), request(3)]), PROTOCOL),
    "DATA after the end": (lambda: iter([request(1), PAUSE, frames.DataFrame(1, b"x")]), CLOSED),
    "DATA after a reset": (lambda: iter([headers(1), reset(1), frames.DataFrame(1, b"x")]), CLOSED),
    "HEADERS after the end": (lambda: iter([request(1), PAUSE, request(1)]), CLOSED),
    "HEADERS after a reset": (lambda: iter([headers(1), reset(1), request(1)]), CLOSED),
    "a priority below itself": (lambda: iter([frames.PriorityFrame(1, depends_on=1)]), PROTOCOL),
    "a priority of no stream": (lambda: iter([b"\0\0\5\2\0\0\0\0\0\0\0\0\1\5"]), PROTOCOL),
    "DATA before HEADERS": (lambda: iter([frames.DataFrame(1, b"x")]), PROTOCOL),
    "DATA of no stream": (lambda: iter([b"\0\0\1\0\0\0\0\0\0x"]), PROTOCOL),
    "CONTINUATION alone": (lambda: iter([frames.ContinuationFrame(1, b"x")]), PROTOCOL),
    "a frame in a head": (lambda: iter([headers(1, HEAD, "END_STREAM"), frames.PingFrame(0, b"1" * 8)]), PROTOCOL),
    "a frame too large": (lambda: iter([b"\0\x40\1\0\0\0\0\0\1" + b"x" * 16_385]), SIZE),
    "PUSH_PROMISE": (lambda: iter([b"\0\0\4\5\4\0\0\0\1\0\0\0\2"]), PROTOCOL),
    "broken HPACK": (lambda: iter([frames.HeadersFrame(1, b"\xff" * 5, flags=("END_HEADERS",))]), COMPRESSION),
    "more than the window of the connection": (lambda: iter([frames.WindowUpdateFrame(0, (1 << 31) - 1)]), FLOW),
    "a window of nothing more": (lambda: iter([request(1), zero_increment(1)]), PROTOCOL),
    "a PING of seven bytes": (lambda: iter([b"\0\0\7\6\0\0\0\0\0" + b"1" * 7]), SIZE),
    "an odd SETTINGS": (lambda: iter([b"\0\0\5\4\0\0\0\0\0" + b"1" * 5]), SIZE),
    "DATA that is all padding and more": (lambda: iter([headers(1), b"\0\0\2\0\x08\0\0\0\1\x09x"]), PROTOCOL),
    "RST_STREAM of an idle stream": (lambda: iter([reset(7)]), PROTOCOL),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_protocol_ends_the_connection_with_its_code(name: str) -> None:
    make, code = BROKEN[name]

    async def main() -> None:
        async with Rig(answers) as rig, Client(rig.port) as c:
            await c.until(lambda: bool(c.events), "SETTINGS")
            for frame in make():
                c.raw(frame)
                if frame == PAUSE:
                    await until(lambda: len(rig.walk.settled) == 1, "it is over")
            assert await c.ended() == code
            await until(lambda: rig.core.in_flight == 0 and rig.core.connections == 0, "it is gone")

    run(main())


def test_a_reader_that_takes_a_byte_at_a_time_is_cut_off() -> None:  # CVE-2019-9511, data dribble
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b"x" * 100_000)
        await reader.read()

    async def main() -> None:
        async with Rig(script) as rig, Client(rig.port, window=0, acknowledge=False) as c:
            stream = c.ask({"model": "m"})
            await c.until(lambda: c.streams[stream].status == 200, "the head")
            for _ in range(1_200):
                c.raw(frames.WindowUpdateFrame(stream, 1))
            got = 0
            data = b""
            while chunk := await asyncio.wait_for(c.reader.read(65_536), 10):
                data += chunk
            while data:
                frame, length = frames.Frame.parse_frame_header(memoryview(data[:9]))
                if isinstance(frame, frames.GoAwayFrame):
                    frame.parse_body(memoryview(data[9 : 9 + length]))
                    got = frame.error_code
                data = data[9 + length :]
            assert got == CALM
            assert trips(rig) == {"h2_glitches": 1}
            assert rig.walk.settled[0]["outcome"] == "client_gone"

    run(main())


def test_windows_that_answers_call_for_are_no_attack() -> None:
    """Clients that open the window after each frame send more WINDOW_UPDATE in a second than are forgiven."""

    async def main() -> None:
        async with Rig(answers, h2_glitches=10, h2_glitches_rate=1) as rig, Client(rig.port, acknowledge=False) as c:
            for _ in range(100):
                stream = c.ask({"model": "m"})
                c.raw(frames.WindowUpdateFrame(stream, 100))
                assert (await c.answer(stream)).status == 200
                c.raw(frames.WindowUpdateFrame(0, 2), frames.WindowUpdateFrame(stream, 2))
            assert trips(rig) == {}

    run(main())
