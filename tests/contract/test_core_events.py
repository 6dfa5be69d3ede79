"""Event streams through the native core: usage, what is held, and how they end (SEMANTICS 3 to 5)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from ascproxy import _native
from ascproxy.gateway.rewrite import endings
from ascproxy.wire.operation import Scan
from tests.kit.rig import Answer, Forwarder, Rig, parse_chunks, post, read_answer, read_request, run, settled_at, until

WIRE = Path(__file__).parents[1] / "wire"
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
DONE = b"data: [DONE]\n\n"
EVERY = b'"include_usage":true,"continuous_usage_stats":true'
STREAM = {"model": "m", "stream": True, "messages": []}

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(**members: Any) -> bytes:
    return b"data: " + json.dumps(members, separators=(",", ":")).encode() + b"\n\n"


def delta(text: str = "", *, index: int = 0, finish: str | None = None, **members: Any) -> bytes:
    return event(
        id="c", choices=[{"index": index, "delta": {"content": text}, "finish_reason": finish}], **members
    )  # fmt: skip


def usage(n_in: int, n_out: int) -> dict[str, int]:
    return {"prompt_tokens": n_in, "completion_tokens": n_out, "total_tokens": n_in + n_out}


ROLE = delta("")
ERROR = event(error={"message": "the engine died", "type": "InternalServerError", "param": None, "code": 500})


def sends(*pieces: bytes, close: bool = False) -> Script:
    """An upstream that answers each request with events in chunks; ``close``: without the last chunk, then FIN."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await read_request(reader)
            writer.write(HEAD)
            for piece in pieces:
                writer.write(chunk(piece))
                await asyncio.sleep(0)
            if close:
                await writer.drain()
                return
            writer.write(END)

    return script


def rig_of(script: Script, *, scan: Scan = Scan.OPENAI, walk: Forwarder | None = None, **plan: Any) -> Rig:
    rig = Rig(script, walk=walk)
    number = getattr(_native, f"SCAN_{scan.upper()}")
    rig.walk.plan = rig.make_plan(**({"scan": number, "endings": endings(scan), "strip": True} | plan))
    return rig


async def ask(rig: Rig, body: Any = STREAM) -> Answer:
    """One request on a connection of its own, which must be good for another one afterwards."""
    reader, writer = await rig.client()
    writer.write(post(body))
    answer = await read_answer(reader)
    assert not reader.at_eof()
    writer.close()
    n = len(rig.walk.settled)
    await until(lambda: len(rig.walk.settled) >= max(n, 1), "settled")
    return answer


def last(answer: Answer) -> Any:
    """The document of the last event."""
    return json.loads(answer.body.rstrip(b"\n").split(b"\n")[-1].removeprefix(b"data: "))


# ---- usage is asked for --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ({}, {"include_usage": True, "continuous_usage_stats": True}),
        ({"stream_options": None}, {"include_usage": True, "continuous_usage_stats": True}),
        ({"stream_options": {}}, {"include_usage": True, "continuous_usage_stats": True}),
        ({"stream_options": {"include_usage": False}}, {"include_usage": True}),
        ({"stream_options": {"include_usage": None, "x": 1}}, {"include_usage": True, "x": 1}),
        ({"stream_options": {"x": [1, 2]}}, {"include_usage": True, "continuous_usage_stats": True, "x": [1, 2]}),
        (
            {"stream_options": {"continuous_usage_stats": False}},
            {"include_usage": True, "continuous_usage_stats": False},
        ),
        ({"stream_options": {"include_usage": True}}, {"include_usage": True}),
    ],
)
@pytest.mark.parametrize("model", [None, "meta/another"])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("first", [False, True], ids=["options-last", "options-first"])
def test_usage_is_asked_for_in_place(
    given: Any, asked: Any, model: str | None, indent: int | None, first: bool
) -> None:
    """Only stream_options and model change, whatever the body looks like."""
    seen: list[Any] = []

    async def upstream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            _, body = await read_request(reader)
            pairs = json.loads(body, object_pairs_hook=list)
            assert len({name for name, _ in pairs}) == len(pairs), "a member twice"
            seen.append(json.loads(body))
            writer.write(HEAD + chunk(delta("x") + DONE) + END)

    async def main() -> None:
        async with rig_of(upstream, ask=EVERY, model=model) as rig:
            body = given | STREAM if first else STREAM | given
            await ask(rig, json.dumps(body, indent=indent).encode())
            assert seen == [STREAM | {"model": model or "m", "stream_options": asked}]

    run(main())


def test_nothing_is_asked_of_what_is_no_stream() -> None:
    seen: list[bytes] = []

    async def upstream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, body = await read_request(reader)
        seen.append(body)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

    async def main() -> None:
        async with rig_of(upstream, ask=EVERY) as rig:
            body = b'{"model":"m","stream":false}'
            await ask(rig, body)
            assert seen == [body]

    run(main())


# ---- and not shown -------------------------------------------------------------------------------------------------


def without_usage(body: bytes) -> list[Any]:
    """The events of a stream as a caller would get them that did not ask."""
    events = [e.removeprefix(b"data: ") for e in body.split(b"\n\n") if e]
    documents = [json.loads(e) if e != b"[DONE]" else "[DONE]" for e in events]
    for document in documents:
        if isinstance(document, dict):
            document.pop("usage", None)
    return [d for d in documents if not (isinstance(d, dict) and d["choices"] == [])]


def documents(body: bytes) -> list[Any]:
    events = [e.removeprefix(b"data: ") for e in body.split(b"\n\n") if e]
    return [json.loads(e) if e != b"[DONE]" else "[DONE]" for e in events]


@pytest.mark.parametrize(
    "name", ["vllm-chat-stream-usage-continuous", "vllm-chat-stream-usage", "vllm-completions-stream-usage"]
)
def test_a_recorded_stream_is_stripped_wherever_it_is_cut(name: str) -> None:
    """Nothing of the usage that only we asked for is seen, and nothing else is missing."""
    raw = (WIRE / f"{name}.response.txt").read_bytes()
    recorded = parse_chunks(raw)
    expected = without_usage(recorded)
    assert b'"usage":{' in recorded

    async def upstream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            _, body = await read_request(reader)
            cut = json.loads(body)["cut"]
            writer.write(raw[:cut])
            await asyncio.sleep(0.0003)
            writer.write(raw[cut:])

    async def main() -> None:
        cuts = iter(range(1, len(raw)))

        async def client(rig: Rig) -> None:
            reader, writer = await rig.client()
            for cut in cuts:
                writer.write(post(STREAM | {"cut": cut}))
                answer = await read_answer(reader)
                assert b"usage" not in answer.body
                assert documents(answer.body) == expected
                assert answer.body.replace(b" ", b"") in stripped(recorded)
            writer.close()

        async with rig_of(upstream, ask=EVERY) as rig:
            await asyncio.gather(*(client(rig) for _ in range(32)))
            facts = {(s["outcome"], s["usage"], s["source"]) for s in rig.walk.settled}
            assert len(facts) == 1
            outcome, (n_in, n_out), source = facts.pop()
            assert (outcome, source) == ("complete", "reported")
            assert n_in > 0
            assert n_out > 0

    run(main())


def stripped(body: bytes) -> bytes:
    """The recorded bytes without usage members, the last event, and white space."""
    kept = []
    for one in body.split(b"\n\n"):
        if b'"choices":[]' in one:
            continue
        at = one.find(b',"usage":{')
        if at >= 0:
            depth, stop = 0, at + 9
            while depth or stop == at + 9:
                depth += {ord("{"): 1, ord("}"): -1}.get(one[stop], 0)
                stop += 1
            kept.append(one[:at] + one[stop:])
        else:
            kept.append(one)
    return b"\n\n".join(kept).replace(b" ", b"")


def test_who_asked_sees_it_untouched() -> None:
    sent = [
        delta("a", usage=usage(5, 1)),
        delta("b", usage=usage(5, 2), finish="stop"),
        event(choices=[], usage=usage(5, 2)),
    ]

    async def main() -> None:
        async with rig_of(sends(*sent, DONE), ask=EVERY) as rig:
            answer = await ask(rig, STREAM | {"stream_options": {"include_usage": True}})
            assert answer.body == b"".join(sent) + DONE

        async with rig_of(sends(*sent, DONE), ask=EVERY, strip=False) as rig:  # a route with usage: final
            answer = await ask(rig)
            assert answer.body == b"".join(sent) + DONE

    run(main())


def test_a_null_usage_is_not_shown_either() -> None:
    """OpenAI puts it into every event once usage is asked for."""

    async def main() -> None:
        async with rig_of(sends(delta("a", usage=None), event(choices=[], usage=usage(5, 1)), DONE), ask=EVERY) as rig:
            answer = await ask(rig)
            assert documents(answer.body) == without_usage(delta("a") + DONE)
            assert rig.walk.settled[0]["usage"] == (5, 1)

    run(main())


@pytest.mark.parametrize(
    ("sent", "n", "expected", "source"),
    [
        ([delta("a", usage=usage(5, 1)), delta("b", usage=usage(5, 2))], 1, (5, 2), "partial"),
        ([delta("a"), delta("b"), delta("c")], 1, (-1, 3), "counted"),
        (
            [
                delta("a", index=0, usage=usage(5, 1)),
                delta("b", index=1, usage=usage(5, 1)),
                delta("c", index=0, usage=usage(5, 2)),
                delta("d", index=2, usage=usage(5, 1)),
            ],
            3,
            (5, 4),
            "partial",
        ),
        ([delta("a", usage=usage(5, 0))], 1, (5, 0), "partial"),  # an explicit 0 stays 0
    ],
)
def test_a_stream_that_is_left_is_counted(sent: list[bytes], n: int, expected: tuple[int, int], source: str) -> None:
    async def upstream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(HEAD + b"".join(map(chunk, sent)))
        await reader.read()

    async def main() -> None:
        async with rig_of(upstream, ask=EVERY) as rig:
            reader, writer = await rig.client()
            writer.write(post(STREAM | {"n": n}))
            await reader.readuntil(b"\r\n\r\n")
            while (await reader.readuntil(b"\n\n")).find(sent[-1][6:40]) < 0:
                pass
            writer.close()
            await until(lambda: rig.walk.settled != [], "settled")
            fact = rig.walk.settled[0]
            assert (fact["outcome"], fact["usage"], fact["source"]) == ("client_gone", expected, source)

    run(main())


# ---- held until the first content ----------------------------------------------------------------------------------


def test_nothing_is_sent_before_content() -> None:
    go = asyncio.Event()

    async def upstream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(HEAD + chunk(ROLE) + chunk(b": comment\n\n"))
        await go.wait()
        writer.write(chunk(delta("now")))
        await reader.read()

    async def main() -> None:
        async with rig_of(upstream) as rig:
            reader, writer = await rig.client()
            writer.write(post(STREAM))
            await until(lambda: rig.upstream_connections == 1, "the upstream has it")
            assert await settled_at(lambda: len(reader._buffer), 20) == 0
            go.set()
            head = await reader.readuntil(b"\r\n\r\n")
            assert b" 200 OK" in head
            size = int(await reader.readuntil(b"\r\n"), 16)
            assert await reader.readexactly(size) == ROLE + b": comment\n\n" + delta("now")
            writer.close()

    run(main())


@pytest.mark.parametrize("early", [[delta("", n=i) for i in range(64)], [delta("", padding="x" * 9000)] * 2])
def test_what_is_held_is_bounded(early: list[bytes]) -> None:
    """64 events or 16 KiB (SEMANTICS 3): then it flows, content or not."""

    async def upstream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(HEAD + b"".join(map(chunk, early)))
        await reader.read()

    async def main() -> None:
        async with rig_of(upstream) as rig:
            reader, writer = await rig.client()
            writer.write(post(STREAM))
            await reader.readuntil(b"\r\n\r\n")
            size = int(await reader.readuntil(b"\r\n"), 16)
            assert await reader.readexactly(size) == b"".join(early)
            writer.close()

    run(main())


class Fallback(Forwarder):
    """Asks once more, with another plan, after a failure before content."""

    def __init__(self) -> None:
        super().__init__()
        self.second: _native.Plan | None = None

    def on_response(self, s: _native.Stream) -> None:
        self.failures.append(s.failure)
        if self.second is None:
            s.relay()
            return
        self.plan, self.second = self.second, None
        s.task = asyncio.get_running_loop().create_task(self.connect(s))


def test_an_error_before_content_can_go_elsewhere() -> None:
    async def upstream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head, _ = await read_request(reader)
            events = [ROLE, delta("good"), DONE] if b"/second" in head else [ROLE, ERROR, DONE]
            writer.write(HEAD + b"".join(map(chunk, events)) + END)

    async def main() -> None:
        walk = Fallback()
        async with rig_of(upstream, walk=walk) as rig:
            walk.second = rig.make_plan(head=b"POST /second HTTP/1.1\r\nhost: b\r\n", endings=endings(Scan.OPENAI))
            answer = await ask(rig)
            assert answer.body == ROLE + delta("good") + DONE
            assert walk.failures == ["error_event"]
            assert [(s["outcome"], s["attempts"]) for s in walk.settled] == [("complete", 2)]

    run(main())


def test_an_error_before_content_that_goes_nowhere_is_passed_on() -> None:
    async def main() -> None:
        async with rig_of(sends(ROLE, ERROR, DONE), walk=Fallback()) as rig:
            answer = await ask(rig)
            assert answer.body == ROLE + ERROR
            assert rig.walk.settled[0]["outcome"] == "upstream_failed"

    run(main())


@pytest.mark.parametrize("early", [[], [ROLE], [ROLE, b"data: {"]])
def test_a_stream_that_ends_before_content_was_never_there(early: list[bytes]) -> None:
    async def main() -> None:
        for close in (False, True):
            async with rig_of(sends(*early, close=close)) as rig:
                answer = await ask(rig)
                assert (answer.status, answer.body) == (502, b"truncated")
                assert rig.walk.failures == ["truncated"]

    run(main())


def test_an_answer_without_content_is_whole() -> None:
    sent = [ROLE, delta("", finish="length"), DONE]

    async def main() -> None:
        async with rig_of(sends(*sent)) as rig:
            answer = await ask(rig)
            assert answer.body == b"".join(sent)
            assert rig.walk.settled[0]["outcome"] == "complete"

    run(main())


# ---- the end -------------------------------------------------------------------------------------------------------


def error_code(answer: Answer) -> str:
    return str(last(answer)["error"]["code"])


def test_an_error_of_the_server_passes_and_its_terminator_does_not() -> None:
    async def main() -> None:
        for tail in ((ERROR, DONE), (ERROR + DONE,), (ERROR,)):
            async with rig_of(sends(ROLE, delta("a"), *tail)) as rig:
                answer = await ask(rig)
                assert answer.body == ROLE + delta("a") + ERROR
                assert rig.walk.settled[0]["outcome"] == "upstream_failed"

    run(main())


def test_an_abort_is_marked() -> None:
    """vLLM under SIGTERM: finish_reason abort and a proper end."""
    sent = ROLE + delta("a") + delta("", finish="abort")

    async def main() -> None:
        for pieces in ((sent, DONE), (sent + DONE,), (sent,)):
            async with rig_of(sends(*pieces)) as rig:
                answer = await ask(rig)
                assert answer.body.startswith(sent)
                assert b"[DONE]" not in answer.body
                assert error_code(answer) == "upstream_aborted"
                assert rig.walk.settled[0]["outcome"] == "upstream_aborted"
                assert rig.walk.settled[0]["finish"] == "abort"

    run(main())


def test_an_abort_of_a_whole_answer_is_marked_in_the_outcome() -> None:
    body = json.dumps({"choices": [{"index": 0, "message": {"content": "half"}, "finish_reason": "abort"}]}).encode()

    async def upstream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
        writer.write(head + body)
        await reader.read()

    async def main() -> None:
        async with rig_of(upstream) as rig:
            assert (await ask(rig, {"model": "m"})).body == body
            assert rig.walk.settled[0]["outcome"] == "upstream_aborted"

    run(main())


@pytest.mark.parametrize("rest", [b"", b'data: {"id":"c","cho', b"data"])
@pytest.mark.parametrize("close", [False, True])
def test_a_stream_that_breaks_off_says_so(rest: bytes, close: bool) -> None:
    """With or without the last chunk, between events or inside of one: whole events, an error, no [DONE]."""
    whole = ROLE + delta("a")

    async def main() -> None:
        async with rig_of(sends(*[p for p in (whole, rest) if p], close=close)) as rig:
            answer = await ask(rig)
            assert answer.body.startswith(whole + b'data: {"error":{')
            assert error_code(answer) == "truncated"
            assert rig.walk.settled[0]["outcome"] == "truncated"

    run(main())


@pytest.mark.parametrize(
    ("scan", "content", "check"),
    [
        (
            Scan.MESSAGES,
            b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"text":"a"}}\n\n',
            lambda a: last(a)["error"]["type"] == "api_error" and b"\nevent: error\n" in a.body,
        ),
        (
            Scan.RESPONSES,
            b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"a"}\n\n',
            lambda a: (
                (last(a)["type"], last(a)["sequence_number"], last(a)["response"]["status"])
                == ("response.failed", 2, "failed")
            ),
        ),
    ],
)
def test_each_dialect_has_its_own_last_event(scan: Scan, content: bytes, check: Callable[[Answer], bool]) -> None:
    async def main() -> None:
        async with rig_of(sends(content, content, close=True), scan=scan) as rig:
            answer = await ask(rig)
            assert answer.body.startswith(content + content)
            assert check(answer), answer.body

    run(main())


def test_a_dialect_without_such_an_event_has_its_framing_broken() -> None:
    token = b'data:{"index":1,"token":{"id":1,"text":"a"},"generated_text":null,"details":null}\n\n'

    async def main() -> None:
        for close in (False, True):
            async with rig_of(sends(token, close=close), scan=Scan.TGI) as rig:
                reader, writer = await rig.client()
                writer.write(post(STREAM))
                with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                    await read_answer(reader)
                writer.close()
                await until(lambda: rig.walk.settled != [], "settled")
                assert rig.walk.settled[0]["outcome"] == "truncated"

    run(main())


def test_an_error_inside_tgi_passes() -> None:
    token = b'data:{"index":1,"token":{"id":1,"text":"a"},"generated_text":null,"details":null}\n\n'
    error = b'data:{"error":"Request failed during generation","error_type":"generation"}\n\n'

    async def main() -> None:
        async with rig_of(sends(token, error), scan=Scan.TGI) as rig:
            answer = await ask(rig)
            assert answer.body == token + error
            assert rig.walk.settled[0]["outcome"] == "upstream_failed"

    run(main())


def test_after_the_terminator_a_missing_last_chunk_is_nobody_s_loss() -> None:
    async def main() -> None:
        async with rig_of(sends(ROLE, delta("a"), DONE, close=True)) as rig:
            answer = await ask(rig)
            assert answer.body == ROLE + delta("a") + DONE
            assert rig.walk.settled[0]["outcome"] == "complete"

    run(main())


@pytest.mark.parametrize("tail", [b"data: [DONE]", b"data: [DONE]\n", b"data:[DONE]\r"])
def test_a_terminator_without_an_empty_line_is_one(tail: bytes) -> None:
    async def main() -> None:
        async with rig_of(sends(ROLE, delta("a"), tail)) as rig:
            answer = await ask(rig)
            assert answer.body == ROLE + delta("a") + tail
            assert rig.walk.settled[0]["outcome"] == "complete"

    run(main())


def test_silence_after_content_is_cut_with_a_word() -> None:
    async def upstream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(HEAD + chunk(ROLE + delta("a")))
        while True:  # comments are no progress
            writer.write(chunk(b": still here\n\n"))
            await asyncio.sleep(0.02)

    async def main() -> None:
        async with rig_of(upstream, idle_ms=300) as rig:
            answer = await ask(rig)
            assert error_code(answer) == "upstream_timeout"
            assert rig.walk.settled[0]["outcome"] == "upstream_timeout"

    run(main())


def test_silence_before_content_is_a_timeout_of_the_walk() -> None:
    async def upstream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(HEAD + chunk(ROLE))
        await reader.read()

    async def main() -> None:
        async with rig_of(upstream, idle_ms=200) as rig:
            answer = await ask(rig)
            assert (answer.status, rig.walk.failures) == (502, ["timeout"])

    run(main())


def test_a_drain_that_is_over_says_so() -> None:
    async def upstream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(HEAD + chunk(ROLE + delta("a")))
        await reader.read()

    async def main() -> None:
        async with rig_of(upstream) as rig:
            reader, writer = await rig.client()
            writer.write(post(STREAM))
            head = await reader.readuntil(b"\r\n\r\n")
            size = int(await reader.readuntil(b"\r\n"), 16)
            await reader.readexactly(size + 2)
            rig.core.drain(0, 0)
            assert b"connection: close" not in head
            size = int(await reader.readuntil(b"\r\n"), 16)
            said = json.loads((await reader.readexactly(size)).removeprefix(b"data: "))
            assert said["error"]["code"] == "draining"
            assert await reader.read() == b"\r\n" + END
            writer.close()
            assert rig.walk.settled[0]["outcome"] == "draining"

    run(main())


@pytest.mark.parametrize("begun", [b"", HEAD, HEAD + chunk(ROLE)])
def test_a_drain_that_is_over_before_content_is_an_error(begun: bytes) -> None:
    async def upstream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(begun)
        assert await reader.read() == b"", "nobody generates for nobody"

    async def main() -> None:
        async with rig_of(upstream) as rig:
            reader, writer = await rig.client()
            writer.write(post(STREAM))
            await until(lambda: rig.upstream_connections == 1, "the upstream has it")
            await settled_at(lambda: rig.core.in_flight, 10)
            rig.core.drain(0, 0)
            answer = await read_answer(reader)
            assert (answer.status, answer.body, answer.fields["connection"]) == (503, b"draining", "close")
            assert await reader.read() == b""
            writer.close()
            assert rig.walk.settled[0]["outcome"] == "refused"

    run(main())


@pytest.mark.parametrize("step", [1000, 16_384, 100_000])
def test_an_event_of_two_megabytes_passes_and_is_stripped(step: int) -> None:
    big = delta("x" * 2_000_000, usage=usage(3, 7))
    pieces = [big[at : at + step] for at in range(0, len(big), step)]

    async def main() -> None:
        async with rig_of(sends(ROLE, *pieces, DONE), ask=EVERY) as rig:
            answer = await ask(rig)
            assert documents(answer.body) == without_usage(ROLE + big + DONE)
            assert rig.walk.settled[0]["usage"] == (3, 7)

    run(main())


def test_a_break_inside_a_long_event_breaks_the_framing() -> None:
    """Part of the event is sent: no event of ours can follow it."""

    async def main() -> None:
        async with rig_of(sends(ROLE, delta("x" * 200_000)[:150_000], close=True)) as rig:
            reader, writer = await rig.client()
            writer.write(post(STREAM))
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await read_answer(reader)
            writer.close()
            await until(lambda: rig.walk.settled != [], "settled")
            assert rig.walk.settled[0]["outcome"] == "truncated"

    run(main())


def test_a_stream_with_a_length_is_framed_anew() -> None:
    """Its length changes when usage is left out."""
    body = ROLE + delta("a") + event(choices=[], usage=usage(1, 1)) + DONE

    async def upstream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n" % len(body)
        writer.write(head + body)
        await reader.read()

    async def main() -> None:
        async with rig_of(upstream, ask=EVERY) as rig:
            answer = await ask(rig)
            assert answer.fields["transfer-encoding"] == "chunked"
            assert answer.body == ROLE + delta("a") + DONE

    run(main())


def test_a_client_of_http_1_0_gets_the_same_events() -> None:
    async def main() -> None:
        async with rig_of(sends(ROLE, delta("a", usage=usage(1, 1)), close=True), ask=EVERY) as rig:
            reader, writer = await rig.client()
            writer.write(post(STREAM, version="1.0"))
            answer = await read_answer(reader)
            assert "transfer-encoding" not in answer.fields
            assert documents(answer.body)[:2] == documents(ROLE + delta("a"))
            assert error_code(answer) == "truncated"
            writer.close()

    run(main())
