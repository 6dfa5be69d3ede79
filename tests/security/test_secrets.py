"""Where a provider's credential and a caller's key go, and that they are nowhere else: the real service, seen from
outside.

The model server is a witness: it says what reached it, and plays servers that repeat in an answer what they were sent.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ascproxy.config.running import run_dir_of
from tests.kit.rig import free_port
from tests.kit.service import Service, command, wait_for
from tests.kit.witness import GOOD, Witness

CHAT = {"model": "m", "messages": []}


@dataclass
class Place:
    """``credential`` is what the file holds; ``told`` are all bytes that callers got."""

    service: Service
    witness: Witness
    file: Path
    credential: str
    told: list[bytes] = field(default_factory=list)

    def ask(self, path: str = "/v1/chat/completions", body: Any = CHAT, **more: Any) -> tuple[int, bytes, str]:
        """Status, body, and the head that the witness saw ("" when it saw none)."""
        self.witness.take()
        status, headers, answer = self.service.ask(path, body, **more)
        self.told += [json.dumps(headers).encode(), answer]
        return status, answer, self.witness.take().partition(b"\r\n\r\n")[0].decode()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    tmp_path = tmp_path_factory.mktemp("secrets")
    credential = f"sk-{secrets.token_urlsafe(24)}"
    file = tmp_path / "credential"
    file.touch(0o600)
    file.write_text(credential + "\n")
    with ExitStack() as stack:
        witness = stack.enter_context(Witness())

        def resources(document: dict[str, Any]) -> None:
            document["credentials"] = {"rack": {"from": f"file:{file}"}}
            document["providers"] = {
                kind: {"type": kind, "endpoints": [witness.url], "credential": "rack"}
                for kind in ("openai", "anthropic")
            } | {"gone": {"type": "vllm", "endpoints": [f"http://127.0.0.1:{free_port()}"], "credential": "rack"}}
            document["routes"] = {
                model: {"models": [model], "targets": [{"provider": kind}]}
                for model, kind in (("m", "openai"), ("claude", "anthropic"), ("gone", "gone"))
            }

        service = Service(tmp_path / "d", upstream=witness.url, models=["m"], workers=2, resources=resources)
        yield Place(stack.enter_context(service), witness, file, credential)


def lines_of(head: str, *names: str) -> list[str]:
    return [line for line in head.split("\r\n")[1:] if line.partition(":")[0].lower() in names]


AUTHENTICATING = ("authorization", "x-api-key", "api-key", "x-goog-api-key", "cookie", "proxy-authorization")


def test_the_server_gets_the_providers_credential_and_nothing_of_the_callers(place: Place) -> None:
    key = place.service.key
    more = {"cookie": f"key={key}", "x_goog_api_key": key, "api_key": key, "proxy_authorization": f"Basic {key}"}
    for caller in ({}, {"key": None, "x_api_key": key}, {"x_api_key": key}):
        status, _, head = place.ask(**caller, **more)
        assert status == 200
        assert lines_of(head, *AUTHENTICATING) == [f"authorization: Bearer {place.credential}"]
        assert key not in head
    status, _, head = place.ask("/v1/messages", {**CHAT, "model": "claude", "max_tokens": 1}, **more)
    assert status == 200
    assert lines_of(head, *AUTHENTICATING) == [f"x-api-key: {place.credential}"]
    assert key not in head


def test_a_new_credential_is_sent_after_a_reload_and_the_old_one_no_more(place: Place) -> None:
    assert place.credential in place.ask()[2]
    old, place.credential = place.credential, f"sk-{secrets.token_urlsafe(24)}"
    place.file.write_text(place.credential)
    place.service.signal(signal.SIGHUP)
    wait_for(lambda: place.credential in place.ask()[2], "the new credential is used")
    for _ in range(20):  # every worker
        assert lines_of(place.ask()[2], "authorization") == [f"authorization: Bearer {place.credential}"]
    assert old not in place.service.out.read_text()


def test_a_callers_key_cannot_choose_another_server_or_credential(place: Place) -> None:
    """Names that other gateways obey are data here."""
    body = {**CHAT, "api_base": "http://127.0.0.1:1", "base_url": "http://127.0.0.1:1", "api_key": "other"}
    status, _, head = place.ask(body=body, x_api_base="http://127.0.0.1:1", host="elsewhere:1", forwarded="host=x")
    assert status == 200
    assert lines_of(head, *AUTHENTICATING) == [f"authorization: Bearer {place.credential}"]
    assert lines_of(head, "host") == [f"host: 127.0.0.1:{place.witness.port}"]
    assert lines_of(head, "x-api-base", "forwarded") == []


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(each for child in children for each in family(int(child)))]


def test_secrets_are_nowhere_else(place: Place) -> None:
    """After everything that could be said about them went wrong once."""
    service, witness = place.service, place.witness
    wrong = f"asc_{secrets.token_hex(6)}_{secrets.token_urlsafe(32)}"
    made = json.loads(
        command("key", "create", "--config", str(service.folder), "--tenant", service.facts["tenant"], "--json").stdout
    )
    assert place.ask()[0] == 200
    assert place.ask(key=made["api_key"])[0] == 200
    assert place.ask(key=wrong)[0] == 401
    assert place.ask(x_api_key=wrong)[0] == 400
    assert place.ask("/v1/nothing")[0] == 404
    assert place.ask(f"/v1/chat/completions?key={service.key}")[0] == 400
    assert place.ask(body={**CHAT, "model": "unknown"})[0] == 404
    assert place.ask(body=b'{"model":"m"')[0] == 400
    assert place.ask(body={**CHAT, "model": "gone"})[0] == 502
    said = b'{"error":{"message":"Incorrect API key provided: %b"}}' % place.credential.encode()
    for status in (401, 403):  # OpenAI repeats the key, in part
        witness.answer = b"HTTP/1.1 %d No\r\nx-key: %b\r\nContent-Length: %d\r\n\r\n%b" % (
            status, place.credential.encode(), len(said), said
        )  # fmt: skip
        assert place.ask()[0] == 502
    witness.answer = b"HTTP/1.1 200 OK\r\nx-%b: x\r\n\x00\r\n\r\n" % place.credential.encode()
    assert place.ask()[0] == 502
    witness.answer = GOOD
    place.file.write_text(place.credential + "\n\n" + wrong)  # two lines: unusable, and refused
    service.signal(signal.SIGHUP)
    wait_for(lambda: "reload" in service.said(), "the reload is told")
    place.file.write_text(place.credential)
    first = service.status()["workers"][0]
    os.kill(first["pid"], signal.SIGKILL)
    wait_for(lambda: service.status()["workers"][0]["restarts"] > first["restarts"], "the worker is replaced")
    assert command("key", "revoke", made["id"], "--config", str(service.folder)).returncode == 0
    assert place.ask(key=made["api_key"])[0] == 401

    assert service.process is not None
    processes = family(service.process.pid)
    assert len(processes) >= 4  # supervisor, control, two workers
    places: dict[str, bytes] = {"answers": b"\n".join(place.told), "metrics": service.metrics().encode()}
    for pid in processes:
        for name in ("environ", "cmdline", "comm"):
            places[f"/proc/{pid}/{name}"] = Path(f"/proc/{pid}/{name}").read_bytes()
    for argv in (["status"], ["status", "--json"], ["check", str(service.folder)], ["key", "list"]):
        where = [] if argv[0] == "check" else ["--config", str(service.folder)]
        done = command(*argv, *where)
        assert done.returncode == 0, done
        places[" ".join(argv)] = (done.stdout + done.stderr).encode()
    run_dir = run_dir_of(service.folder)
    for folder in (service.folder, run_dir):  # serve.out with log and access lines, store, pages
        for path in folder.rglob("*"):
            if path.is_file():
                places[str(path)] = path.read_bytes()
    assert any(name.endswith("serve.out") and b'"status":401' in content for name, content in places.items())
    assert any(name.startswith(str(run_dir)) for name in places)
    hunted = {
        "the provider's credential": place.credential,
        "a caller's key": service.key.split("_", 2)[2],
        "a revoked key": made["api_key"].split("_", 2)[2],
        "a wrong key": wrong.split("_", 2)[2],
    }
    found = [
        f"{what} is in {name}" for name, content in places.items() for what, text in hunted.items()
        if text.encode() in content
    ]  # fmt: skip
    assert not found
