"""The grammar of API keys."""

from __future__ import annotations

import hashlib

import pytest

from ascproxy.auth import apikey
from tests.kit.snapshots import KEY, SECRET, key_row

DIGEST = hashlib.sha256(SECRET.encode()).digest()


def test_a_key_is_an_id_and_a_secret() -> None:
    assert apikey.parse(KEY.encode()) == ("k1", DIGEST)


def test_a_secret_may_hold_the_separator() -> None:
    secret = b"_" * 43
    assert apikey.parse(b"asc_k1_" + secret) == ("k1", hashlib.sha256(secret).digest())


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"asc",
        b"asc__" + b"A" * 43,
        b"asc_K1_" + b"A" * 43,
        b"asc_k1_" + b"A" * 42,
        b"asc_k1_" + b"A" * 44,
        b"asc_k1_" + b"A" * 42 + b"=",
        b"asc_k1_" + b"A" * 43 + b"\n",
        b"asc_" + b"a" * 33 + b"_" + b"A" * 43,
        b"sk_k1_" + b"A" * 43,
        b"asc_k1_" + b"\xff" * 43,
    ],
)
def test_what_is_no_key(text: bytes) -> None:
    assert apikey.parse(text) is None


def test_only_the_same_secret_matches() -> None:
    assert apikey.matches(key_row(), DIGEST)
    for bit in range(256):
        other = bytearray(DIGEST)
        other[bit // 8] ^= 1 << bit % 8
        assert not apikey.matches(key_row(), bytes(other))
