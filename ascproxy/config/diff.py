"""What a reload cannot apply: differences that are fixed when the service starts."""

from __future__ import annotations

from ascproxy.model.node import Listener
from ascproxy.model.snapshot import Snapshot


def needs_restart(running: Snapshot, wanted: Snapshot) -> tuple[str, ...]:
    """One sentence for each difference that takes effect at the next restart; everything else is applied at once."""
    before, after = running.node, wanted.node
    found = [
        f"{what}: {old} stays in force until a restart, then {new}"
        for what, old, new in (
            ("node", before.name, after.name),
            ("state_dir", before.state_dir, after.state_dir),
            ("run_dir", before.run_dir, after.run_dir),
            ("workers", before.workers, after.workers),
            ("metrics.address", before.metrics_address, after.metrics_address),
            ("access_log", before.access_log, after.access_log),
        )
        if old != new
    ]
    if before.limits != after.limits:
        found.append("limits: the running ones stay in force until a restart")
    old, new = {each.name: each for each in before.listeners}, {each.name: each for each in after.listeners}
    found += [f"listener {name}: it is opened at a restart" for name in new if name not in old]
    found += [f"listener {name}: it is closed at a restart" for name in old if name not in new]
    found += [sentence for name in new if name in old for sentence in _listener(old[name], new[name])]
    return tuple(found)


def _listener(before: Listener, after: Listener) -> list[str]:
    found = []
    if before.address != after.address:
        found.append(f"listener {after.name}: it stays at {before.address} until a restart")
    if (before.tls is None) != (after.tls is None):
        found.append(f"listener {after.name}: tls is turned {'off' if after.tls is None else 'on'} at a restart")
    if before.proxy_protocol != after.proxy_protocol:
        turned = "on" if after.proxy_protocol else "off"
        found.append(f"listener {after.name}: proxy_protocol is turned {turned} at a restart")
    if before.limits != after.limits:
        found.append(f"listener {after.name}: its running limits stay in force until a restart")
    return found
