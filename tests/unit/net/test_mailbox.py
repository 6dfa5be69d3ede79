"""Mailbox frames: round trips, other layouts refused, descriptors neither lost nor leaked."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascproxy.net.mailbox import HEAD, LAYOUT, MAX_FRAME, Frame, FrameError, Kind, Mailbox, decode, encode

PAYLOADS = st.dictionaries(st.text(max_size=20), st.integers(-(2**53), 2**53) | st.text() | st.none() | st.booleans())


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@given(st.sampled_from(Kind), st.integers(0, 2**32 - 1), PAYLOADS)
def test_a_frame_comes_back_as_it_was(kind: Kind, request: int, payload: dict[str, object]) -> None:
    assert decode(encode(Frame(kind, request, payload))) == Frame(kind, request, payload)


@given(st.binary(max_size=200))
def test_any_other_bytes_are_refused(data: bytes) -> None:
    try:
        frame = decode(data)
    except FrameError:
        return
    assert data[0] == LAYOUT
    assert frame.kind in Kind


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "too short"),
        (encode(Frame(Kind.BEAT))[:5], "too short"),
        (HEAD.pack(LAYOUT + 1, Kind.BEAT, 0) + b"{}", f"layout {LAYOUT + 1}"),
        (HEAD.pack(LAYOUT, 250, 0) + b"{}", "250"),
        (HEAD.pack(LAYOUT, Kind.BEAT, 0) + b"[]", "must be an object"),
        (HEAD.pack(LAYOUT, Kind.BEAT, 0) + b"{", "not a mailbox frame"),
    ],
)
def test_what_is_wrong_is_said(data: bytes, why: str) -> None:
    with pytest.raises(FrameError, match=why):
        decode(data)


def test_the_bytes_of_layout_1() -> None:
    assert encode(Frame(Kind.DRAIN, 0x01020304, {"unary_ms": 5})) == b'\x01\x08\x04\x03\x02\x01{"unary_ms":5}'
    assert [kind.value for kind in Kind] == list(range(1, 12))


def test_descriptors_travel_and_are_closed_on_exec(tmp_path: Path) -> None:
    ours, theirs = Mailbox.pair()
    file = tmp_path / "f"
    file.write_text("passed")
    with file.open() as opened:
        assert ours.send(Frame(Kind.REVISION, 7, descriptors=(opened.fileno(),)))
    frame = theirs.receive()
    assert frame is not None and frame.request == 7
    assert not os.get_inheritable(frame.descriptors[0])
    assert os.read(frame.descriptors[0], 10) == b"passed"
    os.close(frame.descriptors[0])


def test_a_refused_frame_leaks_no_descriptor() -> None:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mailbox = Mailbox(other)
    before = open_descriptors()
    socket.send_fds(one, [HEAD.pack(LAYOUT + 1, Kind.REVISION, 1) + b"{}"], [0, 1, 2])
    with pytest.raises(FrameError):
        mailbox.receive()
    assert open_descriptors() == before
    one.close()
    mailbox.close()


def test_discard_takes_everything_broken_frames_too() -> None:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mailbox = Mailbox(other)
    before = open_descriptors()
    socket.send_fds(one, [encode(Frame(Kind.REVISION, 1))], [0])
    one.send(b"\x09")
    one.send(encode(Frame(Kind.BEAT)))
    assert mailbox.discard() == 3
    assert mailbox.receive() is None
    assert open_descriptors() == before
    one.close()
    mailbox.close()


def test_a_peer_that_does_not_read_is_seen_and_does_not_block() -> None:
    ours, theirs = Mailbox.pair()
    sent = 0
    while ours.send(Frame(Kind.BEAT, payload={"pad": "x" * 1000})):
        sent += 1
    assert sent > 0
    assert theirs.discard() == sent
    assert ours.send(Frame(Kind.BEAT))
    with pytest.raises(FrameError, match="at most"):
        ours.send(Frame(Kind.BEAT, payload={"pad": "x" * MAX_FRAME}))
    theirs.close()
    with pytest.raises(EOFError):
        ours.receive()
    assert not ours.send(Frame(Kind.BEAT))
