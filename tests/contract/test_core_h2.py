"""HTTP/2 from clients (decision 12): the same exchanges as with HTTP/1.1, several on one connection."""

from __future__ import annotations

import asyncio
import json
import ssl
from pathlib import Path
from typing import Any

import h2.errors
import hyperframe.frame as frames
import pytest

from ascproxy import _native
from ascproxy.clock import monotonic_ns
from ascproxy.gateway.rewrite import endings
from ascproxy.wire.operation import Scan
from tests.contract.test_core_events import END, HEAD, STREAM, chunk, delta, event, usage
from tests.contract.test_core_limits import lines, trips
from tests.contract.test_core_pressure import Flood, marker
from tests.contract.test_core_proxy import GOOD, proxied, told
from tests.contract.test_core_tls import Pki
from tests.contract.test_core_tls_clients import Partners
from tests.kit.certificates import Files, trusting
from tests.kit.frames import PREFACE, Client
from tests.kit.rig import Forwarder, Rig, post, read_answer, read_request, run, settled_at, until

CHAT = {"model": "m", "messages": []}
S = 1_000_000_000
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
DONE = b"data: [DONE]\n\n"
CALM = int(h2.errors.ErrorCodes.ENHANCE_YOUR_CALM)
PROTOCOL = int(h2.errors.ErrorCodes.PROTOCOL_ERROR)
INTERNAL = int(h2.errors.ErrorCodes.INTERNAL_ERROR)
CANCEL = int(h2.errors.ErrorCodes.CANCEL)


async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        await read_request(reader)
        writer.write(OK)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        _, body = await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))


class Held:
    """An upstream that answers when it is told to, and knows how many of its connections are gone."""

    def __init__(self, head: bytes = b"") -> None:
        self.head = head
        self.go = asyncio.Event()
        self.asked = self.gone = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        self.asked += 1
        writer.write(self.head)
        end = asyncio.create_task(reader.read())
        ready = asyncio.create_task(self.go.wait())
        await asyncio.wait([end, ready], return_when=asyncio.FIRST_COMPLETED)
        if self.go.is_set():
            writer.write(OK)
        await end
        self.gone += 1


# ---- one exchange --------------------------------------------------------------------------------------------------


def test_an_exchange_takes_the_same_walk() -> None:
    seen: list[bytes] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head, body = await read_request(reader)
            seen.append(head + body)
            writer.write(
                b"HTTP/1.1 201 Created\r\nContent-Type: text/plain\r\nX-Back: b\r\nSet-Cookie: c=1\r\n"
                b"Connection: x-back\r\nKeep-Alive: timeout=5\r\nTransfer-Encoding: chunked\r\n\r\n"
                b"3\r\nabc\r\n0\r\nx-trailer: t\r\n\r\n"
            )

    async def main() -> None:
        async with Rig(script) as rig, Client(rig.port) as c:
            await c.answer(c.ask(CHAT))
            calls = rig.core.calls
            head = c.head(
                x_pass_me="yes", x_drop_me="no", cookie="a=b", x_request_id="mine", content_type="application/json"
            )
            stream = c.ask(CHAT, head)
            answer = await c.answer(stream)
            assert (answer.status, answer.body, answer.ended) == (201, b"abc", True)
            assert answer.fields.pop("date")
            assert answer.fields == {"content-type": "text/plain", "x-back": "b", "x-request-id": "mine"}
            assert rig.core.calls - calls == 2, "on_request and on_settle, as with HTTP/1.1"
            assert rig.walk.heads == 0
            head_sent = seen[-1].partition(b"\r\n\r\n")[0].split(b"\r\n")[3:]
            assert sorted(head_sent) == [
                b"content-length: 30", b"content-type: application/json", b"x-pass-me: yes", b"x-request-id: mine",
            ]  # fmt: skip
            line = lines(rig)[-1]
            assert (line["http"], line["method"], line["path"], line["status"], line["outcome"]) == (
                "2", "POST", "/v1/chat/completions", 201, "complete",
            )  # fmt: skip

    run(main())


def test_a_credential_and_a_query_are_found_where_they_are_in_http1() -> None:
    seen: list[tuple[Any, ...]] = []

    class Looks(Forwarder):
        def on_request(self, s: _native.Stream) -> None:
            seen.append(
                (s.method, s.path, s.query, s.credential, s.header("x-pass-a"), s.model, s.header("host"), s.peer[:9])
            )
            seen.append((s.content_length,))
            s.respond(200, b"", b"")

    async def main() -> None:
        async with Rig(answers, walk=Looks()) as rig:
            async with Client(rig.port) as c:
                head = c.head("/v1/messages?beta=true", authorization="Bearer k", x_pass_a="b")
                assert (await c.answer(c.ask(CHAT, head))).status == 200
            reader, writer = await rig.client()
            writer.write(post(CHAT, "Authorization: Bearer k", "x-pass-a: b", path="/v1/messages?beta=true"))
            assert (await read_answer(reader)).status == 200
            writer.close()
            assert seen[0] == seen[2]
            assert seen[0][1:4] == (b"/v1/messages", b"beta=true", b"k")
            assert (seen[1], seen[3]) == ((-1,), (30,)), "no content-length: its length is not known"

    run(main())


@pytest.mark.parametrize("size", [0, 1, 16_384, 65_535, 65_536, 1_000_000])
def test_bodies_of_any_length_pass_in_both_directions(size: int) -> None:
    async def main() -> None:
        async with Rig(echo) as rig, Client(rig.port) as c:
            body = json.dumps("x" * size).encode()
            stream = c.begin(c.head(content_length=str(len(body))))
            sent = 0
            while sent < len(body):
                await c.until(lambda: c.h2.local_flow_control_window(stream) > 0, "the window opens")
                n = min(c.h2.local_flow_control_window(stream), c.h2.max_outbound_frame_size, len(body) - sent)
                c.h2.send_data(stream, body[sent : sent + n])
                sent += n
                c.flush()
            c.h2.end_stream(stream)
            c.flush()
            answer = await c.answer(stream)
            assert (answer.status, answer.body == body) == (200, True)
            assert answer.fields["content-length"] == str(len(body))

    run(main())


@pytest.mark.parametrize(
    ("said", "method"),
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n", "POST"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "POST"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n", "HEAD"),
    ],
    ids=["204", "empty", "HEAD"],
)
def test_an_answer_without_a_body_ends_with_its_head(said: bytes, method: str) -> None:
    async def main() -> None:
        async with Rig(one(said)) as rig, Client(rig.port) as c:
            stream = c.begin(c.head(method=method), end=True)
            answer = await c.answer(stream)
            assert (answer.body, answer.ended, answer.reset) == (b"", True, None)
            assert rig.walk.settled[0]["outcome"] == "complete"
            assert not any(isinstance(e, h2.events.DataReceived) for e in c.events)

    run(main())


def one(said: bytes) -> Any:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(said)
        await reader.read()

    return script


def test_an_expectation_is_answered_before_the_body() -> None:
    async def main() -> None:
        async with Rig(echo) as rig, Client(rig.port) as c:
            stream = c.begin(c.head(expect="100-continue", content_length="2"))
            await c.until(lambda: bool(c.streams[stream].informational), "100")
            assert c.streams[stream].informational == [100]
            c.h2.send_data(stream, b"{}", end_stream=True)
            c.flush()
            assert (await c.answer(stream)).body == b"{}"
            assert rig.walk.heads == 1

    run(main())


def test_trailers_end_a_request_and_are_not_passed_on() -> None:
    async def main() -> None:
        async with Rig(echo) as rig, Client(rig.port) as c:
            stream = c.begin(c.head())
            c.h2.send_data(stream, b"{}")
            c.h2.send_headers(stream, [("x-pass-trailer", "t")], end_stream=True)
            c.flush()
            answer = await c.answer(stream)
            assert (answer.status, answer.body) == (200, b"{}")
            c.h2.send_headers(second := c.begin(c.head()), [("x", "y" * 9_000)], end_stream=True)
            c.flush()
            assert (await c.answer(second)).status == 400
            assert trips(rig) == {"max_trailers": 1}

    run(main())


# ---- how a connection begins ---------------------------------------------------------------------------------------


def test_the_preface_may_come_byte_by_byte() -> None:
    async def main() -> None:
        async with Rig(answers) as rig:
            async with Client(rig.port) as c:
                await c.until(lambda: bool(c.events), "SETTINGS")  # a first connection, whole
            reader, writer = await rig.client()
            for byte in PREFACE:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0)
            writer.write(frames.SettingsFrame(0).serialize())
            header = await reader.readexactly(9)
            assert header[3] == frames.SettingsFrame.type
            writer.close()

    run(main())


@pytest.mark.parametrize("start", [b"PRI * HTTP/2.0\r\n\r\nSX", b"PRI * HTTP/2.0\r\nHost: a\r\n\r\n", b"PRI /x"])
def test_what_only_looks_like_the_preface_is_a_bad_request(start: bytes) -> None:
    async def main() -> None:
        async with Rig(answers) as rig:
            reader, writer = await rig.client()
            writer.write(start + b" " * 20 + b"\r\n\r\n")
            assert (await read_answer(reader)).status == 400
            writer.close()

    run(main())


def test_the_preface_is_known_only_at_the_start_and_where_it_is_switched_on() -> None:
    async def main() -> None:
        async with Rig(answers) as rig:
            reader, writer = await rig.client()
            writer.write(post(CHAT))
            assert (await read_answer(reader)).status == 200
            writer.write(PREFACE)
            assert (await read_answer(reader)).status == 400
            writer.close()
        async with Rig(answers, http2=False) as rig:
            reader, writer = await rig.client()
            writer.write(PREFACE)
            assert (await read_answer(reader)).status == 400
            writer.close()

    run(main())


def test_behind_a_proxy_header_the_caller_is_who_it_names() -> None:
    header, caller = GOOD[next(iter(GOOD))]

    async def main() -> None:
        async with proxied() as rig:
            c = Client(rig.port)
            c.before = header
            async with c:
                assert (await c.answer(c.ask(CHAT))).status == 200
            assert told(rig) == [caller]
            assert (lines(rig)[0]["client"], trips(rig)) == (caller, {})

    run(main())


def test_over_tls_the_protocol_is_what_both_agreed_on(tmp_path: Path) -> None:
    pki = Pki(tmp_path)

    async def main() -> None:
        async with Rig(echo, server_tls=pki.server(alpn=(b"h2", b"http/1.1"))) as rig:
            context = pki.trusting()
            context.set_alpn_protocols(["h2"])
            async with Client(rig.port, tls=context) as c:
                for size in (2, 5_000, 60_000):
                    answer = await c.answer(c.ask(body := json.dumps("x" * size).encode()))
                    assert (answer.status, answer.body == body) == (200, True)
                many = [c.ask({"model": "m", "n": n}) for n in range(20)]
                for n, stream in enumerate(many):
                    assert json.loads((await c.answer(stream)).body)["n"] == n
            for offered in (["http/1.1"], []):
                context = pki.trusting()
                if offered:
                    context.set_alpn_protocols(offered)
                reader, writer = await asyncio.open_connection(
                    "127.0.0.1", rig.port, ssl=context, server_hostname="localhost"
                )
                writer.write(post(CHAT))
                assert (await read_answer(reader)).status == 200
                writer.write(PREFACE)
                assert (await read_answer(reader)).status == 400
                writer.close()
        async with Rig(echo, server_tls=pki.server()) as rig:
            context = pki.trusting()
            context.set_alpn_protocols(["h2"])
            with pytest.raises(ssl.SSLError, match="no application protocol"):
                await asyncio.open_connection("127.0.0.1", rig.port, ssl=context, server_hostname="localhost")

    run(main())


def test_a_client_that_is_not_trusted_any_more_gets_no_further_request(tmp_path: Path) -> None:
    partners = Partners(tmp_path)
    late = partners.ca.issue("late.example", common="late", client=True)
    alpn = {"alpn": (b"h2",)}

    def showing(client: Files) -> ssl.SSLContext:
        context = trusting(partners.ca, "1.3", client)
        context.set_alpn_protocols(["h2"])
        return context

    async def main() -> None:
        async with (
            Rig(echo, server_tls=partners.context(**alpn)) as rig,
            Client(rig.port, tls=showing(partners.good)) as stays,
            Client(rig.port, tls=showing(late)) as goes,
        ):
            for c in (stays, goes):
                assert (await c.answer(c.ask(CHAT))).status == 200
            partners.crl.write_bytes(partners.ca.revoke(partners.revoked, late))
            rig.listener.tls = partners.context(**alpn)
            assert (await stays.answer(stays.ask(CHAT))).status == 200
            served = len(rig.walk.seen_certificates)
            refused = goes.ask(CHAT)
            assert await goes.ended() == 0
            assert (goes.streams[refused].status, goes.streams[refused].reset) == (0, INTERNAL)
            assert len(rig.walk.seen_certificates) == served
            assert (await stays.answer(stays.ask(CHAT))).status == 200

    run(main())


# ---- many at a time ------------------------------------------------------------------------------------------------


def test_streams_of_a_connection_do_not_wait_for_each_other() -> None:
    async def main() -> None:
        held = Held()

        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            if b"x-pass-slow" in head:
                reader.feed_data(b"")
                await reader.readexactly(30)
                held.asked += 1
                await held.go.wait()
                writer.write(OK)
                return
            while True:
                await reader.readexactly(30)
                writer.write(OK)
                await reader.readuntil(b"\r\n\r\n")

        async with Rig(script) as rig, Client(rig.port) as c:
            slow = [c.ask(CHAT, c.head(x_pass_slow=str(n))) for n in range(40)]
            await until(lambda: held.asked == 40, "all of them are under way")
            assert rig.core.in_flight == 40
            for _ in range(10):
                assert (await c.answer(c.ask(CHAT))).status == 200
            assert not any(c.streams[n].over for n in slow)
            held.go.set()
            for n in slow:
                assert (await c.answer(n)).body == b"{}"
            assert len({line["request_id"] for line in lines(rig)}) == 50

    run(main())


def test_each_answer_reaches_the_stream_that_asked() -> None:
    async def main() -> None:
        async with Rig(echo) as rig, Client(rig.port) as c:
            for round_ in range(5):
                asked = {c.ask({"model": "m", "n": [round_, n]}): [round_, n] for n in range(100)}
                for stream, n in asked.items():
                    assert json.loads((await c.answer(stream)).body)["n"] == n
            assert all(s["outcome"] == "complete" for s in rig.walk.settled)

    run(main())


# ---- flow control --------------------------------------------------------------------------------------------------


def test_a_stream_whose_window_is_shut_is_felt_upstream_and_holds_up_no_other() -> None:
    async def main() -> None:
        flood = Flood(chunks=400, size=10_000)

        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if rig.upstream_connections == 1:
                await flood(reader, writer)
            else:
                await answers(reader, writer)

        async with Rig(script, upstream_rcvbuf=65_536, upstream_sndbuf=16_384) as rig, Client(rig.port) as c:
            c.acknowledge = False
            stalled = c.ask(CHAT)
            await c.until(lambda: len(c.streams[stalled].body) == 65_535, "all that its window takes")
            c.h2.increment_flow_control_window(1 << 20)  # of the connection
            c.flush()
            await until(lambda: rig.core.paused == 1, "the stream is blocked")
            held = await settled_at(lambda: flood.sent)
            assert held <= 65_535 + 16_384 + 3 * 65_536, "its window, one read, and what the kernel holds"
            for _ in range(20):
                assert (await c.answer(c.ask(CHAT))).status == 200
            assert len(c.streams[stalled].body) == 65_535
            c.acknowledge = True
            c.h2.increment_flow_control_window(1 << 24)
            c.h2.increment_flow_control_window(1 << 24, stalled)
            c.flush()
            answer = await c.answer(stalled)
            assert answer.body == b"".join(marker(n, 10_000) for n in range(400))
            assert rig.core.paused == 0

    run(main())


def test_a_window_of_nothing_delays_the_body_only() -> None:
    async def main() -> None:
        async with Rig(echo) as rig, Client(rig.port, window=0) as c:
            c.acknowledge = False
            stream = c.ask(CHAT)
            await c.until(lambda: c.streams[stream].status == 200, "the head needs no window")
            assert c.streams[stream].body == b""
            await until(lambda: rig.core.paused == 1, "its body waits")
            for n in range(1, 31):
                c.h2.increment_flow_control_window(1, stream)
                c.flush()
                await c.until(lambda n=n: len(c.streams[stream].body) == n, "one byte more")
            assert (await c.answer(stream)).ended
            assert trips(rig) == {}

    run(main())


def test_a_local_answer_waits_for_the_window_too() -> None:
    async def main() -> None:
        async with Rig(answers, max_body=10) as rig, Client(rig.port, window=5) as c:
            stream = c.ask(CHAT)
            await c.until(lambda: len(c.streams[stream].body) == 5, "what the window takes")
            assert rig.walk.settled == [], "not all of it is with the client"
            c.h2.increment_flow_control_window(100, stream)
            c.flush()
            answer = await c.answer(stream)
            assert (answer.status, answer.body) == (413, b"body_too_large")
            await until(lambda: len(rig.walk.settled) == 1, "settled")

    run(main())


def test_a_socket_that_takes_nothing_stops_every_stream_and_loses_no_byte() -> None:
    async def main() -> None:
        flood = Flood(chunks=300, size=10_000)
        async with Rig(flood, upstream_rcvbuf=65_536, upstream_sndbuf=16_384) as rig, Client(rig.port) as c:
            c.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: (1 << 31) - 1})
            c.h2.increment_flow_control_window((1 << 31) - 65_536)
            c.flush()
            c.writer.transport.pause_reading()
            streams = [c.ask(CHAT) for _ in range(3)]
            await until(lambda: rig.core.paused > 0, "the socket is full")
            held = await settled_at(lambda: flood.sent)
            assert held < 8_000_000
            c.writer.transport.resume_reading()
            for stream in streams:
                answer = await c.answer(stream)
                assert answer.body == b"".join(marker(n, 10_000) for n in range(300))
            assert rig.core.paused == 0

    run(main())


# ---- event streams -------------------------------------------------------------------------------------------------

ASK = b'"include_usage":true,"continuous_usage_stats":true'
CONTENT = [delta(""), delta("a", usage=usage(3, 1)), delta("b", usage=usage(3, 2)), delta("", finish="stop")]
LAST = event(id="c", choices=[], usage=usage(3, 2))
ERROR = event(error={"message": "died", "type": "InternalServerError", "param": None, "code": 500})
STREAMS: dict[str, tuple[list[bytes], bool]] = {
    "complete": ([*CONTENT, LAST, DONE], False),
    "in one piece": ([b"".join([*CONTENT, LAST, DONE])], False),
    "cut in the middle of events": ([x for c in [*CONTENT, LAST, DONE] for x in (c[:20], c[20:])], False),
    "truncated": (CONTENT[:2], True),
    "truncated without a last chunk": (CONTENT[:2], False),
    "truncated in an event": ([*CONTENT[:2], b"data: {"], True),
    "aborted": ([*CONTENT[:2], delta("", finish="abort"), DONE], False),
    "an error after content": ([*CONTENT[:2], ERROR, DONE], False),
    "an error before content": ([CONTENT[0], ERROR, DONE], False),
    "one event longer than what is held": (
        [event(id="c", choices=[{"index": 0, "delta": {"content": "x" * 40_000}}]), DONE],
        False,
    ),
}


@pytest.mark.parametrize("case", STREAMS)
def test_an_event_stream_is_the_same_as_over_http1(case: str) -> None:
    pieces, close = STREAMS[case]

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            writer.write(HEAD)
            for piece in pieces:
                writer.write(chunk(piece))
                await writer.drain()
                await asyncio.sleep(0)
            if close:
                return
            writer.write(END)

    async def main() -> None:
        async with Rig(script) as rig:
            rig.walk.plan = rig.make_plan(ask=ASK, strip=True, endings=endings(Scan.OPENAI))
            reader, writer = await rig.client()
            writer.write(post(STREAM))
            over1 = await read_answer(reader)
            writer.close()
            async with Client(rig.port) as c:
                over2 = await c.answer(c.ask(STREAM))
            assert (over2.status, over2.body) == (over1.status, over1.body)
            assert over2.ended
            first, second = rig.walk.settled
            for fact in ("outcome", "status", "usage", "source", "finish", "attempts"):
                assert first[fact] == second[fact], fact

    run(main())


def test_events_arrive_as_they_come() -> None:
    async def main() -> None:
        go = asyncio.Event()

        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_request(reader)
            writer.write(HEAD + chunk(delta("first")))
            await go.wait()
            writer.write(chunk(delta("second") + DONE) + END)

        async with Rig(script) as rig, Client(rig.port) as c:
            stream = c.ask(STREAM)
            await c.until(lambda: c.streams[stream].body == delta("first"), "the first event")
            go.set()
            assert (await c.answer(stream)).body == delta("first") + delta("second") + DONE

    run(main())


def test_where_http1_breaks_its_framing_the_stream_is_reset() -> None:
    part = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 10\r\n\r\nabc"

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(part)

    async def main() -> None:
        async with Rig(script) as rig, Client(rig.port) as c:
            answer = await c.answer(c.ask(CHAT))
            assert (answer.status, answer.body, answer.reset, answer.ended) == (200, b"abc", INTERNAL, False)
            assert rig.walk.settled[0]["outcome"] == "truncated"
            answer = await c.answer(c.ask(CHAT))
            assert answer.reset == INTERNAL, "the connection goes on"
            assert c.goaway is None
            assert trips(rig) == {}

    run(main())


# ---- who leaves ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begun", [b"", HEAD + chunk(delta("x"))], ids=["before the answer", "in its midst"])
def test_a_reset_cancels_its_upstream_and_no_other(begun: bytes) -> None:
    async def main() -> None:
        held = Held(begun)
        async with Rig(held) as rig, Client(rig.port) as c:
            streams = [c.ask(STREAM) for _ in range(3)]
            await until(lambda: held.asked == 3, "all are under way")
            if begun:
                await c.until(lambda: all(c.streams[s].body for s in streams), "all have begun")
            c.h2.reset_stream(streams[1], CANCEL)
            c.flush()
            await until(lambda: held.gone == 1, "its upstream is closed")
            await until(lambda: len(rig.walk.settled) == 1, "it is settled")
            assert rig.walk.settled[0]["outcome"] == "client_gone"
            assert rig.walk.settled[0]["status"] == (200 if begun else 499)
            assert rig.core.in_flight == 2
            assert held.gone == 1

    run(main())


def test_a_client_that_goes_away_takes_all_its_streams_along() -> None:
    async def main() -> None:
        held = Held()
        async with Rig(held) as rig:
            async with Client(rig.port) as c:
                for _ in range(5):
                    c.ask(CHAT)
                part = c.begin(c.head())
                c.h2.send_data(part, b"{")
                c.flush()
                await until(lambda: held.asked == 5 and rig.core.in_flight == 6, "all are under way")
            await until(lambda: held.gone == 5, "every upstream is closed")
            await until(lambda: len(rig.walk.settled) == 6, "settled")
            assert {s["outcome"] for s in rig.walk.settled} == {"client_gone"}
            await until(lambda: rig.core.connections == 0, "closed")

    run(main())


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_a_refused_body_is_answered_and_not_read_to_its_end() -> None:
    async def main() -> None:
        async with Rig(answers, max_body=1_000) as rig, Client(rig.port) as c:
            stream = c.begin(c.head(content_length="2000"))
            answer = await c.answer(stream)
            assert (answer.status, answer.body) == (413, b"body_too_large")
            await c.until(lambda: answer.reset is not None, "the rest is not wanted")
            assert answer.reset == 0
            c.raw(frames.DataFrame(stream, b"x" * 1_000), frames.DataFrame(stream, b"x" * 1_000, flags={"END_STREAM"}))
            assert (await c.answer(c.ask({"model": "m"}))).status == 200, "the connection goes on"
            assert trips(rig) == {"max_body": 1}
            assert lines(rig)[0]["limit"] == "max_body"

    run(main())


# name -> (limits, fields of the head, status)
HEADS: dict[str, tuple[dict[str, int], dict[str, str], int]] = {
    "max_request_line": ({"max_request_line": 64}, {"path": "/" + "a" * 90}, 414),
    "max_field": ({"max_field": 64}, {"x": "a" * 90}, 431),
    "max_head": ({"max_head": 256}, {f"x-{n}": "abcdefghij" for n in range(30)}, 431),
    "max_fields": ({"max_fields": 4}, {f"x-{n}": "a" for n in range(8)}, 431),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_over_a_limit_is_refused_like_one_of_http1(name: str) -> None:
    changes, fields, status = HEADS[name]

    async def main() -> None:
        async with Rig(answers, **changes) as rig, Client(rig.port) as c:
            answer = await c.answer(c.begin(c.head(**fields), end=True))
            assert answer.status == status
            assert trips(rig) == {name: 1}
            (line,) = lines(rig)
            assert (line["status"], line["limit"]) == (status, name)
            assert (await c.answer(c.ask(CHAT))).status == 200, "the connection goes on"

    run(main())


def pseudo(*more: tuple[str, str], **changes: str) -> list[tuple[str, str]]:
    head = {":method": "POST", ":scheme": "http", ":authority": "gateway", ":path": "/v1/chat/completions"}
    head |= {f":{name}": value for name, value in changes.items()}
    return [(name, value) for name, value in head.items() if value != "-"] + list(more)


MALFORMED: dict[str, list[tuple[str, str]]] = {
    "no method": pseudo(method="-"),
    "no scheme": pseudo(scheme="-"),
    "no path": pseudo(path="-"),
    "an empty path": pseudo(path=""),
    "a pseudo field twice": [*pseudo(), (":path", "/other")],
    "a pseudo field late": [*pseudo(path="-"), ("x", "y"), (":path", "/v1/chat/completions")],
    "an unknown pseudo field": [*pseudo(), (":x", "y")],
    "one of answers": [*pseudo(), (":status", "200")],
    "upper case": pseudo(("X-Upper", "y")),
    "a space in a name": pseudo(("x y", "z")),
    "a colon in a name": pseudo(("x:y", "z")),
    "a line end in a name": pseudo(("x\r\ny", "z")),
    "an empty name": pseudo(("", "z")),
    "CR in a value": pseudo(("x", "y\rz")),
    "LF in a value": pseudo(("x", "y\nz: 1")),
    "NUL in a value": pseudo(("x", "y\0z")),
    "CRLF in the path": pseudo(path="/v1\r\nx: y"),
    "a space in the path": pseudo(path="/v1/ HTTP/1.1"),
    "CRLF in the method": pseudo(method="GET / HTTP/1.1\r\nx: y"),
    "CRLF in the authority": pseudo(authority="a\r\nx: y"),
    "connection": pseudo(("connection", "close")),
    "keep-alive": pseudo(("keep-alive", "timeout=5")),
    "proxy-connection": pseudo(("proxy-connection", "close")),
    "transfer-encoding": pseudo(("transfer-encoding", "chunked")),
    "upgrade": pseudo(("upgrade", "h2c")),
    "te": pseudo(("te", "gzip")),
    "another host": pseudo(("host", "elsewhere")),
    "content-length twice": pseudo(("content-length", "2"), ("content-length", "2")),
    "content-length that is none": pseudo(("content-length", "+2")),
    "less data than content-length": pseudo(("content-length", "3")),
    "more data than content-length": pseudo(("content-length", "1")),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_request_is_reset_before_anybody_is_asked(case: str) -> None:
    async def main() -> None:
        async with Rig(answers) as rig, Client(rig.port) as c:
            stream = c.ask(b"{}", MALFORMED[case])
            answer = await c.answer(stream)
            assert (answer.status, answer.reset) == (0, PROTOCOL)
            assert rig.upstream_connections == 0
            assert rig.core.in_flight == 0
            assert (await c.answer(c.ask(CHAT))).status == 200, "the connection goes on"

    run(main())


# what HTTP/2 allows and our one grammar of requests does not
BAD: dict[str, list[tuple[str, str]]] = {
    "CONNECT": [(":method", "CONNECT"), (":authority", "model:80")],
    "a path that is none": pseudo(method="OPTIONS", path="*"),
    "a fragment": pseudo(path="/v1/chat#x"),
    "bytes outside of ASCII in the path": pseudo(path="/v1/é"),
    "no authority": pseudo(authority="-"),
    "an authority that is none": pseudo(authority="a,b"),
    "a disguised length": pseudo(("content_length", "5")),
    "another expectation": pseudo(("expect", "magic")),
    "a body with GET": pseudo(method="GET"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_http1_refuses_is_refused_here(case: str) -> None:
    async def main() -> None:
        async with Rig(answers) as rig, Client(rig.port) as c:
            stream = c.ask(b"{}", BAD[case])
            answer = await c.answer(stream)
            assert (answer.status, answer.body) in ((400, b"invalid_request"), (0, b""))
            if answer.status == 0:
                assert answer.reset == PROTOCOL
            assert rig.upstream_connections == 0
            assert (await c.answer(c.ask(CHAT))).status == 200

    run(main())


def test_a_host_that_says_the_same_is_sent_once() -> None:
    async def main() -> None:
        async with Rig(answers) as rig, Client(rig.port) as c:
            assert (await c.answer(c.ask(CHAT, [*c.head(), ("host", "GATEWAY")]))).status == 200
            assert (await c.answer(c.ask(CHAT, [*pseudo(authority="-"), ("host", "gateway")]))).status == 200
            assert (await c.answer(c.ask(CHAT, [*c.head(), ("te", "trailers")]))).status == 200

    run(main())


def test_an_overloaded_worker_answers_each_stream() -> None:
    async def main() -> None:
        async with Rig(answers) as rig, Client(rig.port) as c:
            rig.core.overload = 2
            assert (await c.answer(c.ask(CHAT))).body == b"overloaded"
            rig.core.overload = 0
            assert (await c.answer(c.ask(CHAT))).status == 200
            rig.core.overload = 1
            assert (await c.answer(c.ask(CHAT))).status == 200
            assert await c.ended() == 0, "goes with the next answer"
            assert trips(rig) == {"memory_refuse": 1, "memory_keep_alive": 1}

    run(main())


def test_no_more_is_under_way_than_there_are_descriptors_for() -> None:
    go = asyncio.Event()

    async def when_told(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            await go.wait()
            writer.write(OK)

    async def main() -> None:
        async with Rig(when_told, max_connections=2) as rig, Client(rig.port) as c:
            asked = [c.ask(CHAT) for _ in range(3)]
            await until(lambda: rig.upstream_connections == 3, "all three were asked")
            assert (await c.answer(c.ask(CHAT))).body == b"overloaded"
            assert (rig.upstream_connections, rig.core.connections) == (3, 1)
            go.set()
            assert [(await c.answer(stream)).status for stream in asked] == [200] * 3
            assert (await c.answer(c.ask(CHAT))).status == 200
            assert trips(rig) == {"max_connections": 1}
            assert [line["limit"] for line in lines(rig) if "limit" in line] == ["max_connections"]

    run(main())


# ---- time ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["body_idle", "body_total"])
def test_a_body_that_does_not_come_is_refused_on_its_stream(name: str) -> None:
    async def main() -> None:
        async with Rig(answers, **{f"{name}_ms": 200}) as rig, Client(rig.port) as c:
            stream = c.begin(c.head(content_length="10"))
            c.h2.send_data(stream, b"{")
            c.flush()
            answer = await c.answer(stream)
            assert (answer.status, answer.body) == (408, b"request_timeout")
            assert trips(rig) == {name: 1}
            assert lines(rig)[0]["limit"] == name
            assert (await c.answer(c.ask(CHAT))).status == 200

    run(main())


def test_a_stream_that_takes_nothing_is_cut_alone() -> None:
    async def main() -> None:
        flood = Flood(chunks=100, size=10_000)
        async with Rig(flood, write_stall_ms=300) as rig, Client(rig.port) as c:
            c.acknowledge = False
            stream = c.ask(CHAT)
            answer = await c.answer(stream)
            assert (answer.reset, len(answer.body)) == (INTERNAL, 65_535)
            assert trips(rig) == {"write_stall": 1}
            line = lines(rig)[0]
            assert (line["limit"], line["outcome"]) == ("write_stall", "write_stall")
            await until(flood.gone.is_set, "its upstream is closed")
            assert rig.core.paused == 0
            assert c.goaway is None

    run(main())


def test_a_connection_that_takes_nothing_is_cut_whole() -> None:
    async def main() -> None:
        flood = Flood(chunks=2_000, size=10_000)
        async with Rig(flood, write_stall_ms=300) as rig, Client(rig.port, rcvbuf=4_096) as c:
            c.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: (1 << 31) - 1})
            c.h2.increment_flow_control_window((1 << 31) - 65_536)
            c.flush()
            c.writer.transport.pause_reading()
            for _ in range(3):
                c.ask(CHAT)
            await until(lambda: rig.core.paused > 0, "the socket is full", 40)
            rig.ticking = False
            await settled_at(lambda: flood.sent)
            for second in (2, 4):  # what it holds is noted first, and then found to be the same
                rig.core.tick(monotonic_ns() + second * S)
            await until(lambda: len(rig.walk.settled) == 3, "all are cut")
            await until(lambda: rig.core.connections == 0, "and the connection")
            assert {s["outcome"] for s in rig.walk.settled} == {"write_stall"}
            assert all(line["limit"] == "write_stall" for line in lines(rig))

    run(main())


def test_a_head_that_does_not_end_ends_the_connection() -> None:
    async def main() -> None:
        async with Rig(answers, header_timeout_ms=200) as rig, Client(rig.port) as c:
            await c.until(lambda: bool(c.events), "SETTINGS")
            c.raw(frames.HeadersFrame(1, c.h2.encoder.encode(c.head()), flags=set()))
            assert await c.ended() == CALM
            assert trips(rig) == {"header_timeout": 1}

    run(main())


def test_an_idle_connection_is_let_go() -> None:
    async def main() -> None:
        async with Rig(answers, idle_timeout_ms=300) as rig, Client(rig.port) as c:
            assert (await c.answer(c.ask(CHAT))).status == 200
            assert await c.ended() == 0
            assert c.goaways == [(1, 0)]
            assert trips(rig) == {"idle_timeout": 1}

    run(main())


@pytest.mark.parametrize(("name", "value"), [("connection_requests", 3), ("connection_age", 50)])
def test_a_connection_is_let_go_in_two_steps(name: str, value: int) -> None:
    async def main() -> None:
        held = Held()
        key = name if name == "connection_requests" else f"{name}_ms"
        async with Rig(held, **{key: value}) as rig, Client(rig.port) as c:
            streams = [c.ask(CHAT) for _ in range(3)]
            await until(lambda: held.asked == 3, "all are under way")
            rig.ticking = False
            rig.core.tick(monotonic_ns() + 2 * S)
            assert c.goaways == [], "it waits for a moment without exchanges"
            rig.core.tick(monotonic_ns() + 13 * S)
            rig.ticking = True
            await c.until(lambda: len(c.goaways) >= 1, "the notice")
            assert c.goaways[0] == ((1 << 31) - 1, 0), "no stream is lost by it"
            await c.until(lambda: len(c.goaways) == 2, "which was the last")
            assert c.goaways[1] == (streams[-1], 0)
            assert not c.closed
            held.go.set()
            for stream in streams:
                assert (await c.answer(stream)).body == b"{}"
            assert await c.ended() == 0
            assert trips(rig) == {name: 1}

    run(main())


def test_a_client_that_does_not_answer_the_ping_is_let_go_a_second_later() -> None:
    async def main() -> None:
        async with Rig(answers) as rig:
            reader, writer = await rig.client()
            writer.write(PREFACE + frames.SettingsFrame(0).serialize())
            await until(lambda: rig.core.connections == 1, "it is in")
            assert await reader.read(9)
            rig.core.drain(monotonic_ns() + 60 * S, monotonic_ns() + 60 * S, 60 * S)
            rig.core.tick(monotonic_ns() + 2 * S)
            assert await asyncio.wait_for(reader.read(1 << 16), 5)
            while await asyncio.wait_for(reader.read(1 << 16), 5):
                pass
            writer.close()

    run(main())


def test_a_drain_lets_streams_end_and_takes_no_more() -> None:
    async def main() -> None:
        held = Held()
        async with Rig(held) as rig, Client(rig.port) as c:
            streams = [c.ask(CHAT) for _ in range(3)]
            await until(lambda: held.asked == 3, "all are under way")
            far = monotonic_ns() + 60 * S
            rig.core.drain(far, far, 0)
            rig.ticking = False
            rig.core.tick(monotonic_ns() + 11 * S)
            await c.until(lambda: len(c.goaways) == 2, "both steps")
            held.go.set()
            for stream in streams:
                assert (await c.answer(stream)).body == b"{}"
            assert await c.ended() == 0
            c.writer.close()
            await until(lambda: rig.core.connections == 0, "it is let go once the client has closed, too")

    run(main())


def test_a_drain_that_is_over_cuts_visibly() -> None:
    async def main() -> None:
        held = Held(HEAD + chunk(delta("x")))
        silent = Held()

        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await (held if rig.upstream_connections == 1 else silent)(reader, writer)

        async with Rig(script) as rig, Client(rig.port) as c:
            rig.walk.plan = rig.make_plan(endings=endings(Scan.OPENAI))
            stream = c.ask(STREAM)
            await c.until(lambda: c.streams[stream].body == delta("x"), "it has begun")
            unary = c.ask(CHAT)
            await until(lambda: silent.asked == 1, "and another one")
            rig.core.drain(0, 0, 0)
            rig.core.tick(monotonic_ns())
            cut, refused = await c.answer(stream), await c.answer(unary)
            assert cut.ended
            assert cut.body.startswith(delta("x") + b"data: {")
            assert (refused.status, refused.body) == (503, b"draining")
            assert sorted(s["outcome"] for s in rig.walk.settled) == ["draining", "refused"]

    run(main())


def test_an_idle_connection_leaves_at_once_when_draining_has_no_time() -> None:
    async def main() -> None:
        async with Rig(answers) as rig, Client(rig.port) as c:
            assert (await c.answer(c.ask(CHAT))).status == 200
            rig.core.drain(0, 0)
            assert await c.ended() == 0
            assert c.goaways == [(1, 0)]

    run(main())
