"""Every limit that the core keeps: what the caller sees, that it is counted by its name, and what the access line says.

Limits that only the walk knows are with it (tests/unit/gateway, tests/process/test_errors.py); limits per address need
an address that is not loopback (tests/process/test_limits.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from ascproxy import _native
from ascproxy.clock import monotonic_ns
from ascproxy.telemetry import metrics
from tests.contract.test_core_tls import Pki
from tests.kit.rig import Answer, Rig, Script, post, read_answer, read_request, run, until

CHAT = {"model": "m", "messages": []}
S = 1_000_000_000
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
CHUNKED = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
PART = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{"


async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        await read_request(reader)
        writer.write(OK)


def saying(data: bytes) -> Script:
    """An upstream that says this and then nothing."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(data)
        await reader.read()

    return script


def trips(rig: Rig) -> dict[str, int]:
    """What was counted, by reason."""
    found = {}
    for key, first, _ in rig.page.records():
        kind, _, name = key.partition(metrics.SEPARATOR)
        if kind == metrics.LIMITS and rig.page.load(first):
            found[name.decode()] = rig.page.load(first)
    return found


def lines(rig: Rig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in rig.core.take_log().splitlines()]


def test_every_limit_has_a_cell_from_the_start() -> None:
    async def main() -> None:
        async with Rig(answers) as rig:
            keys = {key for key, _, cells in rig.page.records() if cells == 1}
            assert keys == {metrics.LIMITS + metrics.SEPARATOR + name.encode() for name in _native.LIMIT_NAMES}

    run(main())


# name -> (limits of the listener, what is sent, status)
REQUESTS: dict[str, tuple[dict[str, int], bytes, int]] = {
    "header_timeout": ({"header_timeout_ms": 200}, b"POST /v1/chat", 408),
    "body_idle": ({"body_idle_ms": 200}, PART, 408),
    "body_total": ({"body_total_ms": 200}, PART, 408),
    "max_request_line": ({"max_request_line": 64}, b"GET /" + b"a" * 90, 414),
    "max_field": ({"max_field": 64}, b"GET / HTTP/1.1\r\nHost: a\r\nx: " + b"a" * 90, 431),
    "max_head": ({"max_head": 128}, b"GET / HTTP/1.1\r\nHost: a\r\n" + b"x: abcdefghij\r\n" * 9, 431),
    "max_fields": ({"max_fields": 4}, b"GET / HTTP/1.1\r\nHost: a\r\n" + b"x: y\r\n" * 4, 431),
    "max_body": ({"max_body": 99}, PART, 413),
    "max_bodies": ({"max_bodies": 1_000}, PART, 503),
    "max_chunk_extension": ({"max_chunk_extension": 8}, CHUNKED + b"1;abcdefghi\r\n", 400),
    "max_chunk_extensions": ({"max_chunk_extensions": 8}, CHUNKED + b"1;abcde\r\n{\r\n1;abcd\r\n", 400),
    "max_trailers": ({"max_trailers": 8}, CHUNKED + b"1\r\n{\r\n0\r\na: bcdefg\r\n", 400),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_over_a_limit_is_refused_counted_and_in_the_log(name: str) -> None:
    changes, data, status = REQUESTS[name]

    async def main() -> None:
        async with Rig(answers, **changes) as rig:
            reader, writer = await rig.client()
            writer.write(data)
            answer = await read_answer(reader)
            assert (answer.status, answer.fields["connection"]) == (status, "close")
            assert await reader.read() == b""
            assert trips(rig) == {name: 1}
            (line,) = lines(rig)
            assert (line["status"], line["limit"], line["code"]) == (status, name, rig.walk.rejects[0])
            writer.close()

    run(main())


@pytest.mark.parametrize("name", ["max_chunk_extension", "max_chunk_extensions", "max_trailers"])
def test_a_chunked_body_at_its_limits_passes(name: str) -> None:
    async def main() -> None:
        limits = {"max_chunk_extension": 8, "max_chunk_extensions": 12, "max_trailers": 9}
        async with Rig(answers, **limits) as rig:
            reader, writer = await rig.client()
            writer.write(CHUNKED + b"1;abcdefgh\r\n{\r\n1;abcd\r\n}\r\n0\r\na: bcdefg\r\n\r\n")
            assert (await read_answer(reader)).status == 200
            assert name not in trips(rig)
            assert "limit" not in lines(rig)[0]
            writer.close()

    run(main())


def test_a_body_slower_than_its_rate_is_refused_after_ten_seconds_of_it() -> None:
    async def main() -> None:
        async with Rig(answers, body_min_rate=1_000) as rig:
            rig.ticking = False
            reader, writer = await rig.client()
            writer.write(PART)
            await until(lambda: rig.core.in_flight == 1, "the request has begun")
            rig.core.tick(monotonic_ns() + 9 * S)
            assert trips(rig) == {}
            rig.core.tick(monotonic_ns() + 11 * S)
            assert (await read_answer(reader)).status == 408
            assert trips(rig) == {"body_min_rate": 1}
            assert lines(rig)[0]["limit"] == "body_min_rate"
            writer.close()

    run(main())


def test_a_connection_without_a_request_ends_in_silence() -> None:
    async def main() -> None:
        async with Rig(answers, idle_timeout_ms=200) as rig:
            reader, writer = await rig.client()
            assert await reader.read() == b""
            assert trips(rig) == {"idle_timeout": 1}
            assert lines(rig) == []
            writer.close()

    run(main())


def test_a_handshake_that_stalls_is_counted_and_not_logged(tmp_path: Path) -> None:
    async def main() -> None:
        async with Rig(answers, server_tls=Pki(tmp_path).server(), tls_handshake_ms=200) as rig:
            reader, writer = await rig.client()
            writer.write(b"\x16\x03\x01")
            assert await reader.read() == b""
            assert trips(rig) == {"tls_handshake": 1}
            assert lines(rig) == []
            writer.close()

    run(main())


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Answer:
    writer.write(post(CHAT))
    return await read_answer(reader)


def test_the_last_answer_of_a_connection_says_so() -> None:
    async def main() -> None:
        async with Rig(answers, connection_requests=3) as rig:
            reader, writer = await rig.client()
            said = [(await ask(reader, writer)).fields.get("connection") for _ in range(3)]
            assert said == [None, None, "close"]
            assert trips(rig) == {"connection_requests": 1}
            writer.close()

    run(main())


def test_an_old_connection_is_let_go_with_its_next_answer_and_ages_differ() -> None:
    async def main() -> None:
        async with Rig(answers, connection_age_ms=300) as rig:
            loop = asyncio.get_running_loop()
            ages = []
            for _ in range(6):
                reader, writer = await rig.client()
                began = loop.time()
                while (await ask(reader, writer)).fields.get("connection") is None:
                    await asyncio.sleep(0.001)
                ages.append(loop.time() - began)
                writer.close()
            assert trips(rig) == {"connection_age": 6}
            assert min(ages) >= 0.26, "90 % of 300 ms, and what passed between accepting and the first request"
            assert len({round(age, 3) for age in ages}) > 1, "connections that begin together must not end together"

    run(main())


def test_a_client_that_takes_nothing_is_cut() -> None:
    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 100000000\r\n\r\n")
        while True:
            writer.write(b"x" * 65_536)
            await writer.drain()

    async def main() -> None:
        async with Rig(flood, write_stall_ms=300) as rig:
            loop = asyncio.get_running_loop()
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                client.setblocking(False)
                await loop.sock_connect(client, ("127.0.0.1", rig.port))
                await loop.sock_sendall(client, post(CHAT))
                await until(lambda: bool(rig.walk.settled), "it is cut")
            assert trips(rig) == {"write_stall": 1}
            line = lines(rig)[0]
            assert (line["limit"], line["outcome"]) == ("write_stall", "write_stall")

    run(main())


def test_connections_over_the_cap_are_closed_and_counted() -> None:
    async def main() -> None:
        async with Rig(answers, max_connections=2) as rig:
            clients = [await rig.client() for _ in range(2)]
            await until(lambda: rig.core.connections == 2, "both are in")
            reader, writer = await rig.client()
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
            assert trips(rig) == {"max_connections": 1}
            writer.close()
            for each in clients:
                assert (await ask(*each)).status == 200
                each[1].close()
            assert len(lines(rig)) == 2, "there is no line without a request"

    run(main())


# ---- upstreams -----------------------------------------------------------------------------------------------------

BEGUN = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'
STREAM = BEGUN + b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
HUGE = b"HTTP/1.1 200 OK\r\nx: " + b"y" * 20_000 + b"\r\n\r\n"

# case -> (the limit, deadlines of the plan, what the upstream says, status)
UPSTREAMS: dict[str, tuple[str, dict[str, int], bytes, int]] = {
    "silent": ("first_byte", {"first_byte_ms": 200}, b"", 502),
    "silent for too long": ("total", {"total_ms": 200}, b"", 502),
    "falls silent": ("between_tokens", {"idle_ms": 200}, STREAM, 200),
    "falls silent for too long": ("total", {"total_ms": 200}, STREAM, 200),
    "a head too large": ("max_field", {}, HUGE, 502),
    "an extension too large": ("max_chunk_extension", {}, STREAM + b"1;" + b"e" * 300, 200),
}


@pytest.mark.parametrize("case", UPSTREAMS)
def test_an_upstream_over_a_limit_is_counted_and_in_the_log(case: str) -> None:
    name, deadlines, said, status = UPSTREAMS[case]

    async def main() -> None:
        async with Rig(saying(said)) as rig:
            rig.walk.plan = rig.make_plan(**deadlines)
            reader, writer = await rig.client()
            writer.write(post(CHAT | {"stream": True}))
            await until(lambda: bool(rig.walk.settled), "it is over")
            assert rig.walk.settled[0]["status"] == status
            assert trips(rig) == {name: 1}
            assert lines(rig)[0]["limit"] == name
            writer.close()
            del reader

    run(main())


# ---- overload ------------------------------------------------------------------------------------------------------


def test_the_first_step_lets_callers_go_with_their_answer() -> None:
    async def main() -> None:
        async with Rig(answers) as rig:
            reader, writer = await rig.client()
            assert "connection" not in (await ask(reader, writer)).fields
            rig.core.overload = 1
            answer = await ask(reader, writer)
            assert (answer.status, answer.fields["connection"]) == (200, "close")
            assert await reader.read() == b""
            assert trips(rig) == {"memory_keep_alive": 1}
            writer.close()

    run(main())


@pytest.mark.parametrize("data", [post(CHAT), PART, CHUNKED], ids=["whole", "part", "chunked"])
def test_the_second_step_refuses_before_anything_is_kept(data: bytes) -> None:
    async def main() -> None:
        async with Rig(answers) as rig:
            rig.core.overload = 2
            reader, writer = await rig.client()
            writer.write(data)
            answer = await read_answer(reader)
            assert (answer.status, answer.fields["connection"]) == (503, "close")
            assert await reader.read() == b""
            assert (rig.walk.rejects, rig.walk.heads, rig.upstream_connections) == (["overloaded"], 0, 0)
            assert trips(rig) == {"memory_refuse": 1}
            (line,) = lines(rig)
            assert (line["limit"], line["code"], line["path"]) == (
                "memory_refuse", "overloaded", "/v1/chat/completions",
            )  # fmt: skip
            writer.close()

    run(main())


def test_what_is_under_way_ends_well_whatever_the_step() -> None:
    async def main() -> None:
        async with Rig(answers) as rig:
            reader, writer = await rig.client()
            request = post(CHAT)
            writer.write(request[:-3])
            await until(lambda: rig.core.in_flight == 1, "the request has begun")
            rig.core.overload = 3
            writer.write(request[-3:])
            assert (await read_answer(reader)).status == 200
            assert trips(rig) == {"memory_accept": 1}
            rig.core.overload = 3
            rig.core.overload = 0
            assert trips(rig) == {"memory_accept": 1}, "counted when it is entered"
            assert "connection" not in (await ask(reader, writer)).fields
            writer.close()

    run(main())


@pytest.mark.parametrize("step", [-1, 4, "1", None])
def test_a_step_that_is_none_is_refused(step: Any) -> None:
    async def main() -> None:
        async with Rig(answers) as rig:
            with pytest.raises((ValueError, TypeError)):
                rig.core.overload = step
            assert rig.core.overload == 0

    run(main())


def test_networks_that_are_none_are_refused() -> None:
    async def main() -> None:
        async with Rig(answers) as rig:
            for wrong in ((b"\0" * 4, 8), (b"\0" * 16, 129)):
                with pytest.raises(ValueError, match="trusted_peers"):
                    _native.Core(walk=rig.walk, page=rig.page, limits=rig.limits, trusted_peers=(wrong,))

    run(main())
