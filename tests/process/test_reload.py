"""SIGHUP with real processes: a revision for all, none for a broken one, and what a new worker starts on."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ascproxy.model.node import Listener, ListenerTls
from ascproxy.model.snapshot import Snapshot
from ascproxy.model.tenant import Tenant
from tests.kit.processes import Service, eventually, free_port, running, snapshot


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with running(tmp_path) as started:
        yield started


def revised(before: Snapshot, revision: str, *tenants: str) -> Snapshot:
    return dataclasses.replace(before, revision=revision, tenants=tuple(Tenant(name) for name in tenants))


def revisions(service: Service) -> set[str]:
    status = service.status()
    return {status["revision"], *(worker["revision"] for worker in status["workers"])}


def test_a_valid_revision_reaches_every_worker_and_replaces_none(service: Service) -> None:
    before = {worker["pid"] for worker in service.workers().values()}
    held = service.hold("/late")
    service.reload(revised(service.snapshot, "0000000000b2", "acme"))
    assert service.until_logged("reloaded")["revision"] == "0000000000b2"
    eventually(lambda: revisions(service) == {"0000000000b2"})
    assert {worker["pid"] for worker in service.workers().values()} == before
    assert service.ask()["revision"] == "0000000000b2"
    held.close()


def test_all_workers_share_ticket_keys_which_only_a_change_of_client_ca_forgets(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_text("first")
    tls = ListenerTls("server.crt", "server.key", client_ca=str(ca))  # the echo worker speaks plaintext all the same
    first = snapshot(tmp_path, listeners=(Listener("main", f"127.0.0.1:{free_port()}", tls),))
    with running(tmp_path, first) as service:

        def keys(revision: str) -> str:
            service.reload(revised(service.snapshot, revision, "acme"))
            eventually(lambda: revisions(service) == {revision})
            (found,) = {service.ask()["tickets"] for _ in range(10)}
            return found

        (before,) = {service.ask()["tickets"] for _ in range(10)}
        assert keys("0000000000b2") == before
        ca.write_text("second")
        after = keys("0000000000b3")
        assert after != before
        assert keys("0000000000b4") == after


def test_a_worker_that_starts_later_has_the_revision_in_force(service: Service) -> None:
    service.reload(revised(service.snapshot, "0000000000b2", "acme"))
    service.until_logged("reloaded")
    os.kill(service.workers()[0]["pid"], signal.SIGKILL)
    eventually(lambda: (w := service.workers()[0])["restarts"] == 1 and w["state"] == "ready")
    assert revisions(service) == {"0000000000b2"}


def test_a_broken_configuration_leaves_the_old_one_serving(service: Service) -> None:
    service.config.write_bytes(b"{")
    service.process.send_signal(signal.SIGHUP)
    line = service.until_logged("reload refused")
    assert "0000000000a1 stays in force" in line["message"]
    assert "not a snapshot" in line["findings"][0]
    assert revisions(service) == {"0000000000a1"}
    assert service.ask()["revision"] == "0000000000a1"
    service.reload(revised(service.snapshot, "0000000000b2"))
    service.until_logged("reloaded")


def test_a_revision_that_no_worker_can_build_leaves_the_old_one(service: Service) -> None:
    service.reload(revised(service.snapshot, "0000000000b2", "refused"))
    service.until_logged("reload failed, revision 0000000000a1 stays in force")
    assert service.logged("worker keeps its revision")["reason"] == "the tenant refused cannot be built"
    assert revisions(service) == {"0000000000a1"}
    text = service.public("/metrics")[1].decode()
    assert 'ascproxy_worker_revision_failed{slot="0"} 1.0' in text
    os.kill(service.workers()[0]["pid"], signal.SIGKILL)
    eventually(lambda: (w := service.workers()[0])["restarts"] == 1 and w["state"] == "ready")
    assert service.ask()["revision"] == "0000000000a1"


def test_what_needs_a_restart_is_named_and_the_rest_applied(service: Service) -> None:
    listener = dataclasses.replace(service.snapshot.node.listeners[0], address="127.0.0.1:1")
    node = dataclasses.replace(service.snapshot.node, listeners=(listener,))
    changed = dataclasses.replace(service.snapshot, node=node, revision="0000000000b2")
    service.write(changed)
    service.process.send_signal(signal.SIGHUP)
    service.until_logged("takes effect at the next restart: listeners")
    service.until_logged("reloaded")
    assert service.ask()["revision"] == "0000000000b2"


def test_a_worker_that_starts_after_a_listener_was_renamed_finds_its_own(service: Service) -> None:
    listener = dataclasses.replace(service.snapshot.node.listeners[0], name="renamed")
    node = dataclasses.replace(service.snapshot.node, listeners=(listener,))
    service.write(dataclasses.replace(service.snapshot, node=node, revision="0000000000b2"))
    service.process.send_signal(signal.SIGHUP)
    service.until_logged("reloaded")
    for worker in service.workers().values():
        os.kill(worker["pid"], signal.SIGKILL)
    eventually(lambda: all(w["restarts"] == 1 and w["state"] == "ready" for w in service.workers().values()))
    assert service.ask()["listener"] == "main"


def test_signals_during_a_reload_lead_to_the_newest_file(service: Service) -> None:
    for n in range(10):
        service.reload(revised(service.snapshot, f"00000000{n:04x}", "acme"))
    eventually(lambda: revisions(service) == {"000000000009"})


def test_no_request_fails_because_of_reloads(service: Service) -> None:
    failures: list[BaseException] = []
    answers: list[str] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            try:
                answers.append(service.ask()["revision"])
            except (OSError, ValueError) as error:
                failures.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    for n in range(1, 6):
        revision = f"00000000{n:04x}"
        service.reload(revised(service.snapshot, revision, "acme"))
        eventually(lambda revision=revision: revisions(service) == {revision})
    stop.set()
    asking.join()
    assert not failures
    assert len(answers) > 20
