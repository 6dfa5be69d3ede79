"""Lists of models, as the SDKs read them."""

from __future__ import annotations

from typing import Any

import anthropic
import httpx
import httpx2
import openai
import orjson
import pytest

from ascproxy.wire import anthropic as anthropic_wire
from ascproxy.wire import openai as openai_wire

NAMES = ["llama-3", "meta-llama/Llama-3"]


def test_openai_reads_the_list_and_one_of_it() -> None:
    def serve(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json=openai_wire.model_list(NAMES))
        assert request.url.raw_path in (b"/v1/models/meta-llama%2FLlama-3", b"/v1/models/meta-llama/Llama-3")
        return httpx.Response(200, json=openai_wire.model(NAMES[1]))

    client = openai.OpenAI(
        api_key="k", base_url="http://g/v1", http_client=httpx.Client(transport=httpx.MockTransport(serve))
    )
    assert [(m.id, m.object, m.created) for m in client.models.list()] == [(n, "model", 0) for n in NAMES]
    assert client.models.retrieve(NAMES[1]).id == NAMES[1]


@pytest.mark.parametrize("names", [NAMES, []])
def test_anthropic_reads_the_list_as_one_page(names: list[str]) -> None:
    asked = 0

    def serve(_: Any) -> httpx2.Response:
        nonlocal asked
        asked += 1
        body = orjson.dumps(anthropic_wire.model_list(names))
        return httpx2.Response(200, headers={"content-type": "application/json"}, content=body)

    client = anthropic.Anthropic(
        api_key="k", base_url="http://g", http_client=httpx2.Client(transport=httpx2.MockTransport(serve))
    )
    assert [(m.id, m.type, m.created_at.year) for m in client.models.list()] == [(n, "model", 1970) for n in names]
    assert asked == 1
