"""Control with real processes: health, metrics, the local socket, and its replacement."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ascproxy import _native
from ascproxy.control.node import open_page
from ascproxy.model.tenant import Tenant
from ascproxy.telemetry import metrics
from tests.kit.processes import Service, eventually, running


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with running(tmp_path) as started:
        yield started


def control_pid(service: Service) -> int:
    workers = {worker["pid"] for worker in service.workers().values()}
    return next(pid for pid in service.children() if pid not in workers)


def test_health(service: Service) -> None:
    eventually(lambda: service.public("/healthz/live")[0] == 200)
    status, body = service.public("/healthz/ready")
    assert status == 200
    assert json.loads(body) == {"ready": True, "revision": "0000000000a1", "workers": 2, "reasons": []}
    assert service.public("/status")[0] == 404  # only on the local socket


def test_not_ready_says_why(service: Service) -> None:
    crashing = dataclasses.replace(service.snapshot, tenants=(Tenant("crash-0"), Tenant("crash-1")))
    service.reload(crashing)
    service.until_logged("reloaded")
    for worker in service.workers().values():
        os.kill(worker["pid"], signal.SIGKILL)
    body = eventually(lambda: (a := service.public("/healthz/ready"))[0] == 503 and a[1])
    assert json.loads(body) == {
        "ready": False,
        "revision": "0000000000a1",
        "workers": 0,
        "reasons": ["no worker accepts connections"],
    }
    assert service.public("/healthz/live")[0] == 503


def test_metrics_are_what_the_parser_of_prometheus_reads(service: Service) -> None:
    service.ask()
    os.kill(service.workers()[1]["pid"], signal.SIGKILL)
    eventually(lambda: service.workers()[1]["restarts"] == 1 and service.workers()[1]["state"] == "ready")
    text = service.public("/metrics")[1].decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert {metric.name.removesuffix("_total") for metric in metrics.table()} == set(families)
    restarts = {s.labels["slot"]: s.value for s in families["ascproxy_worker_restarts"].samples}
    assert restarts == {"0": 0, "1": 1}
    revisions = {s.labels["slot"]: s.labels["revision"] for s in families["ascproxy_worker_revision"].samples}
    assert revisions == {"0": "0000000000a1", "1": "0000000000a1"}


def test_status(service: Service) -> None:
    status = service.status()
    assert set(status) == {"revision", "separation", "workers", "upgrade"}
    assert status["separation"] == "none"
    assert [set(worker) for worker in status["workers"]] == [
        {"slot", "pid", "state", "revision", "restarts", "in_flight"}
    ] * 2


def test_the_control_socket_is_for_the_owner_only(service: Service) -> None:
    path = Path(service.snapshot.node.run_dir) / "control.sock"
    assert path.stat().st_mode & 0o777 == 0o600


def test_each_change_of_keys_raises_the_epoch(service: Service) -> None:
    page = open_page(Path(service.snapshot.node.run_dir) / "shared.page")
    epoch = next(first for key, first, _ in page.records() if key == metrics.KEY_EPOCH)
    before = page.load(epoch)
    status, created = service.local("POST", "/keys", {"tenant": "acme"})
    assert (status, created["tenant"]) == (201, "acme")
    assert page.load(epoch) == before + 1
    assert [row["id"] for row in service.local("GET", "/keys")[1]] == [created["id"]]
    assert service.local("DELETE", f"/keys/{created['id']}")[0] == 200
    assert page.load(epoch) == before + 2
    status, refused = service.local("DELETE", "/keys/nonesuch")
    assert (status, set(refused)) == (409, {"error"})
    assert page.load(epoch) == before + 2
    assert service.local("POST", "/keys", ["no object"])[0] == 400


def test_a_killed_control_is_replaced_and_traffic_does_not_notice(service: Service) -> None:
    before = control_pid(service)
    workers = {worker["pid"] for worker in service.workers().values()}
    os.kill(before, signal.SIGKILL)
    assert service.ask()["revision"] == "0000000000a1"
    # Its listening sockets are the supervisor's: a probe waits for the next control and is not refused.
    assert service.public("/healthz/ready")[0] == 200
    assert {worker["pid"] for worker in service.workers().values()} == workers
    assert control_pid(service) != before
    service.process.send_signal(signal.SIGHUP)
    service.until_logged("reloaded")
    assert service.logged("control exited and is replaced") is not None


def test_a_worker_page_is_read_only_for_readers(service: Service) -> None:
    page = open_page(Path(service.snapshot.node.run_dir) / "slot-0.page")
    with pytest.raises(ValueError, match="read-only"):
        page.store(_native.Page.CELLS["in_flight"], 1)
