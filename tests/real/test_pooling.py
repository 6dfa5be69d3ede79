"""Embeddings of a real vLLM through the real service: the OpenAI SDK, and vLLM's own bytes."""

from __future__ import annotations

import base64
import json
import ssl
import struct
from collections.abc import Iterator

import openai
import pytest

from tests.kit.service import Service
from tests.real.access import access_line
from tests.real.conftest import MODEL, Vllm

pytestmark = pytest.mark.timeout(300)

WIDTH = 64  # the model's hidden size


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service before a vLLM that embeds."""
    server = Vllm(tmp_path_factory.mktemp("pooling"), "--runner", "pooling")
    try:
        with Service(tmp_path_factory.mktemp("embedder") / "d", upstream=server.url, models=[MODEL]) as service:
            yield service
    finally:
        server.stop()


@pytest.fixture(scope="module")
def ai(embedder: Service) -> Iterator[openai.OpenAI]:
    verify = ssl.create_default_context(cafile=embedder.facts["ca"])
    http = openai.DefaultHttpxClient(verify=verify)
    url = embedder.facts["https_url"] + "/v1"
    with openai.OpenAI(base_url=url, api_key=embedder.key, http_client=http, max_retries=0) as client:
        yield client


def test_embeddings_by_the_sdk(ai: openai.OpenAI) -> None:
    answer = ai.embeddings.create(model=MODEL, input=["hello", "gateway"])
    assert [len(item.embedding) for item in answer.data] == [WIDTH, WIDTH]
    assert answer.data[0].embedding != answer.data[1].embedding
    assert answer.usage.total_tokens > 0


def test_both_encodings_are_the_same_numbers(embedder: Service) -> None:
    asked = {"model": MODEL, "input": "hello"}
    numbers, packed = (
        json.loads(embedder.ask("/v1/embeddings", asked | {"encoding_format": encoding})[2])["data"][0]["embedding"]
        for encoding in ("float", "base64")
    )
    assert struct.unpack(f"<{WIDTH}f", base64.b64decode(packed)) == pytest.approx(numbers, abs=1e-5)


def test_the_access_line_counts_what_was_read(embedder: Service) -> None:
    _, headers, body = embedder.ask("/v1/embeddings", {"model": MODEL, "input": "hello"}, x_request_id="embedded-1")
    assert headers["x-request-id"] == "embedded-1"
    assert access_line(embedder, "embedded-1")["tokens_in"] == json.loads(body)["usage"]["prompt_tokens"]


def test_chat_of_an_embedding_model_is_vllms_error(ai: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        ai.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x"}])
    assert "x-ascproxy-error" not in caught.value.response.headers


def test_an_input_too_long_is_vllms_error(ai: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length") as caught:
        ai.embeddings.create(model=MODEL, input="x " * 6000)
    assert "x-ascproxy-error" not in caught.value.response.headers
