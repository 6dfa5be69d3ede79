"""The OpenAI and Anthropic SDKs through the real service over HTTPS, unchanged but for base URL, key and CA file.

Issue "First light", Shows 2. The model server is the simulator, which speaks vLLM's wire as recorded.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.kit.service import Service, Simulator, first_light, wait_for

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


@pytest.mark.parametrize("stream", [False, True])
def test_tools_of_anthropic(claude: anthropic.Anthropic, stream: bool) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    asked = {
        "model": "sim-chat",
        "max_tokens": 64,
        "messages": MESSAGES,
        "tools": [{"name": "weather", "input_schema": schema}],
        "tool_choice": {"type": "tool", "name": "weather"},
    }
    if stream:
        with claude.messages.stream(**asked) as events:
            answer = events.get_final_message()
    else:
        answer = claude.messages.create(**asked)
    assert answer.stop_reason == "tool_use"
    (use,) = [block for block in answer.content if block.type == "tool_use"]
    assert use.name == "weather"
    assert isinstance(use.input, dict)


def test_a_mistyped_path_of_anthropic(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        claude.messages.batches.list()
    assert caught.value.body["error"]["type"] == "not_found_error"


# ---- as they are used ------------------------------------------------------------------------------------------------


def test_many_at_once_get_each_their_own(service: Service) -> None:
    async def ask(client: openai.AsyncOpenAI, n: int) -> None:
        marker = f"marker-{n:04d}-"
        if n % 2:
            answer = await client.chat.completions.create(model="sim-chat", messages=MESSAGES, user=marker)
            text = answer.choices[0].message.content or ""
        else:
            stream = await client.chat.completions.create(model="sim-chat", messages=MESSAGES, user=marker, stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
        assert marker in text

    async def main() -> None:
        verify = ssl.create_default_context(cafile=service.facts["ca"])
        async with openai.AsyncOpenAI(
            base_url=service.facts["https_url"] + "/v1",
            api_key=service.key,
            http_client=openai.DefaultAsyncHttpxClient(verify=verify),
            max_retries=0,
        ) as client:
            await asyncio.gather(*(ask(client, n) for n in range(100)))

    asyncio.run(main())


BY_ENVIRONMENT = """
import anthropic, openai
chat = openai.OpenAI().chat.completions.create(model="sim-chat", messages=[{"role": "user", "content": "x"}])
print(chat.choices[0].message.role)
words = [{"role": "user", "content": "x"}]
print(anthropic.Anthropic().messages.create(model="sim-chat", max_tokens=4, messages=words).role)
"""


def test_an_environment_is_all_that_an_application_needs(service: Service) -> None:
    """Nothing in the code: base URL, key and CA file by the variables that the SDKs read."""
    url, key = service.facts["https_url"], service.key
    environment = {
        "OPENAI_BASE_URL": url + "/v1",
        "OPENAI_API_KEY": key,
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_API_KEY": key,
        "SSL_CERT_FILE": service.facts["ca"],
    }
    done = subprocess.run(
        [sys.executable, "-c", BY_ENVIRONMENT], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.stdout, done.returncode) == ("assistant\nassistant\n", 0), done.stderr
    del environment["SSL_CERT_FILE"]  # and the certificate does matter
    done = subprocess.run(
        [sys.executable, "-c", BY_ENVIRONMENT], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert "CERTIFICATE_VERIFY_FAILED" in done.stderr


def test_errors_of_the_model_server_are_the_sdks_own(tmp_path: Path) -> None:
    with first_light(tmp_path, "--rate", "0", models=["sim-chat", "sim-chat!*"]) as (service, _):
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{service.http_port}/v1", api_key=service.key, max_retries=0)

        def ask(failure: str, **more: Any) -> Any:
            return client.chat.completions.create(model=f"sim-chat!{failure}", messages=MESSAGES, **more)

        with pytest.raises(openai.RateLimitError) as limited:
            ask("rate-limited:7")
        assert limited.value.response.headers["retry-after"] == "7"
        assert "x-ascproxy-error" not in limited.value.response.headers  # the provider's, not ours
        with pytest.raises(openai.InternalServerError):
            ask("busy")
        with pytest.raises(openai.InternalServerError) as refused:
            ask("unauthorized")  # never the caller's fault
        assert refused.value.code == "upstream_credential"
        with pytest.raises(openai.APIError):
            list(ask("error-frame:2", stream=True))
        assert ask("1xx:2").choices


# ---- broken off ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, Simulator]]:
    """Failures by the model's name; a server may be silent for a moment only."""

    def hurry(document: dict[str, Any]) -> None:
        for provider in document["providers"].values():
            provider["timeouts"] = {"between_tokens": "150ms"}

    with first_light(
        tmp_path_factory.mktemp("failing"), "--rate", "0", models=["sim-chat", "sim-chat!*"], resources=hurry
    ) as pair:
        yield pair


@pytest.fixture(scope="module")
def broken_ai(failing: tuple[Service, Simulator]) -> Iterator[openai.OpenAI]:
    url = f"http://127.0.0.1:{failing[0].http_port}/v1"
    with openai.OpenAI(base_url=url, api_key=failing[0].key, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def broken_claude(failing: tuple[Service, Simulator]) -> Iterator[anthropic.Anthropic]:
    url = f"http://127.0.0.1:{failing[0].http_port}"
    with anthropic.Anthropic(base_url=url, api_key=failing[0].key, max_retries=0) as client:
        yield client


def until_it_breaks(stream: Any, error: type[Exception]) -> tuple[list[Any], Any]:
    """What the iteration handed out, and what it raised then."""
    came = []
    with pytest.raises(error) as caught:
        for event in stream:
            came.append(event)
    return came, caught.value


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        ("truncate:3", "truncated"),
        ("reset:3", "truncated"),
        ("bad-chunk:3", "truncated"),
        ("stall:3", "upstream_timeout"),
        ("abort", "upstream_aborted"),
    ],
)
def test_a_broken_stream_raises(broken_ai: openai.OpenAI, failure: str, code: str) -> None:
    model = f"sim-chat!{failure}"
    chat = broken_ai.chat.completions.create(model=model, messages=MESSAGES, stream=True)
    came, error = until_it_breaks(chat, openai.APIError)
    assert any(chunk.choices and chunk.choices[0].delta.content for chunk in came)
    assert error.code == code
    came, error = until_it_breaks(
        broken_ai.completions.create(model=model, prompt="light", stream=True), openai.APIError
    )
    assert came[0].choices[0].text
    assert error.code == code


@pytest.mark.parametrize(
    ("failure", "code"),
    [("truncate:6", "truncated"), ("bad-chunk:6", "truncated"), ("stall:6", "upstream_timeout")],
)
def test_a_broken_response_ends_as_failed(broken_ai: openai.OpenAI, failure: str, code: str) -> None:
    """This SDK raises nothing by itself here: the last event says it, and none says that the response is complete."""
    model = f"sim-chat!{failure}"
    with broken_ai.responses.create(model=model, input="light", stream=True) as stream:
        came = list(stream)
    assert [event.sequence_number for event in came] == list(range(len(came)))
    assert "response.completed" not in [event.type for event in came]
    assert came[-1].type == "response.failed"
    assert came[-1].response.error is not None
    assert came[-1].response.error.code == code
    with broken_ai.responses.stream(model=model, input="light") as helped, pytest.raises(RuntimeError):
        helped.get_final_response()


@pytest.mark.parametrize(
    ("failure", "kind"),
    [("truncate:4", "api_error"), ("bad-chunk:4", "api_error"), ("stall:4", "timeout_error")],
)
def test_a_broken_message_raises(broken_claude: anthropic.Anthropic, failure: str, kind: str) -> None:
    asked = {"model": f"sim-chat!{failure}", "max_tokens": 64, "messages": MESSAGES}
    came, error = until_it_breaks(broken_claude.messages.create(**asked, stream=True), anthropic.APIStatusError)
    assert came[-1].type == "content_block_delta"
    assert error.body["error"]["type"] == kind
    with broken_claude.messages.stream(**asked) as helped:
        words, error = until_it_breaks(helped.text_stream, anthropic.APIStatusError)
    assert "".join(words)
    assert error.body["error"]["type"] == kind


def test_a_stream_that_breaks_before_content_is_an_error_answer(
    broken_ai: openai.OpenAI, broken_claude: anthropic.Anthropic
) -> None:
    """Nothing has been handed out, so the SDK may ask again, and does unless it is told not to."""
    with pytest.raises(openai.InternalServerError) as caught:
        broken_ai.chat.completions.create(model="sim-chat!truncate:1", messages=MESSAGES, stream=True)
    assert (caught.value.status_code, caught.value.code) == (502, "upstream_unreachable")
    with pytest.raises(openai.InternalServerError) as caught:
        broken_ai.responses.create(model="sim-chat!stall:4", input="light", stream=True)
    assert (caught.value.status_code, caught.value.code) == (504, "upstream_timeout")
    with pytest.raises(anthropic.APIStatusError) as refused:
        broken_claude.messages.create(model="sim-chat!truncate:2", max_tokens=64, messages=MESSAGES, stream=True)
    assert refused.value.status_code == 502
    assert refused.value.response.headers["x-ascproxy-error"] == "upstream_unreachable"


def test_an_answer_that_is_cut_is_a_connection_error(
    failing: tuple[Service, Simulator], broken_ai: openai.OpenAI, broken_claude: anthropic.Anthropic
) -> None:
    model = "sim-chat!truncate:3"
    with pytest.raises(openai.APIConnectionError):
        broken_ai.chat.completions.create(model=model, messages=MESSAGES)
    with pytest.raises(openai.APIConnectionError):
        broken_ai.responses.create(model=model, input="light")
    with pytest.raises(anthropic.APIConnectionError):
        broken_claude.messages.create(model=model, max_tokens=64, messages=MESSAGES)
    before = failing[1].stats()["requests"]
    with pytest.raises(openai.APIConnectionError):
        broken_ai.with_options(max_retries=1).chat.completions.create(model=model, messages=MESSAGES)
    assert failing[1].stats()["requests"] - before == 2  # the SDK asks again by itself
    before = failing[1].stats()["requests"]
    with pytest.raises(openai.APIError):
        list(broken_ai.with_options(max_retries=1).chat.completions.create(model=model, messages=MESSAGES, stream=True))
    assert failing[1].stats()["requests"] - before == 1  # but not once a stream has begun


def test_a_stream_that_is_left_stops_the_model_server(tmp_path: Path) -> None:
    with first_light(tmp_path, "--rate", "50", "--tokens", "5000") as (service, simulator):
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{service.http_port}/v1", api_key=service.key)
        with client.chat.completions.create(model="sim-chat", messages=MESSAGES, stream=True) as stream:
            next(iter(stream))
            assert simulator.stats()["running"] == 1
        wait_for(lambda: simulator.stats()["running"] == 0, "the simulator stops", 1)
        assert simulator.stats()["aborted"] == 1


# ---- others ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(service: Service) -> None:
    body = '{"model":"sim-chat","stream":true,"messages":[{"role":"user","content":"x"}]}'
    argv = ["curl", "-sS", "-N", "--cacert", service.facts["ca"], "-H", f"authorization: Bearer {service.key}"]
    argv += ["-H", "content-type: application/json"]
    done = subprocess.run(
        [*argv, "-d", body, service.facts["https_url"] + "/v1/chat/completions"],
        capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("data: [DONE]\n\n")
    large = json.dumps({"model": "sim-chat", "messages": [{"role": "user", "content": "x" * 200_000}]})
    done = subprocess.run(  # curl asks by itself before it sends a large body
        [*argv, "-H", "expect: 100-continue", "-d", "@-", service.facts["https_url"] + "/v1/chat/completions"],
        input=large, capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout).get("usage", {}).get("completion_tokens") == 16, done.stdout


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
