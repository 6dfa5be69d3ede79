"""Who is asked for what: names, aliases and patterns of models, several endpoints, TGI; through the real service."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.kit.service import Service, Simulator, first_light, wait_for

CHAT = "/v1/chat/completions"


class Place:
    """Two equal servers ``rack``, which take 20 s for an answer, and another, ``big``."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        slow = ("--rate", "20", "--tokens", "400")
        self.rack = [stack.enter_context(Simulator(*slow, model="meta/Llama-3-8B")) for _ in range(2)]
        self.big = stack.enter_context(Simulator("--rate", "0", "--model", "llama-3-70b", model="exact"))
        self.service = stack.enter_context(
            Service(folder / "d", upstream=self.big.url, models=["exact"], resources=self.resources)
        )

    def resources(self, document: dict[str, Any]) -> None:
        document["providers"] = {
            "rack": {"type": "vllm", "endpoints": [each.url for each in self.rack]},
            "big": {"type": "vllm", "endpoints": [self.big.url]},
        }
        document["routes"] = {
            "alias": {"models": ["llama", "llama-?b"], "targets": [{"provider": "rack", "model": "meta/Llama-3-8B"}]},
            "glob": {"models": ["llama-*"], "targets": [{"provider": "big"}]},
            "exact": {"models": ["exact"], "targets": [{"provider": "big"}], "operations": ["embeddings"]},
        }

    def stream(self, model: str) -> http.client.HTTPConnection:
        """A stream that has begun and goes on."""
        connection = http.client.HTTPConnection("127.0.0.1", self.service.http_port, timeout=10)
        body = {"model": model, "messages": [{"role": "user", "content": "x"}], "stream": True}
        connection.request(
            "POST",
            CHAT,
            json.dumps(body),
            {"authorization": f"Bearer {self.service.key}", "content-type": "application/json"},
        )
        answer = connection.getresponse()
        assert answer.status == 200
        assert answer.readline().startswith(b"data: ")
        return connection

    def running(self) -> list[int]:
        return [each.stats()["running"] for each in self.rack]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(stack, tmp_path_factory.mktemp("routes"))


@pytest.mark.parametrize("model", ["llama", "llama-7b"])
def test_an_alias_reaches_the_server_under_its_own_name(place: Place, model: str) -> None:
    body = b'{"messages":[{"role":"user","content":"\\u00e9  x"}],  "model": "%b" ,"max_tokens":1,"odd":{"a":[1.0e5]}}'
    status, _, _ = place.service.ask(CHAT, body % model.encode())
    assert status == 200
    last = [stats["last"]["body"] for each in place.rack if (stats := each.stats())["last"]]
    assert (body % b"meta/Llama-3-8B").decode() in last  # else byte for byte


def test_the_narrower_pattern_wins_and_a_name_passes_through(place: Place) -> None:
    status, _, body = place.service.ask(
        CHAT, {"model": "llama-3-70b", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    )
    assert status == 200
    assert json.loads(body)["model"] == "llama-3-70b"


@pytest.mark.parametrize(("model", "status"), [("llam", 404), ("Llama", 404), ("meta/Llama-3-8B", 404), ("exact", 404)])
def test_what_no_route_has_is_not_found(place: Place, model: str, status: int) -> None:
    before = [each.stats()["requests"] for each in (*place.rack, place.big)]
    got = place.service.ask(CHAT, {"model": model, "messages": []})
    assert got[0] == status
    code = "operation_not_supported" if model == "exact" else "model_not_found"
    assert got[1]["x-ascproxy-error"] == code
    assert [each.stats()["requests"] for each in (*place.rack, place.big)] == before


def test_the_endpoint_with_the_least_in_flight_is_asked(place: Place) -> None:
    streams: list[tuple[int, http.client.HTTPConnection]] = []  # with the server that it is on
    for _ in range(6):
        before = place.running()
        connection = place.stream("llama")
        streams.append((int(place.running()[1] > before[1]), connection))
    assert place.running() == [3, 3]
    for server, connection in streams[:]:
        if server == 0:
            connection.close()
            streams.remove((server, connection))
    wait_for(lambda: place.running() == [0, 3], "one of the two is idle")
    streams += [(0, place.stream("llama")) for _ in range(3)]
    assert place.running() == [3, 3]
    for _, connection in streams:
        connection.close()
    wait_for(lambda: place.running() == [0, 0], "the servers stop")


def test_an_endpoint_that_is_gone_is_passed_over(tmp_path: Path) -> None:
    with ExitStack() as stack:
        pair = [stack.enter_context(Simulator("--rate", "0")) for _ in range(2)]

        def resources(document: dict[str, Any]) -> None:
            (provider,) = document["providers"].values()
            provider["endpoints"] = [each.url for each in pair]

        service = stack.enter_context(
            Service(tmp_path / "d", upstream=pair[0].url, models=["sim-chat"], resources=resources)
        )
        body = {"model": "sim-chat", "messages": [{"role": "user", "content": "x"}]}
        for _ in range(4):
            assert service.ask(CHAT, body)[0] == 200
        assert all(each.stats()["requests"] for each in pair)
        pair[0].stop()
        for _ in range(20):
            assert service.ask(CHAT, body)[0] == 200
        pair[1].stop()
        assert service.ask(CHAT, body)[0] == 502


def test_tgi_in_both_of_its_dialects(tmp_path: Path) -> None:
    with first_light(tmp_path, "--type", "tgi", "--rate", "0", type="tgi") as (service, _):
        chat = {"model": "sim-chat", "messages": [{"role": "user", "content": "x"}], "max_tokens": 5}
        status, _, body = service.ask(CHAT, chat)
        assert status == 200
        assert json.loads(body)["usage"]["completion_tokens"] == 5
        status, headers, body = service.ask(CHAT, chat | {"stream": True})
        assert status == 200
        assert headers["content-type"].startswith("text/event-stream")
        assert body.rstrip().endswith(b"data: [DONE]")
        status, headers, body = service.ask("/generate", {"inputs": "x"}, key="wrong")
        assert status == 401
        assert set(json.loads(body)) == {"error", "error_type"}
        status, headers, body = service.ask("/generate", {"inputs": "x"}, x_ascproxy_model="other")
        assert status == 404
