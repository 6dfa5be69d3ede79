"""What a running node takes of a new configuration, and what it keeps until a restart.

Everything that was fixed when the service started stays as it was in every revision after: a worker that starts later
must find the listeners that it was given sockets for. Pure.
"""

from __future__ import annotations

from dataclasses import replace

from ascproxy.model.node import Listener
from ascproxy.model.snapshot import Snapshot


def applicable(boot: Snapshot, wanted: Snapshot) -> Snapshot:
    """``wanted`` with the node file of ``boot``, but for the certificates of its listeners."""
    listeners = {listener.name: listener for listener in wanted.node.listeners}
    kept = tuple(_listener(listener, listeners.get(listener.name)) for listener in boot.node.listeners)
    return replace(wanted, node=replace(boot.node, listeners=kept))


def _listener(boot: Listener, wanted: Listener | None) -> Listener:
    if wanted is None or wanted.tls is None or boot.tls is None:
        return boot
    return replace(boot, tls=wanted.tls)
