"""What a real vLLM sends is what a caller gets: the same request straight to vLLM and through the service.

Both answers are compared byte for byte once the names and times that vLLM makes up anew for each are taken out. What
the access line counted has to be what the answer itself says.
"""

from __future__ import annotations

import http.client
import json
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kit.service import Service
from tests.real.access import access_line
from tests.real.conftest import MODEL, Vllm

pytestmark = pytest.mark.timeout(300)

CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
UNKNOWN = "not-served"  # a model that the service routes to vLLM and vLLM does not have
SAID = [{"role": "system", "content": "You are terse."}, {"role": "user", "content": "What is a gateway?"}]
ASKED = {"messages": SAID, "max_tokens": 12, "temperature": 0, "seed": 1}
USER = {"messages": SAID[1:], "max_tokens": 12, "temperature": 0}
LONG = [{"role": "user", "content": "x " * 6000}]
FUNCTION = {
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {"c": {"type": "boolean"}},
        "required": ["c"],
        "additionalProperties": False,
    },
}
TOOL = {"tools": [{"type": "function", "function": FUNCTION}], "max_tokens": 200}
CLAUDE_TOOL = {"tools": [{"name": "get_weather", "input_schema": FUNCTION["parameters"]}], "max_tokens": 200}
CHOSEN = {"type": "tool", "name": "get_weather"}  # by the schema: of "any" the model may make a call that vLLM refuses
STREAM = {"stream": True}
USAGE = STREAM | {"stream_options": {"include_usage": True}}
EACH = STREAM | {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}

# name: (path, body, status that vLLM gives)
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "chat": (CHAT, ASKED, 200),
    "chat-n2-logprobs": (CHAT, ASKED | {"n": 2, "temperature": 1, "logprobs": True, "top_logprobs": 2}, 200),
    "chat-unknown-fields": (CHAT, ASKED | {"top_k": 5, "min_p": 0.0, "metadata": {"a": "b"}}, 200),
    "chat-json-schema": (
        CHAT,
        ASKED
        | {"response_format": {"type": "json_schema", "json_schema": {"name": "f", "schema": FUNCTION["parameters"]}}},
        200,
    ),
    "chat-tool-named": (
        CHAT,
        ASKED | TOOL | {"tool_choice": {"type": "function", "function": {"name": "get_weather"}}},
        200,
    ),
    "chat-tool-required": (CHAT, ASKED | TOOL | {"tool_choice": "required"}, 200),
    "chat-stream": (CHAT, ASKED | STREAM, 200),
    "chat-stream-usage": (CHAT, ASKED | USAGE, 200),
    "chat-stream-usage-in-each": (CHAT, ASKED | EACH, 200),
    "chat-stream-tool-required": (CHAT, ASKED | TOOL | USAGE | {"tool_choice": "required"}, 200),
    "completions": (COMPLETIONS, {"prompt": "light", "max_tokens": 12, "temperature": 0}, 200),
    "completions-of-two": (COMPLETIONS, {"prompt": ["light", "dark"], "max_tokens": 12, "temperature": 0}, 200),
    "completions-stream": (COMPLETIONS, {"prompt": "light", "max_tokens": 12, "temperature": 0} | USAGE, 200),
    "responses": (RESPONSES, {"input": "light", "max_output_tokens": 12, "temperature": 0}, 200),
    "responses-stream": (RESPONSES, {"input": "light", "max_output_tokens": 12, "temperature": 0} | STREAM, 200),
    "messages": (MESSAGES, USER | {"system": "You are terse."}, 200),
    "messages-stream": (MESSAGES, USER | STREAM, 200),
    "messages-tool": (MESSAGES, USER | CLAUDE_TOOL | {"tool_choice": CHOSEN}, 200),
    "messages-stream-tool": (MESSAGES, USER | CLAUDE_TOOL | STREAM | {"tool_choice": CHOSEN}, 200),
    "count-tokens": ("/v1/messages/count_tokens", {"messages": SAID[1:]}, 200),
    "tokenize": ("/tokenize", {"prompt": "light"}, 200),
    "detokenize": ("/detokenize", {"tokens": [40, 41, 42]}, 200),
    "context-too-long": (CHAT, {"messages": LONG}, 400),
    "context-too-long-stream": (CHAT, {"messages": LONG} | STREAM, 400),
    "context-too-long-messages": (MESSAGES, {"messages": LONG, "max_tokens": 12}, 400),
    "max-tokens-too-large": (CHAT, ASKED | {"max_tokens": 100_000}, 400),
    "temperature-out-of-range": (CHAT, ASKED | {"temperature": -1}, 400),
    "messages-missing": (CHAT, {"max_tokens": 12}, 400),
    "model-unknown-to-vllm": (CHAT, ASKED | {"model": UNKNOWN}, 404),
    "model-unknown-to-vllm-messages": (MESSAGES, USER | {"model": UNKNOWN}, 404),
    "model-unknown-to-vllm-responses": (RESPONSES, {"model": UNKNOWN, "input": "light"}, 404),
    "embeddings-of-a-chat-model": ("/v1/embeddings", {"input": "light"}, 404),
}
# What vLLM makes up for each answer: times, and names of 16 or 32 hexadecimal digits (some after its request id).
MADE_UP = [
    (re.compile(rb'"(created|created_at|completed_at)": ?[0-9.]+'), rb'"\1":0'),
    (
        re.compile(
            rb"(?<![0-9a-f])(?:[0-9a-f]{32}|[0-9a-f]{16}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})(?![0-9a-f])"
        ),
        b"NAME",
    ),
]


def plain(body: bytes) -> bytes:
    """An answer without what vLLM makes up."""
    for pattern, replacement in MADE_UP:
        body = pattern.sub(replacement, body)
    return body


def without_space(body: bytes) -> bytes:
    """Without white space, and without what vLLM puts into the last of its events, which is the one with the usage."""
    return re.sub(rb',"system_fingerprint":"[^"]*"', b"", plain(body)).replace(b" ", b"")


def usage(body: bytes) -> tuple[int, int] | None:
    """The last count of tokens that an answer of any dialect gives: those read, those written.

    Anthropic's streams give the first at their beginning and both at their end.
    """
    spelled = {"prompt_tokens": "in", "input_tokens": "in", "completion_tokens": "out", "output_tokens": "out"}
    found: dict[str, int] = {}
    for text in re.findall(rb'"usage":(\{"[^{}]*(?:\{[^{}]*\}[^{}]*)*\})', body):
        members = json.loads(text)
        found |= {ours: members[theirs] for theirs, ours in spelled.items() if theirs in members}
    return (found["in"], found["out"]) if len(found) == 2 else None


@pytest.fixture(scope="module")
def gateway(vllm: Vllm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that also routes a model to vLLM that vLLM does not have."""
    folder = tmp_path_factory.mktemp("faithful") / "d"
    with Service(folder, upstream=vllm.url, models=[MODEL, UNKNOWN]) as service:
        yield service


def straight(vllm: Vllm, path: str, body: bytes, request_id: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", vllm.port, timeout=60)
    try:
        connection.request("POST", path, body, {"content-type": "application/json", "x-request-id": request_id})
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    finally:
        connection.close()


@pytest.mark.parametrize("case", CASES)
def test_an_answer_is_what_vllm_sent_and_counted_as_it_says(gateway: Service, vllm: Vllm, case: str) -> None:
    path, members, status = CASES[case]
    body = json.dumps({"model": MODEL} | members).encode()
    straight(vllm, path, body, uuid.uuid4().hex)  # from now on the prompt is cached, for both alike
    its = straight(vllm, path, body, uuid.uuid4().hex)
    name = uuid.uuid4().hex
    ours = gateway.ask(path, body, x_request_id=name)
    assert (its[0], ours[0]) == (status, status), ours[2]
    if "stream" in members and "stream_options" not in members:  # where usage was that only the gateway asked for
        assert without_space(ours[2]) == without_space(its[2])
    else:
        assert plain(ours[2]) == plain(its[2])
    assert ours[1]["content-type"] == its[1]["content-type"]
    assert ours[1]["x-request-id"] == name
    assert not {"server", "vary", "x-ascproxy-error", "set-cookie"} & set(ours[1])

    line = access_line(gateway, name)
    assert (line["status"], line["upstream_status"], line["outcome"]) == (status, status, "complete")
    assert line["attempts"] == 1
    says = usage(ours[2])
    if says is not None:
        assert (line["tokens_in"], line["tokens_out"]) == says
    elif "stream" in members and path in (CHAT, "/v1/completions") and status == 200:
        assert line["tokens_in"] > 0
        assert line["tokens_out"] > 0
        assert line["usage_source"] == "reported"
    else:
        assert "tokens_in" not in line


def test_every_dialect_gives_a_count(gateway: Service) -> None:
    """So that the test above compares something: each generating operation says how many tokens it took."""
    for case in (
        "chat",
        "chat-stream-usage",
        "completions",
        "responses",
        "responses-stream",
        "messages",
        "messages-stream",
    ):
        path, members, _ = CASES[case]
        read, written = usage(gateway.ask(path, {"model": MODEL} | members)[2]) or (0, 0)
        assert read > 0, case
        assert written > 0, case


def test_the_folder_of_recordings_is_what_this_vllm_still_says(gateway: Service) -> None:
    """The simulator answers from recordings of vLLM: members of one answer, recorded and real, are the same."""
    recorded = (Path(__file__).parents[1] / "wire/vllm-chat-unary.response.txt").read_bytes().split(b"\r\n\r\n", 1)[1]
    real = json.loads(gateway.ask(CHAT, {"model": MODEL} | ASKED)[2])
    assert set(real) == set(json.loads(recorded))
    assert set(real["choices"][0]) == set(json.loads(recorded)["choices"][0])
