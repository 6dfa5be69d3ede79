"""Who is let in at the named socket, and who is believed to be behind it."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from ascproxy.errors import AscproxyError, UsageError
from ascproxy.net.mailbox import Frame, Kind
from ascproxy.net.meeting import Meeting, PeerError, join, uid_of

US = os.geteuid()
OTHER = US + 1


def test_what_they_have_is_a_mailbox_that_passes_descriptors(tmp_path: Path) -> None:
    meeting = Meeting.open(tmp_path / "gateway.sock", US)
    assert meeting.accept() is None
    theirs = join(tmp_path / "gateway.sock", US)
    ours = meeting.accept()
    assert ours is not None
    reading, writing = os.pipe()
    assert ours.send(Frame(Kind.SERVE, 7, {"a": 1}, (writing,)))
    frame = theirs.receive()
    assert frame is not None and (frame.kind, frame.request, frame.payload) == (Kind.SERVE, 7, {"a": 1})
    os.write(frame.descriptors[0], b"passed")
    assert os.read(reading, 6) == b"passed"
    ours.close()
    with pytest.raises(EOFError):
        theirs.receive()
    for descriptor in (reading, writing, *frame.descriptors):
        os.close(descriptor)
    theirs.close()
    meeting.close()


def test_the_socket_is_for_the_group_and_outlives_an_exec(tmp_path: Path) -> None:
    path = tmp_path / "gateway.sock"
    first = Meeting.open(path, US)
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    again = Meeting.inherited(os.dup(first.fileno()), US)
    first.close()
    assert not os.get_inheritable(again.fileno())
    theirs = join(path, US)
    assert again.accept() is not None
    theirs.close()
    again.close()


def test_another_user_is_refused_and_hung_up_on(tmp_path: Path) -> None:
    meeting = Meeting.open(tmp_path / "gateway.sock", OTHER)
    theirs = join(tmp_path / "gateway.sock", US)
    with pytest.raises(
        PeerError, match=rf"uid {US}\) at the gateway's socket is refused \(pid {os.getpid()}\): .*{OTHER}"
    ):
        meeting.accept()
    with pytest.raises(EOFError):
        theirs.receive()
    assert meeting.accept() is None, "the next one may come"
    theirs.close()
    meeting.close()


def test_another_users_socket_is_refused(tmp_path: Path) -> None:
    meeting = Meeting.open(tmp_path / "gateway.sock", US)
    with pytest.raises(PeerError, match=rf"behind {tmp_path}/gateway.sock is refused"):
        join(tmp_path / "gateway.sock", OTHER)
    ours = meeting.accept()
    assert ours is not None
    with pytest.raises(EOFError):
        ours.receive()
    ours.close()
    meeting.close()


def test_nobody_is_there_yet(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        join(tmp_path / "gateway.sock", US)
    Meeting.open(tmp_path / "gateway.sock", US).close()
    with pytest.raises(ConnectionRefusedError):
        join(tmp_path / "gateway.sock", US)


def test_a_stream_socket_is_not_taken_for_it(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(tmp_path / "gateway.sock"))
        other.listen()
        with pytest.raises(OSError, match="Protocol wrong type"):
            join(tmp_path / "gateway.sock", US)


def test_a_place_that_cannot_be_listened_on_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(AscproxyError, match=f"cannot listen on {tmp_path}/none/gateway.sock: no such file"):
        Meeting.open(tmp_path / "none" / "gateway.sock", US)


def test_users_by_name_and_by_number() -> None:
    assert uid_of("root") == 0
    assert uid_of("1234") == 1234
    with pytest.raises(UsageError, match="there is no user nobody-of-this-name on this machine"):
        uid_of("nobody-of-this-name")
