"""The OpenAI and Anthropic SDKs through the real service over HTTPS, unchanged but for base URL, key and CA file.

Issue "First light", Shows 2. The model server is the simulator, which speaks vLLM's wire as recorded.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path

import anthropic
import httpx
import openai
import pytest

from tests.kit.service import Service, Simulator, first_light

MESSAGES = [{"role": "user", "content": "Say something about light."}]
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, Simulator]]:
    with first_light(tmp_path_factory.mktemp("sdks"), "--rate", "0") as pair:
        yield pair


@pytest.fixture(scope="module")
def service(running: tuple[Service, Simulator]) -> Service:
    return running[0]


@pytest.fixture(scope="module")
def ai(service: Service) -> Iterator[openai.OpenAI]:
    verify = ssl.create_default_context(cafile=service.facts["ca"])
    with openai.OpenAI(
        base_url=service.facts["https_url"] + "/v1",
        api_key=service.key,
        http_client=openai.DefaultHttpxClient(verify=verify),
        max_retries=0,
    ) as client:
        yield client


@pytest.fixture(scope="module")
def claude(service: Service) -> Iterator[anthropic.Anthropic]:
    verify = ssl.create_default_context(cafile=service.facts["ca"])
    with anthropic.Anthropic(
        base_url=service.facts["https_url"],
        api_key=service.key,
        http_client=anthropic.DefaultHttpxClient(verify=verify),
        max_retries=0,
    ) as client:
        yield client


# ---- OpenAI ----------------------------------------------------------------------------------------------------------


def test_chat(ai: openai.OpenAI) -> None:
    answer = ai.chat.completions.create(model="sim-chat", messages=MESSAGES, user="it-is-me")
    assert "it-is-me" in (answer.choices[0].message.content or "")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


def test_chat_stream(ai: openai.OpenAI) -> None:
    chunks = list(
        ai.chat.completions.create(
            model="sim-chat", messages=MESSAGES, user="me", stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert "me" in text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 16
    assert chunks[-2].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_tools(ai: openai.OpenAI, stream: bool) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    asked = {"model": "sim-chat", "messages": MESSAGES, "tools": [TOOL], "tool_choice": choice}
    if stream:
        with ai.chat.completions.create(**asked, stream=True) as events:
            calls = [c for e in events if e.choices for c in e.choices[0].delta.tool_calls or []]
        assert calls[0].function is not None
        assert calls[0].function.name == "weather"
    else:
        call = ai.chat.completions.create(**asked).choices[0].message.tool_calls
        assert call is not None
        assert call[0].function.name == "weather"


def test_completions(ai: openai.OpenAI) -> None:
    assert ai.completions.create(model="sim-chat", prompt="light").choices[0].text


def test_embeddings(ai: openai.OpenAI) -> None:
    answer = ai.embeddings.create(model="sim-chat", input=["one", "two"])
    assert len(answer.data) == 2
    assert all(isinstance(x, float) for x in answer.data[1].embedding)


def test_responses(ai: openai.OpenAI) -> None:
    assert ai.responses.create(model="sim-chat", input="light").output_text
    with ai.responses.create(model="sim-chat", input="light", stream=True) as events:
        kinds = [event.type for event in events]
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"


def test_models(ai: openai.OpenAI) -> None:
    assert [model.id for model in ai.models.list()] == ["sim-chat"]
    assert ai.models.retrieve("sim-chat").id == "sim-chat"


def test_a_wrong_key_is_an_authentication_error(ai: openai.OpenAI) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        ai.with_options(api_key="sk-wrong").chat.completions.create(model="sim-chat", messages=MESSAGES)
    assert caught.value.code == "invalid_api_key"
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_an_unknown_model_is_a_not_found_error(ai: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        ai.chat.completions.create(model="no-such-model", messages=MESSAGES)
    assert caught.value.code == "model_not_found"
    assert "no-such-model" in caught.value.message


def test_an_unknown_path_is_a_not_found_error(ai: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        ai.files.list()
    assert caught.value.code == "unknown_path"


# ---- Anthropic -------------------------------------------------------------------------------------------------------


def test_messages(claude: anthropic.Anthropic) -> None:
    answer = claude.messages.create(model="sim-chat", max_tokens=8, messages=MESSAGES)
    assert answer.content[0].type == "text"
    assert answer.usage.output_tokens == 8


def test_messages_stream(claude: anthropic.Anthropic) -> None:
    with claude.messages.stream(model="sim-chat", max_tokens=8, messages=MESSAGES) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text
    assert final.usage.output_tokens == 8


def test_count_tokens(claude: anthropic.Anthropic) -> None:
    assert claude.messages.count_tokens(model="sim-chat", messages=MESSAGES).input_tokens > 0


def test_models_in_the_shape_of_anthropic(claude: anthropic.Anthropic) -> None:
    assert [model.id for model in claude.models.list()] == ["sim-chat"]


def test_errors_are_those_that_anthropic_names(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        claude.messages.create(model="no-such-model", max_tokens=8, messages=MESSAGES)
    assert missing.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.AuthenticationError):
        claude.with_options(api_key="wrong").messages.create(model="sim-chat", max_tokens=8, messages=MESSAGES)


# ---- others ----------------------------------------------------------------------------------------------------------


def test_httpx_keeps_one_connection(service: Service) -> None:
    verify = ssl.create_default_context(cafile=service.facts["ca"])
    with httpx.Client(base_url=service.facts["https_url"], verify=verify) as client:
        for n in range(20):
            answer = client.post(
                "/tokenize",
                json={"model": "sim-chat", "prompt": f"number {n}"},
                headers={"authorization": f"Bearer {service.key}"},
            )
            assert answer.json()["count"] > 0
        pool = client._transport._pool  # type: ignore[attr-defined]
        assert len(pool.connections) == 1


def test_tgi_speaks_its_own_wire(tmp_path: Path) -> None:
    with first_light(tmp_path, "--type", "tgi", "--rate", "0", type="tgi") as (service, _):
        status, headers, body = service.ask("/generate", {"inputs": "light", "parameters": {"max_new_tokens": 5}})
        assert status == 200
        assert b"generated_text" in body
        assert headers["x-generated-tokens"] == "5"
        status, headers, body = service.ask("/generate_stream", {"inputs": "light"})
        assert status == 200
        assert headers["content-type"].startswith("text/event-stream")
        assert b'"generated_text":"' in body.replace(b'": ', b'":').rsplit(b"data:", 1)[1]
        status, _, body = service.ask("/v1/embeddings", {"model": "sim-chat", "input": "x"})
        assert status == 404
        assert b"operation_not_supported" in body
