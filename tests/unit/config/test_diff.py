"""What a reload cannot apply is named, everything else is not."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from ascproxy.config.diff import needs_restart
from ascproxy.model.node import Limits, Listener, ListenerTls, Node
from ascproxy.model.snapshot import Snapshot
from ascproxy.model.tenant import Tenant

TLS = ListenerTls("/c", "/k")
BOOT = Snapshot(
    revision="a",
    node=Node(
        name="n",
        state_dir="/s",
        run_dir="/r",
        workers=2,
        listeners=(Listener("plain", "127.0.0.1:80"), Listener("secure", "0.0.0.0:443", TLS)),
        metrics_address="127.0.0.1:9464",
    ),
    tenants=(),
    credentials=(),
    providers=(),
    routes=(),
)
PLAIN, SECURE = BOOT.node.listeners
SHORT = Limits(header_timeout_ms=1)
CASES: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({}, ()),
    ({"name": "m"}, ("node: n stays in force until a restart, then m",)),
    ({"state_dir": "/t"}, ("state_dir: /s stays in force until a restart, then /t",)),
    ({"run_dir": "/t"}, ("run_dir: /r stays in force until a restart, then /t",)),
    ({"workers": 3}, ("workers: 2 stays in force until a restart, then 3",)),
    ({"metrics_address": "unix:/m"}, ("metrics.address: 127.0.0.1:9464 stays in force until a restart, then unix:/m",)),
    ({"access_log": "none"}, ("access_log: stdout stays in force until a restart, then none",)),
    ({"limits": SHORT}, ("limits: the running ones stay in force until a restart",)),
    ({"listeners": (PLAIN,)}, ("listener secure: it is closed at a restart",)),
    ({"listeners": (PLAIN, SECURE, Listener("new", "unix:/n"))}, ("listener new: it is opened at a restart",)),
    ({"listeners": (SECURE, PLAIN)}, ()),
    ({"listeners": (PLAIN, replace(SECURE, tls=ListenerTls("/d", "/l", "/ca")))}, ()),
    ({"listeners": (PLAIN, replace(SECURE, tls=None))}, ("listener secure: tls is turned off at a restart",)),
    (
        {"listeners": (replace(PLAIN, proxy_protocol=True), SECURE)},
        ("listener plain: proxy_protocol is turned on at a restart",),
    ),
    ({"listeners": (replace(PLAIN, tls=TLS), SECURE)}, ("listener plain: tls is turned on at a restart",)),
    (
        {"listeners": (replace(PLAIN, address="unix:/p"), SECURE)},
        ("listener plain: it stays at 127.0.0.1:80 until a restart",),
    ),
    (
        {"listeners": (replace(PLAIN, limits=SHORT), SECURE)},
        ("listener plain: its running limits stay in force until a restart",),
    ),
    (
        {"workers": 1, "listeners": (replace(PLAIN, address="unix:/p"),)},
        (
            "workers: 2 stays in force until a restart, then 1",
            "listener secure: it is closed at a restart",
            "listener plain: it stays at 127.0.0.1:80 until a restart",
        ),
    ),
]


@pytest.mark.parametrize(("change", "sentences"), CASES)
def test_differences_of_the_node_file(change: dict[str, Any], sentences: tuple[str, ...]) -> None:
    assert needs_restart(BOOT, replace(BOOT, node=replace(BOOT.node, **change))) == sentences


def test_every_field_of_the_node_is_looked_at() -> None:
    assert {name for change, _ in CASES for name in change} == {f.name for f in fields(Node)}


def test_resources_are_applied_at_once() -> None:
    assert needs_restart(BOOT, replace(BOOT, revision="b", tenants=(Tenant("t"),))) == ()
