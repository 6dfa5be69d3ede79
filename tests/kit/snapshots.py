"""Snapshots for tests, with defaults for everything that a test does not speak of."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from ascproxy.model.key import KeyRow
from ascproxy.model.node import Limits, Listener, Node
from ascproxy.model.provider import Credential, Endpoint, Provider, ProviderType
from ascproxy.model.route import Route, Target
from ascproxy.model.snapshot import Snapshot
from ascproxy.model.tenant import Tenant

SECRET = "A" * 43
KEY = f"asc_k1_{SECRET}"


def key_row(key_id: str = "k1", **members: Any) -> KeyRow:
    """The row of the key ``asc_<key_id>_`` + SECRET."""
    return KeyRow(
        id=key_id, **({"tenant": "acme", "secret_sha256": hashlib.sha256(SECRET.encode()).digest()} | members)
    )


def endpoint(number: int, url: str | None = None) -> Endpoint:
    """Endpoint ``number`` at ``http://127.0.0.1:(8000 + number)``, or at a host of ``url``."""
    if url is None:
        return Endpoint(number, f"http://127.0.0.1:{8000 + number}", "http", "127.0.0.1", 8000 + number, "")
    scheme, _, rest = url.partition("://")
    place, slash, path = rest.partition("/")
    host, _, port = place.partition(":")
    return Endpoint(
        number, url, scheme, host, int(port or (443 if scheme == "https" else 80)), slash + path if path else ""
    )


def provider(name: str, *endpoints: int | Endpoint, type: str = "vllm", **members: Any) -> Provider:  # noqa: A002
    return Provider(
        name, ProviderType(type), tuple(e if isinstance(e, Endpoint) else endpoint(e) for e in endpoints), **members
    )


def route(name: str, *models: str, to: tuple[str | Target, ...] = ("rack-a",), **members: Any) -> Route:
    targets = tuple(t if isinstance(t, Target) else Target(t) for t in to)
    return Route(name, models or (name,), targets, **members)


def snapshot(
    routes: tuple[Route, ...],
    providers: tuple[Provider, ...],
    *,
    credentials: tuple[Credential, ...] = (),
    tenants: tuple[str, ...] = ("acme",),
    limits: Limits | None = None,
    revision: str = "0123456789ab",
) -> Snapshot:
    limits = limits or Limits()
    node = Node(
        "n", "/s", "/r", 1, (Listener("public", "127.0.0.1:1", limits=limits),), "127.0.0.1:2", limits=replace(limits)
    )
    return Snapshot(revision, node, tuple(map(Tenant, tenants)), credentials, providers, routes)
