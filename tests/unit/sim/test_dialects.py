"""Both dialects under odd requests: whatever the JSON, an answer, and never an exception."""

from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ascproxy.sim.request import Reader
from ascproxy.sim.server import Server
from ascproxy.sim.settings import Settings

MESSAGES = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"c": {"type": "boolean"}}, "required": ["c"]}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]

BODIES: dict[str, dict[str, dict[str, Any]]] = {
    "vllm": {
        "/v1/chat/completions": {
            "model": "sim-chat", "messages": MESSAGES, "stream": False, "stream_options": None, "n": 1, "user": "u",
            "tools": TOOLS, "tool_choice": "required", "temperature": 1, "max_tokens": 3, "logprobs": True,
            "top_logprobs": 1, "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
            "max_completion_tokens": 3, "ignore_eos": False, "return_token_ids": True,
        },
        "/v1/completions": {
            "model": "sim-chat", "prompt": "a", "echo": True, "logprobs": 1, "n": 2, "max_tokens": 2, "stream": True,
        },
        "/v1/embeddings": {"input": ["a"], "dimensions": 8, "encoding_format": "float", "truncate_prompt_tokens": 2},
        "/v1/rerank": {"query": "a", "documents": ["a"], "top_n": 1},
        "/v1/responses": {"input": "a", "instructions": "b", "max_output_tokens": 2, "temperature": 1, "stream": True},
        "/v1/messages": {
            "messages": MESSAGES, "max_tokens": 2, "system": "s", "tools": [{"name": "f", "input_schema": SCHEMA}],
            "tool_choice": {"type": "any"}, "metadata": {"user_id": "u"}, "stream": False,
        },
        "/v1/messages/count_tokens": {"messages": MESSAGES, "system": "s"},
        "/tokenize": {"prompt": "a", "return_token_strs": True},
        "/detokenize": {"tokens": [1, 2]},
    },
    "tgi": {
        "/": {"inputs": "a", "stream": False, "parameters": {}},
        "/generate": {"inputs": "a", "parameters": {"details": True, "seed": 1, "do_sample": True}, "user": "u"},
        "/generate_stream": {"inputs": "a", "parameters": {"max_new_tokens": 2, "temperature": 1}},
        "/v1/chat/completions": {
            "messages": MESSAGES, "max_tokens": 2, "tools": TOOLS, "tool_choice": "required", "stream": True,
            "user": "u", "stream_options": {"include_usage": True},
        },
        "/v1/completions": {"prompt": "a", "max_tokens": 2, "stream": False, "user": "u"},
        "/tokenize": {"inputs": "a"},
        "/chat_tokenize": {"messages": MESSAGES},
    },
}  # fmt: skip
CASES = [(kind, path, member) for kind, paths in BODIES.items() for path, body in paths.items() for member in body]

scalars = st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | st.text(max_size=5)
odd = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.sampled_from(["type", "function", "name", "content", "schema", "user_id", "parameters", "x"]), inner, max_size=3,
), max_leaves=5)  # fmt: skip


def answer(kind: str, path: str, body: object, *headers: bytes) -> bytes:
    settings = Settings(type=kind, rate=0, tokens=4, recordings=Path("/nonexistent"))
    server = Server(settings, wall=lambda: 1795418401.0, entropy=bytes)
    raw = orjson.dumps(body)
    lines = [b"POST %b HTTP/1.1" % path.encode(), b"Host: s", b"Content-Type: application/json", *headers]
    reader = Reader()
    reader.feed(b"\r\n".join(lines) + b"\r\nContent-Length: %d\r\n\r\n%b" % (len(raw), raw))
    request = reader.next()
    assert request is not None
    reply, _ = server.reply(request, continued=False)
    return b"".join(data for _, data in reply.pieces)


@pytest.mark.parametrize(("kind", "path"), [(kind, path) for kind, paths in BODIES.items() for path in paths])
def test_the_untouched_bodies_are_answered(kind: str, path: str) -> None:
    assert answer(kind, path, BODIES[kind][path]).startswith(b"HTTP/1.1 200 ")


@given(case=st.sampled_from(CASES), value=odd)
@example(case=("vllm", "/v1/embeddings", "dimensions"), value=True)
def test_one_odd_member(case: tuple[str, str, str], value: object) -> None:
    kind, path, member = case
    made = answer(kind, path, {**BODIES[kind][path], member: value})
    assert made[:13] in (b"HTTP/1.1 200 ", b"HTTP/1.1 400 ", b"HTTP/1.1 404 ", b"HTTP/1.1 422 ")


@given(case=st.sampled_from(CASES), value=odd)
def test_odd_bodies(case: tuple[str, str, str], value: object) -> None:
    kind, path, member = case
    without = {name: given for name, given in BODIES[kind][path].items() if name != member}
    for body in (value, without):
        assert answer(kind, path, body)[:10] in (b"HTTP/1.1 2", b"HTTP/1.1 4")


def test_a_misspelt_failure_is_an_error() -> None:
    made = answer("vllm", "/v1/chat/completions", {"model": "sim-chat!bussy", "messages": MESSAGES})
    assert made.startswith(b"HTTP/1.1 400 ") and b"known failures are" in made
    assert answer("vllm", "/v1/messages", {}, b"x-sim-fail: stall:x").startswith(b"HTTP/1.1 400 ")


def test_an_aborted_message_has_no_stop_reason_and_no_tool() -> None:
    body = BODIES["vllm"]["/v1/messages"]
    made = orjson.loads(answer("vllm", "/v1/messages", body, b"x-sim-fail: abort").partition(b"\r\n\r\n")[2])
    assert "stop_reason" not in made and made["content"][0]["type"] == "text"
    made = orjson.loads(answer("vllm", "/v1/messages", body).partition(b"\r\n\r\n")[2])
    assert made["stop_reason"] == "tool_use"


def test_tgi_compares_keys_without_case_and_leaves_probes_open() -> None:
    settings = Settings(type="tgi", api_key="Key", rate=0)
    server = Server(settings, wall=lambda: 0.0, entropy=bytes)
    wanted = {b"bearer kEY": b"200", b"Bearer other": b"401", b"": b"401"}
    for given_key, status in wanted.items():
        reader = Reader()
        reader.feed(
            b"POST /generate HTTP/1.1\r\nHost: s\r\nContent-Type: application/json\r\n"
            b'Authorization: %b\r\nContent-Length: 14\r\n\r\n{"inputs":"a"}' % given_key
        )
        request = reader.next()
        assert request is not None
        reply, _ = server.reply(request, continued=False)
        made = b"".join(data for _, data in reply.pieces)
        assert made[9:12] == status
        assert status != b"401" or made.endswith(b"\r\n\r\n")
