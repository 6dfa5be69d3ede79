"""Frames between the supervisor and its children, over one SOCK_SEQPACKET socket each (DESIGN 2).

A frame is a datagram: byte 0 the layout, byte 1 the kind, bytes 2-5 the request id (little endian), then a JSON object.
Descriptors travel beside it (SCM_RIGHTS). Every command is answered by DONE or FAILED with its request id; READY and
BEAT are news, with request id 0. The supervisor keeps both ends of a slot's mailbox across respawns, so that what a
dead worker left unread must be thrown away with :meth:`Mailbox.discard` before its successor starts.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import orjson

from ascproxy.errors import AscproxyError

LAYOUT = 1
MAX_FRAME = 131_072
MAX_DESCRIPTORS = 64
HEAD = struct.Struct("<BBI")


class Kind(IntEnum):
    """What a frame says. Numbers are a contract between versions: never reused."""

    DONE = 1  # answers a command: it has been carried out
    FAILED = 2  # answers a command: {"reason"}; nothing has changed
    READY = 3  # worker: it accepts; {"revision"}. control: it serves
    BEAT = 4  # alive: {"in_flight"}
    REVISION = 5  # to a worker, with the snapshot's descriptor: use it; {"tickets"}
    ADOPT = 6  # to a worker, with a slot's sockets: accept on them too; {"slot", "names"}
    RELEASE = 7  # to a worker: stop accepting on that slot's sockets; {"slot"}
    DRAIN = 8  # to a worker: finish and exit; {"unary_ms", "stream_ms", "idle_ms"}
    LOAD = 9  # to control: check and compile the configuration; DONE comes with the snapshot's descriptor and
    # {"revision", "warnings", "restart", "trust"}. At an upgrade with the first snapshot, as SERVE has it
    SERVE = 10  # to control, with snapshot in force, first snapshot, two sockets, shared page: serve this; {"run_dir"}
    TICKETS = 11  # to a worker: keys of session tickets; {"tickets"}: hexadecimal, TicketKeys.pack


class FrameError(AscproxyError):
    """A datagram that is no frame of this version's layout."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One message. ``descriptors`` of a received frame belong to the receiver, who must close them."""

    kind: Kind
    request: int = 0
    payload: dict[str, Any] = field(default_factory=dict)
    descriptors: tuple[int, ...] = ()


def encode(frame: Frame) -> bytes:
    """The datagram of a frame, without its descriptors."""
    return HEAD.pack(LAYOUT, frame.kind, frame.request) + orjson.dumps(frame.payload)


def decode(data: bytes, descriptors: tuple[int, ...] = ()) -> Frame:
    """The frame in a datagram. Raises :class:`FrameError` for another layout, an unknown kind or a broken payload."""
    if len(data) < HEAD.size:
        raise FrameError("mailbox frame is too short")
    layout, kind, request = HEAD.unpack_from(data)
    if layout != LAYOUT:
        raise FrameError(f"mailbox frame has layout {layout}, this version reads layout {LAYOUT}")
    try:
        payload = orjson.loads(data[HEAD.size :])
        known = Kind(kind)
    except ValueError as error:
        raise FrameError(f"not a mailbox frame: {error}") from error
    if not isinstance(payload, dict):
        raise FrameError("the payload of a mailbox frame must be an object")
    return Frame(known, request, payload, descriptors)


class Mailbox:
    """One end of a mailbox; never blocks unless asked to wait."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        end.setblocking(False)

    @classmethod
    def pair(cls) -> tuple[Mailbox, Mailbox]:
        """Two connected ends."""
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(one), cls(other)

    @classmethod
    def inherited(cls, descriptor: int) -> Mailbox:
        """The end that a parent left under this number; it is not passed on further."""
        os.set_inheritable(descriptor, False)
        return cls(socket.socket(fileno=descriptor))

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, frame: Frame) -> bool:
        """Send at once. False when the peer does not read (its queue is full) or is gone."""
        data = encode(frame)
        if len(data) > MAX_FRAME:
            raise FrameError(f"mailbox frame of {len(data)} bytes, at most {MAX_FRAME}")
        try:
            socket.send_fds(self._socket, [data], list(frame.descriptors))
        except (BlockingIOError, BrokenPipeError, ConnectionError):
            return False
        return True

    def receive(self) -> Frame | None:
        """The next frame, None when there is none. Raises :class:`FrameError`, and EOFError when the peer is gone."""
        try:
            # Not socket.recv_fds: Python 3.11 forgets its flags, and descriptors would survive an exec.
            data, ancillary, flags, _ = self._socket.recvmsg(
                MAX_FRAME, socket.CMSG_SPACE(4 * MAX_DESCRIPTORS), socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return None
        except ConnectionError as error:
            raise EOFError from error
        if not data:
            raise EOFError
        descriptors = [number for level, kind, found in ancillary for number in _rights(level, kind, found)]
        try:
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise FrameError("mailbox frame was cut off")
            return decode(data, tuple(descriptors))
        except FrameError:
            _close(descriptors)
            raise

    def discard(self) -> int:
        """Throw away what waits here; the number of frames."""
        n = 0
        while True:
            try:
                frame = self.receive()
            except FrameError:
                n += 1
                continue
            except EOFError:
                return n
            if frame is None:
                return n
            _close(frame.descriptors)
            n += 1

    def close(self) -> None:
        self._socket.close()


def _rights(level: int, kind: int, data: bytes) -> array.array[int]:
    numbers = array.array("i")
    if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
        numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
    return numbers


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
