"""API keys by their command line, in force on every worker of the real service from the next request on."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any

import pytest

from tests.kit.service import Service, command, wait_for
from tests.kit.witness import Witness

CHAT = "/v1/chat/completions"
BODY = b'{"model":"qwen","messages":[]}'
IN_FLIGHT = re.compile(r'^ascproxy_worker_in_flight\{slot="(\d)"\} [1-9]', re.MULTILINE)


def resources(document: dict[str, Any]) -> None:
    document["tenants"] = {**document["tenants"], "other": {}}
    ((provider, _),) = document["providers"].items()
    targets = [{"provider": provider}]
    document["routes"] = {
        "both": {"models": ["llama-*", "qwen"], "targets": targets},
        "theirs": {"models": ["theirs"], "targets": targets, "tenants": ["other"]},
    }


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("keys") / "d"
    with Witness() as witness, ExitStack() as stack:
        yield stack.enter_context(
            Service(folder, upstream=witness.url, models=["llama-*"], workers=2, resources=resources)
        )


def key(service: Service, *args: str, tenant: str = "") -> dict[str, Any]:
    """A new one."""
    owner = tenant or service.facts["tenant"]
    done = command("key", "create", "--config", str(service.folder), "--tenant", owner, "--json", *args)
    assert done.returncode == 0, done.stderr
    made: dict[str, Any] = json.loads(done.stdout)
    return made


def ask(service: Service, made: dict[str, Any], model: str = "qwen", path: str = CHAT) -> tuple[int, str]:
    """Status and code."""
    status, headers, _ = service.ask(path, {"model": model, "messages": [], "input": ""}, key=made["api_key"])
    return status, headers.get("x-ascproxy-error", "")


OK = (200, "")
UNKNOWN = (401, "invalid_api_key")
NOT_ALLOWED = (403, "model_not_allowed")


class Kept:
    """A connection that stays open, to whichever worker took it."""

    def __init__(self, service: Service) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", service.http_port, timeout=10)

    def ask(self, api_key: str) -> int:
        self.begin(api_key)
        return self.finish()

    def begin(self, api_key: str) -> None:
        """The head of a request."""
        self.connection.putrequest("POST", CHAT)
        self.connection.putheader("authorization", f"Bearer {api_key}")
        self.connection.putheader("content-length", str(len(BODY)))
        self.connection.endheaders()

    def finish(self) -> int:
        """The body, and the status of the answer."""
        self.connection.send(BODY)
        answer = self.connection.getresponse()
        answer.read()
        return answer.status

    def slot(self, service: Service) -> str:
        """Whose worker has the other end: the one that has a request in flight while this one asks."""
        wait_for(lambda: not IN_FLIGHT.findall(service.metrics()), "nothing is in flight")
        self.begin(service.key)
        (slot,) = wait_for(lambda: IN_FLIGHT.findall(service.metrics()), "the request is in flight")
        assert self.finish() == 200
        return str(slot)


def test_a_new_key_works_at_once_and_a_revoked_one_no_more_on_every_worker(service: Service) -> None:
    made = key(service)
    kept: dict[str, Kept] = {}
    spare = []
    while len(kept) < 2:  # the kernel spreads connections over the workers by a hash
        connection = Kept(service)
        spare.append(connection)
        kept.setdefault(connection.slot(service), connection)
        assert len(spare) < 50
    for connection in kept.values():
        for _ in range(3):  # and it is remembered as a good one
            assert connection.ask(made["api_key"]) == 200
    done = command("key", "revoke", made["id"], "--config", str(service.folder))
    assert done.returncode == 0, done.stderr
    for connection in kept.values():
        assert connection.ask(made["api_key"]) == 401
        assert connection.ask(service.key) == 200  # the connection itself is not to blame
    (row,) = [row for row in listed(service) if row["id"] == made["id"]]
    assert row["state"] == "revoked"
    for connection in spare:
        connection.connection.close()


def listed(service: Service) -> list[dict[str, Any]]:
    done = command("key", "list", "--config", str(service.folder), "--json")
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def test_a_key_for_some_models(service: Service) -> None:
    made = key(service, "--model", "llama-3*", "--model", "qwen")
    assert ask(service, made, "qwen") == OK
    assert ask(service, made, "llama-3-8b") == OK
    assert ask(service, made, "llama-2-7b") == NOT_ALLOWED
    assert ask(service, made, "theirs") == NOT_ALLOWED  # not whether it is there
    assert ask(service, key(service), "llama-2-7b") == OK


def test_a_key_for_some_operations(service: Service) -> None:
    made = key(service, "--operation", "embeddings")
    assert ask(service, made, path="/v1/embeddings") == OK
    assert ask(service, made) == NOT_ALLOWED
    assert ask(service, made, path="/v1/completions") == NOT_ALLOWED


def test_a_key_of_another_tenant(service: Service) -> None:
    made = key(service, tenant="other")
    assert ask(service, made, "theirs") == OK
    assert ask(service, key(service), "theirs") == (404, "model_not_found")


def test_models_are_those_that_the_key_may_use(service: Service) -> None:
    def models(made: dict[str, Any]) -> list[str]:
        status, _, body = service.ask("/v1/models", method="GET", key=made["api_key"])
        assert status == 200
        return [each["id"] for each in json.loads(body)["data"]]

    assert models(key(service)) == ["qwen"]  # a glob is no model
    assert models(key(service, tenant="other")) == ["qwen", "theirs"]
    assert models(key(service, "--model", "nothing")) == []


def test_a_key_expires_by_itself(service: Service) -> None:
    made = key(service, "--expires", "2s")
    assert ask(service, made) == OK
    wait_for(lambda: ask(service, made) == UNKNOWN, "it has expired", 5)
    (row,) = [row for row in listed(service) if row["id"] == made["id"]]
    assert row["state"] == "expired"
    assert row["expires"] == made["expires"]
    assert datetime.fromisoformat(made["expires"]) <= datetime.now(UTC)  # and not before


@pytest.mark.parametrize("change", ["id", "secret", "case", "cut", "longer", "another prefix", "other kind"])
def test_what_is_nearly_a_key_is_none(service: Service, change: str) -> None:
    good = key(service)["api_key"]
    prefix, key_id, secret = good.split("_", 2)
    other = "A" if secret[0] != "A" else "B"
    nearly = {
        "id": f"{prefix}_{key_id[:-1]}{'a' if key_id[-1] != 'a' else 'b'}_{secret}",
        "secret": f"{prefix}_{key_id}_{other}{secret[1:]}",
        "case": f"{prefix}_{key_id}_{secret.swapcase()}",
        "cut": good[:-1],
        "longer": good + "A",
        "another prefix": f"sk_{key_id}_{secret}",
        "other kind": secret,
    }[change]
    assert ask(service, {"api_key": nearly}) == UNKNOWN
    assert ask(service, {"api_key": good}) == OK
