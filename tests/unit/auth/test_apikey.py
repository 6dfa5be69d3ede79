"""The text of API keys (DESIGN D12)."""

from __future__ import annotations

import dataclasses
import hashlib
import os

import pytest

from ascproxy.auth import apikey


def minted(random=os.urandom):
    return apikey.mint("acme", models=["m"], operations=["embeddings"], created_ms=5, expires_ms=9, random=random)


def test_a_minted_key_is_recognised() -> None:
    text, row = minted()
    found = apikey.parse(text.encode())
    assert found is not None
    key_id, digest = found
    assert key_id == row.id
    assert apikey.matches(row, digest)
    assert (row.tenant, row.models, row.operations, row.created_ms, row.expires_ms) == (
        "acme",
        ("m",),
        ("embeddings",),
        5,
        9,
    )


def test_the_row_does_not_hold_the_secret() -> None:
    text, row = minted()
    secret = text.rsplit("_", 1)[1] if text.count("_") == 2 else text.split("_", 2)[2]
    assert secret not in repr(dataclasses.asdict(row))
    assert row.secret_sha256 == hashlib.sha256(secret.encode()).digest()


def test_another_secret_does_not_match() -> None:
    _, row = minted()
    other = apikey.parse(minted()[0].encode())
    assert other is not None
    assert not apikey.matches(row, other[1])


def test_ids_are_uniform_over_their_characters() -> None:
    """Bytes that would favour some characters are dropped: 252 to 255 never count."""
    stream = iter(bytes([255, 254, 253, 252]) * 6 + bytes(range(24)) + b"s" * 32)
    text, row = minted(lambda n: bytes(next(stream) for _ in range(n)))
    assert row.id == apikey.ID_CHARACTERS[:12]
    assert text.startswith("asc_abcdefghijkl_")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"sk-something",
        b"asc_abcdefghijkl_",
        b"asc_abcdefghijkl_" + b"A" * 42,
        b"asc_abcdefghijkl_" + b"A" * 44,
        b"asc_ABCDEFGHIJKL_" + b"A" * 43,
        b"asc__" + b"A" * 43,
        b"asc_abcdefghijkl_" + b"A" * 42 + b"=",
        b"asc_abcdefghijkl_" + b"A" * 43 + b"\n",
        b" asc_abcdefghijkl_" + b"A" * 43,
        b"\xff" * 60,
    ],
)
def test_what_is_no_key_is_refused_by_grammar(text: bytes) -> None:
    assert apikey.parse(text) is None
