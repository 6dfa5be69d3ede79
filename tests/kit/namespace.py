"""A network of its own for a test: callers that are not loopback, without a cable and without touching this machine.

Connections between the addresses of ``NETWORK`` stay inside, and processes that are started inside stay there too.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import socket
import struct
import threading
from collections.abc import Callable

import pytest

CLONE_NEWNET = 0x40000000
SIOCGIFFLAGS, SIOCSIFFLAGS, SIOCSIFADDR = 0x8913, 0x8914, 0x8916
IFF_UP = 1
NETWORK = "192.0.2."  # TEST-NET-1 (RFC 5737): all of its addresses are local in the namespace
SERVER = NETWORK + "1"


def _ifreq(name: bytes, data: bytes) -> bytes:
    return struct.pack("16s24s", name, data)


def _enter() -> None:
    """Give this thread a network namespace, with loopback up and :data:`NETWORK` on it."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) != 0:
        raise PermissionError(ctypes.get_errno(), "unshare")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for name, address in ((b"lo", "127.0.0.1"), (b"lo:1", SERVER)):
            where = struct.pack("HH4s", socket.AF_INET, 0, socket.inet_aton(address))
            fcntl.ioctl(control, SIOCSIFADDR, _ifreq(name, where))
        flags = struct.unpack_from("H", fcntl.ioctl(control, SIOCGIFFLAGS, _ifreq(b"lo", b"")), 16)[0]
        fcntl.ioctl(control, SIOCSIFFLAGS, _ifreq(b"lo", struct.pack("H", flags | IFF_UP)))


def inside(run: Callable[[], None]) -> None:
    """Run ``run`` inside a new namespace, on a thread that ends with it. Skips the test where that is not allowed."""
    failed: list[BaseException] = []

    def thread() -> None:
        try:
            _enter()
            run()
        except BaseException as error:  # noqa: BLE001 - carried to the test's own thread
            failed.append(error)

    running = threading.Thread(target=thread)
    running.start()
    running.join()
    if failed and isinstance(failed[0], PermissionError) and failed[0].args[1:] == ("unshare",):
        pytest.skip("a network namespace needs CAP_SYS_ADMIN: run this test as root")
    if failed:
        raise failed[0]


def connect(source: str, port: int) -> socket.socket:
    """A connection from an address of the namespace to its server."""
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(socket.socket())
        client.settimeout(10)
        client.bind((source, 0))
        client.connect((SERVER, port))
        stack.pop_all()
        return client
