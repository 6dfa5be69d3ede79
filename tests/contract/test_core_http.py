"""HTTP/1.1 through the native core: framing both ways, connections, and what each side sees (RFC 9112, DESIGN 5)."""

from __future__ import annotations

import asyncio
import json

import pytest

from ascproxy import _native
from ascproxy.clock import monotonic_ns
from tests.kit.rig import Answer, Forwarder, Rig, post, read_answer, read_request, run, until

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"


def ok(body: bytes) -> bytes:
    return OK % (len(body), body)


def replies(*answers: bytes):
    """An upstream that gives the same answers, in order, over and over."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        turn = 0
        while True:
            await read_request(reader)
            writer.write(answers[turn % len(answers)])
            turn += 1

    return script


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers with the body it was sent."""
    while True:
        _, body = await read_request(reader)
        writer.write(ok(body))


async def ask(rig: Rig, data: bytes, *, no_body: bool = False) -> Answer:
    reader, writer = await rig.client()
    writer.write(data)
    answer = await read_answer(reader, no_body=no_body)
    writer.close()
    return answer


def test_unary_request_and_answer_pass() -> None:
    async def main() -> None:
        async with Rig(echo) as rig:
            body = json.dumps(CHAT).encode()
            answer = await ask(rig, post(body))
            assert (answer.status, answer.body) == (200, body)
            assert answer.fields["content-type"] == "application/json"
            assert len(answer.fields["x-request-id"]) == 32
            assert answer.fields["date"].endswith("GMT")
            await until(lambda: len(rig.walk.settled) == 1, "settled")
            assert rig.walk.settled[0]["outcome"] == "complete"

    run(main())


def test_keep_alive_reuses_both_connections() -> None:
    async def main() -> None:
        async with Rig(echo) as rig:
            reader, writer = await rig.client()
            for n in range(20):
                body = json.dumps({"n": n}).encode()
                writer.write(post(body))
                answer = await read_answer(reader)
                assert answer.body == body
                assert "connection" not in answer.fields
            assert rig.upstream_connections == 1
            assert rig.walk.heads == 0, "on_head is for bodies that are not here yet"
            writer.close()

    run(main())


def test_pipelined_requests_are_answered_in_order() -> None:
    async def main() -> None:
        async with Rig(echo) as rig:
            reader, writer = await rig.client()
            bodies = [json.dumps({"n": n}).encode() for n in range(50)]
            writer.write(b"".join(post(b) for b in bodies))
            for body in bodies:
                assert (await read_answer(reader)).body == body
            writer.close()

    run(main())


def test_request_byte_by_byte() -> None:
    async def main() -> None:
        async with Rig(echo) as rig:
            reader, writer = await rig.client()
            body = json.dumps(CHAT).encode()
            for byte in post(body):
                writer.write(bytes([byte]))
                await asyncio.sleep(0)
            assert (await read_answer(reader)).body == body
            assert rig.walk.heads == 1
            writer.close()

    run(main())


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_chunked_request_reaches_the_upstream_with_a_length(piece: int) -> None:
    async def main() -> None:
        async with Rig(echo) as rig:
            body = json.dumps(CHAT).encode() * 1
            chunks = [body[i : i + piece] for i in range(0, len(body), piece)]
            coded = b"".join(b"%x;ext=1\r\n%s\r\n" % (len(c), c) for c in chunks) + b"0\r\nX-Trailer: t\r\n\r\n"
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n"
            answer = await ask(rig, head + coded)
            assert answer.body == body

    run(main())


def test_large_body_arrives_whole() -> None:
    async def main() -> None:
        async with Rig(echo) as rig:
            body = json.dumps({"text": "x" * 20_000_000}).encode()
            answer = await ask(rig, post(body))
            assert answer.body == body
            assert rig.walk.heads == 1

    run(main())


def test_chunked_answer_is_chunked_again() -> None:
    async def main() -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n"
        coded = head + b"5\r\nhello\r\n7;x=y\r\n, world\r\n0\r\nTrailer: t\r\n\r\n"
        async with Rig(replies(coded)) as rig:
            reader, writer = await rig.client()
            for _ in range(3):
                writer.write(post(CHAT))
                answer = await read_answer(reader)
                assert answer.body == b"hello, world"
                assert "trailer" not in answer.fields
            assert rig.upstream_connections == 1
            writer.close()

    run(main())


def test_answer_split_at_every_byte() -> None:
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\nX-Back: 1\r\nServer: s\r\n\r\n"
    )
    coded = head + b"5\r\nhello\r\n7\r\n, world\r\n0\r\n\r\n"

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for cut in range(1, len(coded)):
            await read_request(reader)
            writer.write(coded[:cut])
            await asyncio.sleep(0.002)
            writer.write(coded[cut:])

    async def main() -> None:
        async with Rig(script) as rig:
            reader, writer = await rig.client()
            for _ in range(1, len(coded)):
                writer.write(post(CHAT))
                answer = await read_answer(reader)
                assert answer.body == b"hello, world"
                assert answer.fields["x-back"] == "1"
                assert "server" not in answer.fields
            writer.close()

    run(main())


def test_answer_ended_by_close() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nuntil")
        await writer.drain()
        writer.write(b" the end")

    async def main() -> None:
        async with Rig(script) as rig:
            answer = await ask(rig, post(CHAT))
            assert answer.body == b"until the end"
            assert answer.fields["transfer-encoding"] == "chunked"
            await until(lambda: bool(rig.walk.settled), "settled")
            assert rig.walk.idle == []

    run(main())


def test_http10_client_gets_an_answer_ended_by_close() -> None:
    coded = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n"

    async def main() -> None:
        async with Rig(replies(coded)) as rig:
            reader, writer = await rig.client()
            writer.write(post(CHAT, version="1.0"))
            answer = await read_answer(reader)
            assert answer.body == b"hi"
            assert "transfer-encoding" not in answer.fields
            assert answer.fields["connection"] == "close"
            writer.close()

    run(main())


def test_connection_close_is_honoured() -> None:
    async def main() -> None:
        async with Rig(echo) as rig:
            reader, writer = await rig.client()
            writer.write(post(b"{}", "Connection: close"))
            answer = await read_answer(reader)
            assert answer.fields["connection"] == "close"
            assert await reader.read() == b""
            writer.close()

    run(main())


def test_expect_continue_is_answered_before_the_body() -> None:
    async def main() -> None:
        async with Rig(echo) as rig:
            reader, writer = await rig.client()
            writer.write(b"POST / HTTP/1.1\r\nHost: g\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n")
            assert (await read_answer(reader)).status == 100
            writer.write(b"{}")
            answer = await read_answer(reader)
            assert (answer.status, answer.body) == (200, b"{}")
            writer.close()

    run(main())


def test_informational_answers_of_the_upstream_are_skipped() -> None:
    async def main() -> None:
        early = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" * 3
        async with Rig(replies(early + ok(b"{}"))) as rig:
            assert (await ask(rig, post(CHAT))).body == b"{}"

    run(main())


def test_flood_of_informational_answers_is_cut() -> None:
    async def main() -> None:
        early = b"HTTP/1.1 103 Early Hints\r\n\r\n" * 1000
        async with Rig(replies(early + ok(b"{}"))) as rig:
            assert (await ask(rig, post(CHAT))).status == 502
            assert rig.walk.failures == ["malformed"]

    run(main())


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
def test_answers_without_body(status: bytes) -> None:
    async def main() -> None:
        async with Rig(replies(b"HTTP/1.1 " + status + b"\r\nX-Back: 1\r\n\r\n")) as rig:
            reader, writer = await rig.client()
            for _ in range(2):
                writer.write(post(CHAT))
                answer = await read_answer(reader)
                assert answer.status == int(status[:3])
                assert "transfer-encoding" not in answer.fields
            assert rig.upstream_connections == 1
            writer.close()

    run(main())


def test_head_has_no_body() -> None:
    class Local(Forwarder):
        def on_request(self, s) -> None:
            s.respond(200, b"content-type: text/plain\r\n", b"hello")

    async def main() -> None:
        async with Rig(echo, walk=Local()) as rig:
            reader, writer = await rig.client()
            writer.write(b"HEAD / HTTP/1.1\r\nHost: g\r\n\r\n")
            answer = await read_answer(reader, no_body=True)
            assert answer.fields["content-length"] == "5"
            writer.write(b"GET / HTTP/1.1\r\nHost: g\r\n\r\n")
            assert (await read_answer(reader)).body == b"hello"
            writer.close()

    run(main())


@pytest.mark.parametrize(
    ("raw", "reject"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "invalid_request"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "invalid_request"),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: g\r\n\r\n", "uri_too_long"),
        (b"GET / HTTP/1.1\r\nHost: g\r\nX: " + b"a" * 20_000 + b"\r\n\r\n", "headers_too_large"),
        (b"GET / HTTP/2.0\r\nHost: g\r\n\r\n", "version_not_supported"),
        (
            b"POST / HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\nabc",
            "invalid_request",
        ),
        (b"POST / HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "invalid_request"),
    ],
)
def test_bad_requests_are_refused_and_the_connection_closes(raw: bytes, reject: str) -> None:
    async def main() -> None:
        async with Rig(echo) as rig:
            reader, writer = await rig.client()
            writer.write(raw)
            answer = await read_answer(reader)
            assert 400 <= answer.status < 506
            assert rig.walk.rejects == [reject]
            assert answer.fields["connection"] == "close"
            assert await reader.read() == b""
            assert rig.upstream_connections == 0
            writer.close()

    run(main())


def test_answer_after_the_refusal_is_not_lost_while_the_client_sends() -> None:
    """A refused upload gets its 413 although megabytes of it are unread (RFC 9112 9.6)."""

    class Refusing(Forwarder):
        def on_head(self, s) -> None:
            s.respond(413, b"", b"too large", code="body_too_large")

    async def main() -> None:
        async with Rig(echo, walk=Refusing()) as rig:
            reader, writer = await rig.client()
            writer.write(b"POST / HTTP/1.1\r\nHost: g\r\nContent-Length: 50000000\r\n\r\n" + b"x" * 5_000_000)
            answer = await read_answer(reader)
            assert (answer.status, answer.body) == (413, b"too large")
            writer.close()

    run(main())


def test_body_limit_is_kept_for_lengths_and_for_chunks() -> None:
    async def main() -> None:
        async with Rig(echo, max_body=1000) as rig:
            assert (await ask(rig, post(b'"' + b"x" * 2000 + b'"'))).status == 413
            head = b"POST / HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n"
            assert (await ask(rig, head + b"7d0\r\n" + b"x" * 2000 + b"\r\n0\r\n\r\n")).status == 413
            assert (await ask(rig, b"POST / HTTP/1.1\r\nHost: g\r\nContent-Length: 100000\r\n\r\n")).status == 413
            assert rig.walk.rejects == ["body_too_large"] * 3
            assert rig.upstream_connections == 0

    run(main())


def test_bodies_of_a_worker_are_bounded() -> None:
    async def main() -> None:
        async with Rig(echo, max_bodies=1_000_000) as rig:
            reader, writer = await rig.client()
            writer.write(b"POST / HTTP/1.1\r\nHost: g\r\nContent-Length: 900000\r\n\r\n" + b" " * 890_000)
            await until(lambda: rig.core.body_bytes >= 890_000, "the first body is held")
            second = await ask(rig, post(b" " * 300_000))
            assert second.status == 503
            writer.write(b" " * 10_000)
            assert (await read_answer(reader)).status == 200
            writer.close()

    run(main())


def test_extra_bytes_after_an_answer_end_the_upstream_connection() -> None:
    async def main() -> None:
        async with Rig(replies(ok(b"{}") + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")) as rig:
            for _ in range(3):
                assert (await ask(rig, post(CHAT))).body == b"{}"
            assert rig.upstream_connections == 3, "a connection with a surprise is not reused"

    run(main())


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
    ],
)
def test_malformed_answers_are_a_502(raw: bytes) -> None:
    async def main() -> None:
        async with Rig(replies(raw)) as rig:
            assert (await ask(rig, post(CHAT))).status == 502
            assert rig.walk.failures == ["malformed"]
            assert rig.walk.idle == []

    run(main())


def test_truncated_answer_is_never_a_clean_end() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, body = await read_request(reader)
        if b"chunked" in body:
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhello")

    async def main() -> None:
        async with Rig(script) as rig:
            for body in (b'{"a":"chunked"}', b'{"a":"length"}'):
                with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                    await ask(rig, post(body))
            await until(lambda: len(rig.walk.settled) == 2, "settled")
            assert [s["outcome"] for s in rig.walk.settled] == ["truncated", "truncated"]

    run(main())


def test_reused_connection_that_was_closed_is_retried_on_a_fresh_one() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, body = await read_request(reader)
        writer.write(ok(body))
        await read_request(reader)  # the second request meets a closed door

    async def main() -> None:
        async with Rig(script) as rig:
            reader, writer = await rig.client()
            for n in range(6):
                writer.write(post(b"%d" % n if n % 2 else b'{"n":%d}' % n))
                assert (await read_answer(reader)).status == 200
            assert set(rig.walk.failures) == {"closed"}
            assert max(s["attempts"] for s in rig.walk.settled) == 2
            writer.close()

    run(main())


def test_first_byte_and_idle_deadlines() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, body = await read_request(reader)
        if b"mid" in body:
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        await reader.read()

    async def main() -> None:
        async with Rig(script) as rig:
            rig.walk.plan = rig.make_plan(first_byte_ms=300, idle_ms=300)
            answer = await ask(rig, post(b'{"a":"silent"}'))
            assert (answer.status, answer.body) == (502, b"timeout")
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await ask(rig, post(b'{"a":"mid"}'))
            await until(lambda: len(rig.walk.settled) == 2, "settled")
            assert rig.walk.settled[1]["outcome"] == "upstream_timeout"

    run(main())


def test_header_body_and_idle_deadlines_of_clients() -> None:
    async def main() -> None:
        async with Rig(echo, header_timeout_ms=300, body_idle_ms=300, idle_timeout_ms=300) as rig:
            reader, writer = await rig.client()
            writer.write(b"GET / HTTP/1.1\r\nHo")
            assert (await read_answer(reader)).status == 408
            writer.close()
            reader, writer = await rig.client()
            writer.write(b"POST / HTTP/1.1\r\nHost: g\r\nContent-Length: 10\r\n\r\n{")
            assert (await read_answer(reader)).status == 408
            writer.close()
            reader, writer = await rig.client()
            assert await reader.read() == b"", "an idle connection closes without a word"
            writer.close()
            assert rig.walk.rejects == ["request_timeout"] * 2

    run(main())


def test_each_head_has_its_own_deadline_however_requests_are_cut_into_reads() -> None:
    async def main() -> None:
        async with Rig(echo, header_timeout_ms=300) as rig:
            reader, writer = await rig.client()
            request = post(b"{}")
            writer.write(request[:20])
            for _ in range(12):  # 0.6 s in which a head is always half here, but never the same one
                await asyncio.sleep(0.05)
                writer.write(request[20:] + request[:20])
                assert (await read_answer(reader)).status == 200
            assert (await read_answer(reader)).status == 408
            writer.close()

    run(main())


def test_connection_ends_after_its_number_of_requests() -> None:
    async def main() -> None:
        async with Rig(echo, connection_requests=3) as rig:
            reader, writer = await rig.client()
            for n in range(3):
                writer.write(post(b"{}"))
                answer = await read_answer(reader)
                assert answer.fields.get("connection") == ("close" if n == 2 else None)
            assert await reader.read() == b""
            writer.close()

    run(main())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_exception_in_the_walk_is_a_500_and_settles() -> None:
    class Broken(Forwarder):
        def on_request(self, s) -> None:
            raise ValueError("on purpose")

    async def main() -> None:
        async with Rig(echo, walk=Broken()) as rig:
            assert (await ask(rig, post(b"{}"))).status == 500
            await until(lambda: len(rig.walk.settled) == 1, "settled")
            assert rig.walk.settled[0]["code"] == "internal_error"

    run(main())


def test_a_walk_that_decides_nothing_is_a_500() -> None:
    class Silent(Forwarder):
        def on_request(self, s) -> None:
            return

    async def main() -> None:
        async with Rig(echo, walk=Silent()) as rig:
            assert (await ask(rig, post(b"{}"))).status == 500

    run(main())


def test_model_alias_is_spliced_and_everything_else_passes_byte_for_byte() -> None:
    body = b'{ "x":1.50, "model" : "caf\\u00e9", "stream":false , "messages":[]}'

    async def main() -> None:
        async with Rig(echo) as rig:
            rig.walk.plan = rig.make_plan(model='a "quoted" name')
            answer = await ask(rig, post(body))
            assert answer.body == body.replace(b'"caf\\u00e9"', b'"a \\"quoted\\" name"')

    run(main())


def test_headers_pass_by_allow_list_and_the_secret_goes_last() -> None:
    from ascproxy import _native

    seen: list[bytes] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head, _ = await read_request(reader)
            seen.append(head)
            writer.write(ok(b"{}"))

    async def main() -> None:
        arena = _native.SecretArena()
        async with Rig(script) as rig:
            rig.walk.plan = rig.make_plan(
                secret=arena.put(bytearray(b"sk-upstream")), secret_prefix=b"authorization: Bearer "
            )
            await ask(
                rig,
                post(
                    b"{}",
                    "Authorization: Bearer mine",
                    "X-Api-Key: mine",
                    "Cookie: c",
                    "X-Pass-One: 1",
                    "Accept: */*",
                    "X-Request-Id: abc-1",
                    "X-Forwarded-For: 1.2.3.4",
                ),
            )
            assert seen == [
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: model\r\naccept-encoding: identity\r\n"
                b"X-Pass-One: 1\r\nAccept: */*\r\nx-request-id: abc-1\r\ncontent-length: 2\r\n"
                b"authorization: Bearer sk-upstream\r\n\r\n"
            ]

    run(main())


def test_at_most_two_walk_calls_for_a_pooled_unary_request_and_none_per_chunk() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            writer.write(head)
            for n in range(200):
                event = b'data: {"choices":[{"delta":{"content":"%d"}}]}\n\n' % n
                writer.write(b"%x\r\n%s\r\n" % (len(event), event))
                await asyncio.sleep(0)
            writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    async def main() -> None:
        async with Rig(script) as rig:
            await ask(rig, post(CHAT))
            await until(lambda: len(rig.walk.idle) == 1, "pooled")
            before = rig.core.calls
            await ask(rig, post(CHAT))
            await until(lambda: len(rig.walk.settled) == 2, "settled")
            assert rig.core.calls - before == 2

    run(main())


def test_usage_finish_and_access_line() -> None:
    answer = (
        b'{"id":"x","choices":[{"index":0,"message":{"content":"hi"},"finish_reason":"stop"}],'
        b'"usage":{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10}}'
    )

    async def main() -> None:
        async with Rig(replies(ok(answer))) as rig:
            await ask(rig, post(CHAT, "X-Request-Id: line-1"))
            await until(lambda: len(rig.walk.settled) == 1, "settled")
            assert rig.walk.settled[0]["usage"] == (7, 3)
            assert rig.walk.settled[0]["finish"] == "stop"
            line = json.loads(rig.core.take_log())
            assert line["request_id"] == "line-1"
            assert (line["status"], line["outcome"], line["route"], line["model"]) == (200, "complete", "test", "m")
            assert (line["tokens_in"], line["tokens_out"], line["attempts"]) == (7, 3, 1)
            assert line["path"] == "/v1/chat/completions"
            assert rig.core.take_log() == b""

    run(main())


def test_a_tick_of_many_requests_loses_no_access_line() -> None:
    many = 5_000  # of a tenth of a second at 50,000 a second, more than a worker answers

    class Answers(Forwarder):
        def on_request(self, s: _native.Stream) -> None:
            s.respond(404, b"", b"")

    async def main() -> None:
        async with Rig(replies(), walk=Answers()) as rig:
            reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
            for n in range(many):
                writer.write(post(CHAT, f"X-Request-Id: {n:0>64}"))
                assert (await read_answer(reader)).status == 404
            writer.close()
            named = [json.loads(line)["request_id"] for line in rig.core.take_log().splitlines()]
            assert named == [f"{n:0>64}" for n in range(many)]
            assert rig.page.load(_native.Page.CELLS["log_dropped"]) == 0

    run(main())


def test_a_drain_that_waits_serves_one_more_request_on_an_idle_connection() -> None:
    """Nobody who is just about to send finds the connection reset; who sends nothing is let go in the end."""

    async def main() -> None:
        async with Rig(echo) as rig:
            silent, silent_writer = await rig.client()
            reader, writer = await rig.client()
            writer.write(post(b"{}"))
            assert (await read_answer(reader)).fields.get("connection") != "close"
            began = monotonic_ns()
            rig.core.drain(2**62, 2**62, 10**9)
            writer.write(post(b"{}"))
            answer = await read_answer(reader)
            assert (answer.status, answer.fields["connection"]) == (200, "close")
            assert await reader.read() == b""
            assert await silent.read() == b""
            assert monotonic_ns() - began >= 10**9
            await until(lambda: rig.core.connections == 0, "nothing is left")
            writer.close()
            silent_writer.close()

    run(main())


def test_a_drain_that_waits_keeps_what_a_begun_answer_promised() -> None:
    """Its head said nothing of close, so the client may use the connection once more."""
    gate = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            _, body = await read_request(reader)
            whole = ok(body)
            writer.write(whole[:-1])  # its head leaves with the first byte of its body
            await gate.wait()
            writer.write(whole[-1:])

    async def main() -> None:
        async with Rig(script) as rig:
            reader, writer = await rig.client()
            writer.write(post(b"{}"))
            await reader.readuntil(b"\r\n\r\n")
            rig.core.drain(2**62, 2**62, 10**10)
            gate.set()
            assert await reader.readexactly(2) == b"{}"
            writer.write(post(b"{}"))
            answer = await read_answer(reader)
            assert (answer.status, answer.fields["connection"]) == (200, "close")
            assert await reader.read() == b""
            writer.close()

    run(main())


def test_a_connection_that_arrives_with_the_drain_is_served() -> None:
    """It was accepted in the turn in which the drain began: whoever sent on it was not refused."""

    async def main() -> None:
        async with Rig(echo) as rig:
            rig.core.drain(2**62, 2**62, 10**10)
            reader, writer = await rig.client()
            writer.write(post(b"{}"))
            answer = await read_answer(reader)
            assert (answer.status, answer.fields["connection"]) == (200, "close")
            writer.close()

    run(main())


def test_drain_finishes_what_is_under_way() -> None:
    gate = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, body = await read_request(reader)
        await gate.wait()
        writer.write(ok(body))

    async def main() -> None:
        async with Rig(script) as rig:
            idle_reader, idle_writer = await rig.client()
            reader, writer = await rig.client()
            writer.write(post(b"{}"))
            await until(lambda: rig.core.in_flight == 1 and rig.core.connections == 2, "under way")
            rig.core.drain(2**62, 2**62)
            assert await idle_reader.read() == b""
            gate.set()
            answer = await read_answer(reader)
            assert (answer.status, answer.fields["connection"]) == (200, "close")
            assert await reader.read() == b""
            idle_writer.close()
            writer.close()

    run(main())
