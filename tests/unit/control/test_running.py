"""What a reload takes of a new configuration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ascproxy.control.running import applicable
from ascproxy.model.node import Listener, ListenerTls
from ascproxy.model.snapshot import Snapshot
from ascproxy.model.tenant import Tenant
from tests.kit.processes import snapshot

OLD, NEW = ListenerTls("old.crt", "old.key"), ListenerTls("new.crt", "new.key", "ca.crt")
LISTENERS = (Listener("main", "127.0.0.1:1", OLD), Listener("plain", "127.0.0.1:2"))


def changed(boot: Snapshot, *listeners: Listener) -> Snapshot:
    node = replace(boot.node, listeners=listeners, workers=9, run_dir="/elsewhere", access_log="/other")
    return replace(boot, revision="0000000000b2", node=node, tenants=(Tenant("new"),))


def test_resources_and_certificates_are_taken_and_the_rest_of_the_node_is_kept(tmp_path: Path) -> None:
    boot = snapshot(tmp_path, listeners=LISTENERS)
    wanted = changed(boot, replace(LISTENERS[0], address="127.0.0.1:9", tls=NEW), LISTENERS[1])
    taken = applicable(boot, wanted)
    assert (taken.revision, taken.tenants) == ("0000000000b2", (Tenant("new"),))
    assert taken.node == replace(boot.node, listeners=(replace(LISTENERS[0], tls=NEW), LISTENERS[1]))


def test_a_listener_that_is_gone_new_or_turned_is_as_it_was(tmp_path: Path) -> None:
    boot = snapshot(tmp_path, listeners=LISTENERS)
    for wanted in (
        changed(boot, Listener("renamed", "127.0.0.1:1", NEW)),
        changed(boot, replace(LISTENERS[0], tls=None), replace(LISTENERS[1], tls=NEW)),
    ):
        assert applicable(boot, wanted).node == boot.node
