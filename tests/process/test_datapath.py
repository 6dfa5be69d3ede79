"""The real data path under the real supervisor: HTTPS in, a simulated model server behind, everything counted."""

from __future__ import annotations

import dataclasses
import datetime
import http.client
import json
import os
import signal
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ascproxy.model.node import Listener, ListenerTls
from ascproxy.model.provider import Endpoint, Provider, ProviderType
from ascproxy.model.route import Route, Target
from ascproxy.net import authority
from tests.kit.processes import Service, eventually, free_port, running, snapshot
from tests.kit.service import Simulator

WORKER = "ascproxy.worker.datapath:run"


def make_certificates(folder: Path) -> authority.Files:
    folder.mkdir()
    return authority.create(folder, ["localhost", "127.0.0.1"], now=datetime.datetime.now(datetime.UTC))


@pytest.fixture
def upstream() -> Iterator[Simulator]:
    with Simulator() as simulator:
        yield simulator


@pytest.fixture
def service(tmp_path: Path, upstream: Simulator) -> Iterator[Service]:
    files = make_certificates(tmp_path / "tls")
    tls = ListenerTls(str(files.certificate), str(files.key))
    listeners = (Listener("main", f"127.0.0.1:{free_port()}", tls), Listener("plain", f"127.0.0.1:{free_port()}"))
    first = snapshot(tmp_path, listeners=listeners, access_log=str(tmp_path / "access.log"))
    endpoint = Endpoint(0, upstream.url, "http", "127.0.0.1", upstream.port, "")
    first = dataclasses.replace(
        first,
        providers=(Provider("rack-a", ProviderType.VLLM, (endpoint,)),),
        routes=(Route("chat", (upstream.model,), (Target("rack-a"),)),),
    )
    with running(tmp_path, first, worker=WORKER) as started:
        yield started


@pytest.fixture
def key(service: Service) -> str:
    status, created = service.local("POST", "/keys", {"tenant": "acme"})
    assert status == 201
    return created["api_key"]


def chat(service: Service, listener: int, key: str, *, trust: Path | None = None) -> tuple[int, Any]:
    host, _, port = service.snapshot.node.listeners[listener].address.rpartition(":")
    connection: http.client.HTTPConnection
    if service.snapshot.node.listeners[listener].tls is None:
        connection = http.client.HTTPConnection(host, int(port), timeout=10)
    else:
        context = ssl.create_default_context(cafile=trust or service.folder / "tls" / "ca.crt")
        connection = http.client.HTTPSConnection(host, int(port), timeout=10, context=context)
    try:
        body = json.dumps({"model": "sim-chat", "messages": [{"role": "user", "content": "hello"}]})
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        connection.request("POST", "/v1/chat/completions", body, headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def samples(service: Service, family: str) -> list[Any]:
    text = service.public("/metrics")[1].decode()
    return next(f.samples for f in text_string_to_metric_families(text) if f.name == family)


def test_a_chat_over_https_and_in_plaintext_is_answered_counted_and_logged(service: Service, key: str) -> None:
    for listener in (0, 1):
        status, answer = chat(service, listener, key)
        assert (status, answer["object"]) == (200, "chat.completion")
    assert chat(service, 0, key[:-4] + "xxxx")[0] == 401
    counted = {
        (s.labels["listener"], s.labels["route"], s.labels["provider"], s.labels["code"]): s.value
        for s in samples(service, "ascproxy_requests")
    }
    assert counted["main", "chat", "rack-a", "200"] == 1
    assert counted["plain", "chat", "rack-a", "200"] == 1
    assert [(s.labels["code"], s.value) for s in samples(service, "ascproxy_refusals")] == [("invalid_api_key", 1)]
    assert sum(s.value for s in samples(service, "ascproxy_connections_accepted")) == 3
    tokens = {s.labels["direction"]: s.value for s in samples(service, "ascproxy_tokens") if s.value}
    assert set(tokens) == {"in", "out"}

    lines = eventually(lambda: len(found := access_lines(service)) == 3 and found)
    assert sorted(line["status"] for line in lines) == [200, 200, 401]
    assert {line.get("tenant") for line in lines} == {"acme", None}
    assert key not in json.dumps(lines)


def access_lines(service: Service) -> list[dict[str, Any]]:
    log = service.folder / "access.log"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def test_a_reload_swaps_certificates_and_a_broken_one_changes_nothing(
    service: Service, key: str, tmp_path: Path
) -> None:
    first = service.snapshot
    files = make_certificates(tmp_path / "other")
    tls = ListenerTls(str(files.certificate), str(files.key))
    changed = (dataclasses.replace(first.node.listeners[0], tls=tls), first.node.listeners[1])
    broken = (dataclasses.replace(changed[0], tls=dataclasses.replace(tls, key="/nonexistent.key")), changed[1])
    for revision, listeners in (("0000000000b2", broken), ("0000000000c3", changed)):
        node = dataclasses.replace(first.node, listeners=listeners)
        service.reload(dataclasses.replace(first, revision=revision, node=node))
        if listeners is broken:
            service.until_logged("reload failed")
            assert "/nonexistent.key" in service.logged("worker keeps its revision")["reason"]
            assert chat(service, 0, key)[0] == 200
        else:
            service.until_logged("reloaded")
            assert chat(service, 0, key, trust=files.ca)[0] == 200
            with pytest.raises(ssl.SSLError):
                chat(service, 0, key)


def test_requests_go_on_when_a_worker_is_killed(service: Service, key: str) -> None:
    os.kill(service.workers()[0]["pid"], signal.SIGKILL)
    for _ in range(6):
        assert chat(service, 1, key)[0] == 200
    service.process.terminate()
    assert service.process.wait(10) == 0
    assert service.logged("stopped")["cut_off"] is False


def test_a_revoked_key_is_refused_on_the_next_request_on_every_worker(service: Service, key: str) -> None:
    for _ in range(8):  # every worker has verified it and remembers
        assert chat(service, 1, key)[0] == 200
    key_id = key.split("_")[1]
    assert service.local("DELETE", f"/keys/{key_id}")[1]["state"] == "revoked"
    assert {chat(service, 1, key)[0] for _ in range(8)} == {401}


def test_keys_survive_control_and_the_tenant_must_be_in_force(service: Service, key: str) -> None:
    workers = {worker["pid"] for worker in service.workers().values()}
    control = next(pid for pid in service.children() if pid not in workers)
    os.kill(control, signal.SIGKILL)
    assert service.local("POST", "/keys", {"tenant": "nobody"})[0] == 400
    assert [row["id"] for row in service.local("GET", "/keys")[1]] == [key.split("_")[1]]
    assert chat(service, 1, key)[0] == 200


def test_a_rotated_access_log_is_let_go_by_a_reload(service: Service, key: str) -> None:
    assert chat(service, 1, key)[0] == 200
    eventually(lambda: access_lines(service))
    (service.folder / "access.log").rename(service.folder / "access.log.1")
    service.process.send_signal(signal.SIGHUP)
    service.until_logged("reloaded")
    for _ in range(6):
        assert chat(service, 1, key)[0] == 200
    eventually(lambda: len(access_lines(service)) == 6)
    assert len((service.folder / "access.log.1").read_text().splitlines()) == 1
