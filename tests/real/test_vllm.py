"""The SDKs against a real vLLM through the real service, and what vLLM sees when a caller goes away.

The model is tiny and its weights are random: texts are noise, everything else is real.
"""

from __future__ import annotations

import json
import socket
import ssl
import time
from collections.abc import Iterator

import anthropic
import openai
import pytest

from tests.kit.rig import post
from tests.kit.service import Service, wait_for
from tests.real.conftest import MODEL, Vllm

MESSAGES = [{"role": "user", "content": "Say something about light."}]
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def ai(service: Service) -> Iterator[openai.OpenAI]:
    verify = ssl.create_default_context(cafile=service.facts["ca"])
    http = openai.DefaultHttpxClient(verify=verify)
    url = service.facts["https_url"] + "/v1"
    with openai.OpenAI(base_url=url, api_key=service.key, http_client=http, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(service: Service) -> Iterator[anthropic.Anthropic]:
    verify = ssl.create_default_context(cafile=service.facts["ca"])
    http = anthropic.DefaultHttpxClient(verify=verify)
    url = service.facts["https_url"]
    with anthropic.Anthropic(base_url=url, api_key=service.key, http_client=http, max_retries=0) as client:
        yield client


def access_line(service: Service, request_id: str) -> dict:
    def find() -> dict | None:
        for line in service.out.read_text().splitlines():
            if request_id in line and '"kind":"access"' in line:
                found = json.loads(line)
                assert isinstance(found, dict)
                return found
        return None

    found = wait_for(find, f"an access line of {request_id}", 5)
    assert isinstance(found, dict)
    return found


def test_chat_counts_what_vllm_counts(ai: openai.OpenAI, service: Service) -> None:
    raw = ai.chat.completions.with_raw_response.create(
        model=MODEL, messages=MESSAGES, max_tokens=20, extra_headers={"x-request-id": "real-chat-1"}
    )
    answer = raw.parse()
    assert answer.usage is not None
    line = access_line(service, "real-chat-1")
    assert (line["tokens_in"], line["tokens_out"]) == (answer.usage.prompt_tokens, answer.usage.completion_tokens)
    assert line["finish"] in ("length", "stop")


def test_chat_stream(ai: openai.OpenAI) -> None:
    options = {"include_usage": True}
    with ai.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=20, stream=True, stream_options=options
    ) as events:
        chunks = list(events)
    assert chunks[-1].usage is not None
    assert sum(bool(c.choices and c.choices[0].delta.content) for c in chunks) >= 1


def test_responses(ai: openai.OpenAI) -> None:
    assert ai.responses.create(model=MODEL, input="light", max_output_tokens=16).usage is not None


def test_messages(claude: anthropic.Anthropic) -> None:
    answer = claude.messages.create(model=MODEL, max_tokens=10, messages=MESSAGES)
    assert answer.usage.output_tokens <= 10
    with claude.messages.stream(model=MODEL, max_tokens=10, messages=MESSAGES) as stream:
        assert stream.get_final_message().usage.output_tokens <= 10
    assert claude.messages.count_tokens(model=MODEL, messages=MESSAGES).input_tokens > 0


def test_tokenize_and_detokenize(service: Service) -> None:
    status, _, body = service.ask("/tokenize", {"model": MODEL, "prompt": "light"})
    assert status == 200
    tokens = json.loads(body)["tokens"]
    status, _, body = service.ask("/detokenize", {"model": MODEL, "tokens": tokens})
    assert (status, json.loads(body)["prompt"]) == (200, "light")


def test_vllms_own_errors_pass_as_they_are(ai: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ai.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=100_000)
    assert "x-ascproxy-error" not in caught.value.response.headers


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "unary"])
def test_a_caller_that_goes_away_stops_the_generation(service: Service, vllm: Vllm, stream: bool) -> None:
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 1900, "ignore_eos": True, "stream": stream}
    before = vllm.metric("vllm:generation_tokens_total")
    connection = socket.create_connection(("127.0.0.1", service.http_port))
    fields = ("Content-Type: application/json", f"Authorization: Bearer {service.key}")
    connection.sendall(post(body, *fields))
    wait_for(lambda: vllm.metric("vllm:generation_tokens_total") > before + 20, "it generates", 30)
    connection.close()
    gone = time.monotonic()
    wait_for(lambda: vllm.metric("vllm:num_requests_running") == 0, "nothing runs any more", 1)
    stopped = vllm.metric("vllm:generation_tokens_total")
    assert time.monotonic() - gone < 1
    assert stopped - before < 1900
    assert vllm.metric("vllm:generation_tokens_total") == stopped
