"""The simulator's answers against the recordings of a real vLLM, asked with the recorded requests.

Errors must be equal in every byte of their body; answers must have the same status, the same headers in the same order,
the same framing, and the same members in the same order, null where the recording has null.
"""

import re
from pathlib import Path

import orjson
import pytest

from ascproxy.sim.failure import Failure
from ascproxy.sim.recording import CONTINUE, Shelf
from ascproxy.sim.request import Reader
from ascproxy.sim.server import Server
from ascproxy.sim.settings import Settings

WIRE = Path(__file__).parents[2] / "wire"
NAMES = [path.name.removesuffix(".request.txt").removeprefix("vllm-") for path in sorted(WIRE.glob("*.request.txt"))]

# Recordings that the simulator does not answer alike, and why.
UNLIKE = {
    "err-chat-on-embedding-model": "the simulator's models serve every operation",
    "err-embeddings-on-generate-model": "the simulator's models serve every operation",
    "messages-tool-any": "the real model's noise was no valid tool input; the simulator's is",
    "completions-echo-logprobs": "log probabilities of the prompt are not simulated",
    "midstream-unary-sigterm": "of its kind there is test_abort",
    "midstream-sigterm-HUNG-1of5": "has a cut",
}
# Servers that ran without --enable-request-id-headers.
NO_IDS = re.compile(r"embeddings-(?!on)|err-queue-full|err-\w+-api-key|api-key-|health-while")
VARYING = {b"date", b"content-length", b"x-request-id"}


def server_for(name: str) -> Server:
    settings = Settings(
        models=("tiny",),
        tokens=60,
        rate=0,
        api_key="sk-test" if "api-key" in name else None,
        fail=Failure.parse("busy") if name.startswith("err-queue-full") else None,
        recordings=WIRE,
        max_model_len=2048,
        request_ids=NO_IDS.match(name) is None,
    )
    return Server(settings, wall=lambda: 1795418401.0, entropy=lambda size: bytes(range(size)))


def ask(server: Server, raw: bytes) -> bytes:
    reader = Reader()
    reader.feed(raw)
    request = reader.next()
    assert request is not None
    reply, _ = server.reply(request, continued=False)
    return b"".join(data for _, data in reply.pieces)


def chunks(body: bytes) -> list[bytes]:
    found = []
    while True:
        line, _, rest = body.partition(b"\r\n")
        size = int(line, 16)
        assert rest[size : size + 2] == b"\r\n"
        if size == 0:
            assert rest == b"\r\n"
            return found
        found.append(rest[:size])
        body = rest[size + 2 :]


def parts(response: bytes) -> tuple[bytes, list[tuple[bytes, bytes]], bytes]:
    head, _, body = response.removeprefix(CONTINUE).partition(b"\r\n\r\n")
    line, *fields = head.split(b"\r\n")
    headers = []
    for field in fields:
        name, _, value = field.partition(b": ")
        headers.append((name, b"*" if name in VARYING else value))
    return line, headers, body


def shape(value: object) -> object:
    """Member names in order; for a leaf only whether it is null; for a list the shapes that occur in it."""
    if isinstance(value, dict):
        return [(name, shape(member)) for name, member in value.items()]
    if isinstance(value, list):
        shapes: list[object] = []
        for item in value:
            if isinstance(item, dict | list) and shape(item) not in shapes:
                shapes.append(shape(item))
        return ["list", *shapes]
    return "null" if value is None else "value"


def event_shape(event: bytes) -> tuple[bytes, object]:
    kind, _, data = event.rpartition(b"data: ")
    return (kind, shape(orjson.loads(data)) if data != b"[DONE]\n\n" else data)


def stream_shape(body: bytes) -> list[tuple[bytes, object]]:
    shapes: list[tuple[bytes, object]] = []
    for chunk in chunks(body):
        assert chunk.endswith(b"\n\n") and chunk.count(b"\n\n") == 1, "one chunk per event"
        if (now := event_shape(chunk)) not in shapes[-1:]:
            shapes.append(now)
    return shapes


@pytest.mark.parametrize("name", [name for name in NAMES if name not in UNLIKE])
def test_answer_is_like_the_recording(name: str) -> None:
    recorded = (WIRE / f"vllm-{name}.response.txt").read_bytes()
    made = ask(server_for(name), (WIRE / f"vllm-{name}.request.txt").read_bytes())
    line, headers, body = parts(recorded)
    made_line, made_headers, made_body = parts(made)
    assert (made_line, made_headers) == (line, headers)
    if (b"transfer-encoding", b"chunked") in headers:
        assert stream_shape(made_body) == stream_shape(body)
    elif b" 200 " in line and body:
        assert shape(orjson.loads(made_body)) == shape(orjson.loads(body))
    else:
        assert made_body == body


def test_the_list_of_unlike_recordings_is_true() -> None:
    assert set(UNLIKE) <= set(NAMES)


@pytest.mark.parametrize("name", ["chat-unary", "chat-stream", "messages-stream"])
def test_answer_differs_where_the_recording_does(name: str) -> None:
    """The comparison can fail: another order of members, one member less, another chunking."""
    recorded = (WIRE / f"vllm-{name}.response.txt").read_bytes()
    *_, body = parts(recorded)
    if name == "chat-unary":
        whole = orjson.loads(body)
        assert shape(dict(reversed(whole.items()))) != shape(whole)
        assert shape({**whole, "usage": None}) != shape(whole)
    else:
        first = chunks(body)[0]
        assert event_shape(first) != event_shape(chunks(body)[1])


def test_killed_engine_ends_a_stream_as_observed() -> None:
    raw = (WIRE / "vllm-chat-stream.request.txt").read_bytes()
    server = server_for("chat-stream")
    server.settings.fail = Failure.parse("error-frame:3")
    made = ask(server, raw)
    tail = (WIRE / "vllm-midstream-engine-killed.OBSERVED-TAIL.txt").read_bytes()
    assert made.endswith(tail)
    assert len(chunks(parts(made)[2])) == 3 + 2


def test_abort_ends_a_stream_as_observed() -> None:
    server = server_for("chat-stream")
    server.settings.fail = Failure.parse("abort")
    made = ask(server, (WIRE / "vllm-chat-stream.request.txt").read_bytes())
    tail = (WIRE / "vllm-midstream-sigterm-stream.OBSERVED-TAIL.txt").read_bytes()
    observed = tail.partition(b"\n\n")[0] + b"\n\n"
    *_, last, done = chunks(parts(made)[2])
    assert event_shape(last) == event_shape(observed)
    assert b'"finish_reason":"abort"' in last and b'"content":""' in last
    assert done == b"data: [DONE]\n\n"


def test_abort_of_a_unary_answer_is_a_200_with_less_text() -> None:
    server = server_for("chat-unary")
    server.settings.fail = Failure.parse("abort")
    line, _, body = parts(ask(server, (WIRE / "vllm-chat-unary.request.txt").read_bytes()))
    recorded = (WIRE / "vllm-midstream-unary-sigterm.response-tail.txt").read_bytes()
    assert line == parts(recorded)[0]
    answer = orjson.loads(body)
    wanted = orjson.loads(parts(recorded)[2])
    # The recorded server ran without --enable-prompt-tokens-details.
    wanted["usage"]["prompt_tokens_details"] = answer["usage"]["prompt_tokens_details"]
    assert shape(answer) == shape(wanted)
    assert answer["choices"][0]["finish_reason"] == "abort"
    assert answer["usage"]["completion_tokens"] == 6


def test_every_whole_recording_is_replayed_to_the_byte() -> None:
    server = server_for("chat-unary")
    names = server.shelf.names()
    assert len(names) >= 70
    for name in names:
        path = WIRE / f"{name}.response.txt"
        if not path.exists():
            path = WIRE / f"{name}.response-tail.txt"
        raw = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nx-sim-wire: %b\r\n\r\n" % name.encode()
        assert ask(server, raw) == path.read_bytes()


@pytest.mark.parametrize(
    "raw",
    [
        b"GET /generate?wire=chat-unary HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 29\r\n\r\n" + b'{"model": "wire:chat-unary" }',
    ],
)
def test_a_recording_is_named_in_the_query_or_by_the_model(raw: bytes) -> None:
    assert ask(server_for("x"), raw) == (WIRE / "vllm-chat-unary.response.txt").read_bytes()


def test_unknown_and_cut_recordings_are_a_404() -> None:
    for name in (b"nope", b"midstream-sigterm-HUNG-1of5", b"../../../pyproject", b"midstream-engine-killed"):
        made = ask(server_for("x"), b"GET / HTTP/1.1\r\nHost: a\r\nx-sim-wire: %b\r\n\r\n" % name)
        assert made.startswith(b"HTTP/1.1 404 ")


def test_a_recording_that_ended_with_a_close_says_so() -> None:
    shelf = Shelf(WIRE)
    closed = {name for name in shelf.names() if (found := shelf.find(name)) is not None and found.closed}
    assert closed == {
        "vllm-chat-unary-conn-close",
        "vllm-chat-unary-http10",
        "vllm-chat-stream-http10",
        "vllm-midstream-unary-sigterm",
    }
