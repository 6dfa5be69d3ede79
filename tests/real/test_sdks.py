"""What the SDKs make of a real vLLM's streams, tools and errors through the service, beyond ``test_vllm``."""

from __future__ import annotations

import ssl
from collections.abc import Iterator

import anthropic
import openai
import pytest

from tests.kit.service import Service
from tests.real.conftest import MODEL

pytestmark = pytest.mark.timeout(300)

SAID = [{"role": "user", "content": "What is a gateway?"}]
# Random weights say anything: that a tool is called, and which, is sure, and nothing about its arguments.
SCHEMA = {
    "type": "object",
    "properties": {"c": {"type": "boolean"}},
    "required": ["c"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def ai(service: Service) -> Iterator[openai.OpenAI]:
    http = openai.DefaultHttpxClient(verify=ssl.create_default_context(cafile=service.facts["ca"]))
    url = service.facts["https_url"] + "/v1"
    with openai.OpenAI(base_url=url, api_key=service.key, http_client=http, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(service: Service) -> Iterator[anthropic.Anthropic]:
    http = anthropic.DefaultHttpxClient(verify=ssl.create_default_context(cafile=service.facts["ca"]))
    url = service.facts["https_url"]
    with anthropic.Anthropic(base_url=url, api_key=service.key, http_client=http, max_retries=0) as client:
        yield client


def test_a_streamed_tool_call_is_put_together(ai: openai.OpenAI) -> None:
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}
    chosen = {"type": "function", "function": {"name": "get_weather"}}
    with ai.chat.completions.create(
        model=MODEL, messages=SAID, tools=[tool], tool_choice=chosen, max_tokens=40, stream=True
    ) as stream:
        parts = [call.function for e in stream if e.choices for call in e.choices[0].delta.tool_calls or []]
    assert [part.name for part in parts if part.name] == ["get_weather"]
    assert "".join(part.arguments or "" for part in parts)


def test_a_streamed_tool_use_is_put_together(claude: anthropic.Anthropic) -> None:
    tool = {"name": "get_weather", "input_schema": SCHEMA}
    with claude.messages.create(
        model=MODEL, messages=SAID, tools=[tool], tool_choice={"type": "any"}, max_tokens=80, stream=True
    ) as stream:
        events = list(stream)
    blocks = [event.content_block for event in events if event.type == "content_block_start"]
    assert blocks[0].type == "tool_use"
    assert blocks[0].name == "get_weather"
    assert events[-1].type == "message_stop"


def test_a_streamed_response_is_put_together(ai: openai.OpenAI) -> None:
    with ai.responses.stream(model=MODEL, input="light", max_output_tokens=12, temperature=0) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created"
    assert "response.output_text.delta" in kinds
    assert kinds[-1] in ("response.completed", "response.incomplete")
    assert final.usage is not None
    assert final.usage.output_tokens > 0


def test_models_are_those_that_the_key_may_use(ai: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    assert [model.id for model in ai.models.list()] == [MODEL]
    assert [model.id for model in claude.models.list()] == [MODEL]


def test_a_model_without_a_route_never_reaches_vllm(ai: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        ai.chat.completions.create(model="nope", messages=SAID)
    assert missing.value.response.headers["x-ascproxy-error"] == "model_not_found"
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="nope", max_tokens=4, messages=SAID)


def test_a_context_too_long_is_a_bad_request_to_both(ai: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    long = [{"role": "user", "content": "x " * 6000}]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="maximum context length is 2048"):
            ai.chat.completions.create(model=MODEL, messages=long, stream=stream)
    with pytest.raises(anthropic.BadRequestError, match="maximum context length is 2048"):
        claude.messages.create(model=MODEL, max_tokens=4, messages=long)
