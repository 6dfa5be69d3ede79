"""``ascproxy serve`` and ``ascproxy status`` as an operator uses them: real configuration, real processes."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.processes import eventually
from tests.kit.service import Service, Simulator, command

CHAT = {"model": "sim-chat", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with (
        Simulator() as simulator,
        Service(tmp_path / "node", upstream=simulator.url, models=[simulator.model], workers=2) as started,
    ):
        yield started


def status(service: Service, *more: str) -> tuple[int, str, str]:
    done = command("status", "--config", str(service.folder), *more)
    return done.returncode, done.stdout, done.stderr


def test_status_as_a_table_and_as_json_and_3_when_nothing_runs(service: Service) -> None:
    code, shown, _ = status(service)
    assert code == 0
    lines = shown.splitlines()
    assert "separation none" in lines[0]
    assert lines[1].split() == ["slot", "pid", "state", "revision", "restarts", "in_flight"]
    assert [line.split()[2] for line in lines[2:]] == ["ready", "ready"]
    document = json.loads(status(service, "--json")[1])
    assert [worker["slot"] for worker in document["workers"]] == [0, 1]
    assert document["revision"] in lines[0]

    service.stop()
    code, shown, error = status(service)
    assert (code, shown) == (3, "")
    assert "nothing runs in" in error
    assert "ascproxy serve" in error


def test_a_broken_file_is_named_by_line_and_the_service_goes_on(service: Service) -> None:
    node = service.folder / "ascproxy.yaml"
    good = node.read_text()
    node.write_text(good + "wrokers: 3\n")
    service.signal(signal.SIGHUP)
    eventually(lambda: "reload refused" in service.said(), what="the refusal")
    line = len(good.splitlines()) + 1
    assert f"{node}:{line}:1: error: wrokers: unknown key" in service.said()
    assert service.ask("/v1/chat/completions", CHAT)[0] == 200
    node.write_text(good)
    service.signal(signal.SIGHUP)
    eventually(lambda: '"reloaded"' in service.said(), what="the reload")


def test_a_reload_that_needs_a_restart_says_so_and_applies_the_rest(service: Service) -> None:
    before = json.loads(status(service, "--json")[1])["revision"]
    service.edit("ascproxy.yaml", lambda document: document.update(workers=3))
    service.edit("resources.yaml", lambda document: document["tenants"].update(second={}))
    service.signal(signal.SIGHUP)
    eventually(lambda: '"reloaded"' in service.said(), what="the reload")
    assert "takes effect at the next restart: workers" in service.said()
    after = eventually(
        lambda: (d := json.loads(status(service, "--json")[1]))["revision"] != before and d, what="the revision"
    )
    assert len(after["workers"]) == 2
    made = command("key", "create", "--config", str(service.folder), "--tenant", "second", "--json")
    assert made.returncode == 0, made.stderr
    assert service.ask("/v1/chat/completions", CHAT, key=json.loads(made.stdout)["api_key"])[0] == 200


def test_serving_twice_and_serving_nothing_are_one_sentence(service: Service, tmp_path: Path) -> None:
    again = command("serve", str(service.folder))
    assert again.returncode == 1
    assert again.stderr.startswith("already running, pid ")
    assert len(again.stderr.splitlines()) == 1
    missing = command("serve", str(tmp_path / "nowhere"))
    assert missing.returncode == 2
    assert len(missing.stderr.splitlines()) == 1
