"""The optional peers of the benchmark, where they are installed: they serve, and check the key where they can."""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import lines, native, peers
from bench.subject import Place

CORE = min(os.sched_getaffinity(0))


@pytest.fixture(scope="module")
def stub() -> Iterator[lines.Stub]:
    native.program("stub")
    started = lines.Stub(CORE)
    yield started
    started.stop()


def ask(port: int, key: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    body = {"model": "bench", "messages": [{"role": "user", "content": "hi"}]}
    fields = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), fields)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "peer", [peers.Nginx, peers.Haproxy, peers.Envoy, peers.VllmRouter, peers.LiteLLM], ids=lambda peer: peer.name
)
def test_a_peer_serves_those_who_have_the_key(peer: type[peers.Peer], stub: lines.Stub, tmp_path: Path) -> None:
    missing = peer.missing()
    if missing is not None:
        pytest.skip(missing)
    tmp_path.chmod(0o755)
    subject = peer(Place(CORE, stub.port, tmp_path, tmp_path))
    try:
        subject.start()
        status, body = ask(subject.port, subject.key)
        assert (status, json.loads(body)["object"]) == (200, "chat.completion")
        assert peer.rewrites or len(body) == lines.UNARY_BYTES
        refused = ask(subject.port, subject.key[:-1] + "x")[0] in (400, 401, 403)
        assert refused is peer.checks_key
        assert subject.workers()
        subject.pause()
        subject.resume()
        assert ask(subject.port, subject.key)[0] == 200
    finally:
        subject.stop()
    assert subject.pid is None
