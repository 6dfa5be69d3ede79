"""A worker never takes more connections than its descriptors allow (LIMITS 1, decision 4)."""

from __future__ import annotations

import resource

import pytest

from ascproxy.model.node import Limits
from ascproxy.worker.datapath import native_limits, native_network


@pytest.mark.parametrize(
    ("descriptors", "wanted", "given"),
    [(20_000, 16_384, 9_872), (1_048_576, 16_384, 16_384), (1_024, 16_384, 384), (256, 16_384, 1), (20_000, 100, 100)],
)
def test_connections_are_bounded_by_descriptors(
    monkeypatch: pytest.MonkeyPatch, descriptors: int, wanted: int, given: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (descriptors, descriptors))
    assert native_limits(Limits(max_connections=wanted))["max_connections"] == given


def test_networks_are_as_the_core_compares_them() -> None:
    assert native_network("10.1.0.0/16") == (bytes(10) + b"\xff\xff\x0a\x01\0\0", 112)
    assert native_network("192.0.2.7/32") == (bytes(10) + b"\xff\xff\xc0\0\x02\x07", 128)
    assert native_network("2001:db8::/32") == (b"\x20\x01\x0d\xb8" + bytes(12), 32)
