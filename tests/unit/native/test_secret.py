"""Secrets from Python's side: what goes in cannot come out, and nothing of it stays."""

from __future__ import annotations

import copy
import gc
import os
import pickle
from pathlib import Path

import pytest

from ascproxy._native import Secret, SecretArena, SecretError

VALUE = b"sk-" + b"Zq7" * 20


def wipeable() -> bytearray:
    return bytearray(VALUE)


def test_a_loaded_secret_is_opaque_and_freed_when_dropped(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_bytes(VALUE + b"\n")
    arena = SecretArena()
    secret = arena.load(str(file))
    assert type(secret) is Secret
    assert repr(secret) == str(secret) == f"{secret}" == "<Secret>"
    assert arena.used == 64
    with pytest.raises(TypeError):
        len(secret)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        bytes(secret)  # type: ignore[call-overload]
    with pytest.raises(TypeError):
        memoryview(secret)  # type: ignore[arg-type]
    assert not [name for name in dir(secret) if name not in dir(object)]
    del secret
    assert arena.used == 0


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_secret_is_not_pickled(protocol: int) -> None:
    secret = SecretArena().put(wipeable())
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        pickle.dumps(secret, protocol)


def test_a_secret_is_neither_copied_nor_made_nor_subclassed() -> None:
    secret = SecretArena().put(wipeable())
    for make in (copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            make(secret)
    with pytest.raises(TypeError):
        Secret()
    with pytest.raises(TypeError):
        type("Child", (Secret,), {})
    assert secret != SecretArena().put(wipeable())


def test_put_wipes_the_bytearray_even_when_it_refuses_the_value() -> None:
    arena = SecretArena()
    good, bad = wipeable(), bytearray(b"two words")
    secret = arena.put(good)
    assert arena.used == 64
    with pytest.raises(SecretError, match="byte 4 cannot stand in a header") as refused:
        arena.put(bad)
    assert "two" not in str(refused.value)
    assert not any(good)
    assert not any(bad)
    assert secret is not None


@pytest.mark.parametrize("value", [b"immutable", "text", memoryview(b"view")])
def test_put_takes_nothing_that_it_could_not_wipe(value: object) -> None:
    with pytest.raises(TypeError, match="bytearray"):
        SecretArena().put(value)  # type: ignore[arg-type]


def test_a_secret_keeps_its_arena() -> None:
    arena = SecretArena()
    secret = arena.put(wipeable())
    del arena
    gc.collect()
    assert repr(secret) == "<Secret>"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty; write the value into it"),
        (b"\n", "is empty; write the value into it"),
        (b"k" * 16_385, "is longer than 16384 bytes"),
        (b"two words\n", "byte 4 cannot stand in a header"),
        (b"one\ntwo\n", "byte 4 cannot stand in a header"),
        ("schlüssel".encode(), "byte 5 cannot stand in a header"),
    ],
)
def test_a_file_that_cannot_become_a_header_is_named(tmp_path: Path, content: bytes, sentence: str) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    arena = SecretArena()
    with pytest.raises(SecretError) as refused:
        arena.load(str(file))
    assert str(file) in str(refused.value)
    assert sentence in str(refused.value)
    assert arena.used == 0


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (tmp_path, fifo, Path("/dev/null")):
        with pytest.raises(SecretError, match="not a regular file"):
            SecretArena().load(str(path))
    with pytest.raises(SecretError, match="No such file or directory; check the path"):
        SecretArena().load(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="null"):
        SecretArena().load("a\0b")


def test_a_full_arena_says_so_and_has_room_again_after_a_drop(tmp_path: Path) -> None:
    arena = SecretArena(4096)
    first = arena.put(bytearray(b"k" * 4000))
    with pytest.raises(SecretError, match="no room in the secret arena"):
        arena.put(wipeable() * 2)
    del first
    arena.put(wipeable() * 2)


@pytest.mark.parametrize("size", [0, -1])
def test_an_arena_has_a_size(size: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        SecretArena(size)


CHUNK = 1 << 20


def _mappings_with(mirrored: bytes) -> list[list[bytes]]:
    """Kernel flags of the private writable mappings of this process that hold the reverse of ``mirrored``.

    One buffer is read into, and zeroed before each read, so that what was seen does not become one more copy.
    """
    found: list[list[bytes]] = []
    buffer, zeroes = bytearray(CHUNK), bytes(CHUNK)
    start = end = 0
    with Path("/proc/self/mem").open("rb", buffering=0) as memory:
        for line in Path("/proc/self/smaps").read_bytes().splitlines():
            fields = line.split()
            if not fields[0].endswith(b":"):
                start, end = (int(x, 16) for x in fields[0].split(b"-"))
                end = end if fields[1].startswith(b"rw") else start
            elif fields[0] == b"VmFlags:":
                hit = False
                for at in range(start, end, CHUNK - len(mirrored)):
                    buffer[:] = zeroes
                    memory.seek(at)
                    memory.readinto(memoryview(buffer)[: end - at])
                    hit = hit or buffer[::-1].find(mirrored) >= 0
                buffer[:] = zeroes
                if hit:
                    found.append(fields[1:])
    return found


def test_the_value_is_in_memory_once_in_the_arena_and_nowhere_after_it_is_dropped(tmp_path: Path) -> None:
    # The wanted bytes exist here only reversed and one by one, so that looking for them does not find the looking.
    mirrored = os.urandom(24).hex().encode()
    file = tmp_path / "key"
    with file.open("wb", buffering=0) as out:
        for byte in reversed(mirrored):
            out.write(bytes([byte]))
    arena = SecretArena()
    secret = arena.load(str(file))
    places = _mappings_with(mirrored)
    assert len(places) == 1
    assert {b"dd", b"wf"} <= set(places[0])
    assert (b"lo" in places[0]) == arena.locked
    del secret
    assert _mappings_with(mirrored) == []
