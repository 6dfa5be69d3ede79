"""Binding: one socket per slot, stale socket files, passed sockets, and sentences for what is wrong."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from ascproxy.net import listener
from ascproxy.net.listener import ListenError
from tests.kit.processes import free_port


def test_slots_share_a_port_and_each_has_its_socket() -> None:
    addresses = {"main": f"127.0.0.1:{free_port()}"}
    listener.ensure_free(addresses)
    slots = [*listener.bind_slot(addresses), *listener.bind_slot(addresses)]
    assert slots[0].socket.getsockname() == slots[1].socket.getsockname()
    for bound in slots:
        assert not bound.socket.get_inheritable()
        bound.socket.listen()
    with pytest.raises(ListenError, match="in use by another process"):  # SO_REUSEPORT alone would not see it
        listener.ensure_free(addresses)
    listener.stop_listening(slots)
    listener.ensure_free(addresses)


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("192.0.2.1:20000", "no such address"),
        ("127.0.0.1:port", "not an address"),
        ("unix:/nonexistent/folder/s.sock", "no such file"),
    ],
)
def test_what_cannot_be_bound_is_one_sentence(address: str, why: str) -> None:
    with pytest.raises(ListenError, match=why) as caught:
        listener.bind_alone(address)
    assert address in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ipv6() -> None:
    port = free_port()
    with listener.bind_alone(f"[::1]:{port}") as bound:
        assert bound.getsockname()[:2] == ("::1", port)


def test_a_stale_unix_socket_is_replaced_a_living_one_and_a_file_are_not(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    listener.bind_unix(str(path), 0o600).close()
    assert path.exists()  # as a crash leaves it
    living = listener.bind_unix(str(path), 0o600)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ListenError, match="in use by another process"):
        listener.bind_unix(str(path))
    living.close()
    plain = tmp_path / "file"
    plain.write_text("x")
    with pytest.raises(ListenError, match="no socket"):
        listener.bind_unix(str(plain))
    assert plain.read_text() == "x"


def test_passed_sockets_need_our_pid() -> None:
    environment = {"LISTEN_PID": str(os.getpid() + 1), "LISTEN_FDS": "1"}
    assert listener.passed_sockets(environment, os.getpid(), {}) == ()


def test_a_unix_listener_is_unlinked_when_it_stops(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    bound = listener.bind_shared({"local": f"unix:{path}", "tcp": "127.0.0.1:1"})
    assert [each.name for each in bound] == ["local"]
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    listener.stop_listening(bound)
    assert not path.exists()
