"""Sealed memory files."""

from __future__ import annotations

import os

import pytest

from ascproxy.net import memfile


@pytest.mark.parametrize("data", [b"", b"x", os.urandom(3_000_000)], ids=len)
def test_what_is_sealed_is_read_and_cannot_be_changed(data: bytes) -> None:
    descriptor = memfile.seal("test", data)
    assert memfile.read(descriptor) == data
    for change in (lambda: os.pwrite(descriptor, b"y", 0), lambda: os.ftruncate(descriptor, 99)):
        with pytest.raises(PermissionError):
            change()
    os.close(descriptor)


def test_an_unsealed_file_is_not_read() -> None:
    descriptor = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(descriptor, b"x")
    with pytest.raises(ValueError, match="not sealed"):
        memfile.read(descriptor)
    os.close(descriptor)
