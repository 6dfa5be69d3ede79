"""Event streams of every shape, cut anywhere, against a model of what the client may see (SEMANTICS 3 and 4)."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ascproxy import _native
from ascproxy.gateway.rewrite import endings
from ascproxy.wire.operation import Scan
from tests.kit.rig import Rig, post, read_answer, read_request, run, until

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
ENDINGS = endings(Scan.OPENAI)
REST = b'data: {"choices":[{"ind'
LINE_ENDS = ("\n", "\r\n", "\r")


@dataclass(frozen=True)
class Event:
    """``kind``: role, content, final (usage of all), comment, error, abort or done. ``size`` pads it."""

    kind: str
    usage: bool = False
    size: int = 0

    def bytes(self, line_end: str) -> bytes:
        if self.kind == "comment":
            return f": {'x' * self.size}{line_end}{line_end}".encode()
        if self.kind == "done":
            return f"data: [DONE]{line_end}{line_end}".encode()
        return f"data: {json.dumps(self.document(), separators=(',', ':'))}{line_end}{line_end}".encode()

    def document(self) -> dict[str, Any]:
        if self.kind == "error":
            return {"error": {"message": "m", "code": 500}}
        usage = {"usage": {"prompt_tokens": 3, "completion_tokens": 5}} if self.usage or self.kind == "final" else {}
        if self.kind == "final":
            return {"choices": []} | usage
        text = {"content": "x" * (self.size + 1)}.get(self.kind, "")
        finish = "abort" if self.kind == "abort" else None
        return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]} | usage


@dataclass(frozen=True)
class Sent:
    """What a model server sends: events, the start of one more perhaps, and how the body ends."""

    events: tuple[Event, ...]
    line_end: str
    cuts: tuple[int, ...]
    rest: bool
    last_chunk: bool

    def body(self) -> bytes:
        whole = b"".join(e.bytes(self.line_end) for e in self.events)
        return whole + (REST if self.rest else b"")

    def pieces(self) -> list[bytes]:
        body = self.body()
        at = sorted({0, len(body), *(cut % (len(body) + 1) for cut in self.cuts)})
        return [body[start:end] for start, end in pairwise(at)]


@dataclass
class Seen:
    """What the client may see of it, as documents, and what is said of it afterwards."""

    status: int = 200
    documents: list[Any] = field(default_factory=list)
    outcome: str = ""


def expected(sent: Sent) -> Seen:
    seen = Seen()
    content = error = abort = done = ended = False
    for event in sent.events:
        if ended or event.kind == "comment":
            continue
        if done:  # what follows the terminator passes as it is
            seen.documents.append("[DONE]" if event.kind == "done" else event.document())
            continue
        content |= event.kind == "content"
        error |= event.kind == "error"
        abort |= event.kind == "abort"
        if event.kind == "done":
            if error or abort:
                ended = True
                continue
            done = True
            seen.documents.append("[DONE]")
        elif event.kind != "final":
            document = event.document()
            document.pop("usage", None)
            seen.documents.append(document)
    if not (content or error or done or ended):
        return Seen(502, [], "refused")
    if done:
        seen.outcome = "complete"
        seen.documents += ["rest"] * sent.rest
    elif error:
        seen.outcome = "upstream_failed"
    else:
        seen.outcome = "upstream_aborted" if abort else "truncated"
        seen.documents.append(json.loads(ENDINGS[seen.outcome][6:]))
    return seen


def documents(body: bytes) -> list[Any]:
    found = []
    for line in body.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n"):
        if line.startswith(b"data: "):
            found.append("[DONE]" if line == b"data: [DONE]" else "rest" if line == REST else json.loads(line[6:]))
    return found


KINDS = st.sampled_from(["role", "content", "content", "final", "comment", "error", "abort", "done"])
EVENTS = st.builds(Event, KINDS, st.booleans(), st.sampled_from([0, 0, 0, 1, 40, 1_000]))
STREAMS = st.builds(
    Sent,
    st.lists(EVENTS, max_size=8).map(tuple),
    st.sampled_from(LINE_ENDS),
    st.lists(st.integers(0, 1 << 16), max_size=12).map(tuple),
    st.booleans(),
    st.booleans(),
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(STREAMS, min_size=1, max_size=12))
def test_what_is_seen_of_a_stream_does_not_depend_on_how_it_came(streams: list[Sent]) -> None:
    async def upstream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            _, body = await read_request(reader)
            sent = streams[json.loads(body)["number"]]
            writer.write(HEAD)
            for piece in sent.pieces():
                writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                await asyncio.sleep(0)
            if not sent.last_chunk:
                return
            writer.write(b"0\r\n\r\n")

    async def main() -> None:
        async with Rig(upstream) as rig:
            rig.walk.plan = rig.make_plan(
                scan=_native.SCAN_OPENAI, ask=b'"include_usage":true', strip=True, endings=ENDINGS
            )
            reader, writer = await rig.client()  # one connection for all: each answer is framed to its end
            for number, sent in enumerate(streams):
                writer.write(post({"model": "m", "stream": True, "number": number}))
                answer = await read_answer(reader)
                should = expected(sent)
                assert answer.status == should.status
                if answer.status == 200:
                    assert documents(answer.body) == should.documents
                    assert b"usage" not in answer.body.partition(b"[DONE]")[0]
                await until(lambda: len(rig.walk.settled) == number + 1, "settled")  # noqa: B023
                assert rig.walk.settled[-1]["outcome"] == should.outcome
            writer.close()

    run(main())
