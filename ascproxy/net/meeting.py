"""Where parts of the service that run under users of their own meet: a named SOCK_SEQPACKET socket in ``run_dir``.

The gateway listens and control comes, because the gateway is what must not stop. Each asks the kernel which user the
other is (SO_PEERCRED): a folder's permissions can be wrong, and a name can be taken by somebody else. What they have
then is a mailbox like that between a parent and its child.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
import struct
from pathlib import Path

from ascproxy.errors import AscproxyError, UsageError
from ascproxy.net.mailbox import Mailbox

GATEWAY_SOCKET = "gateway.sock"
MODE = 0o660  # whoever may connect is asked for its uid; the group keeps others from filling the queue
BACKLOG = 8
PEER = struct.Struct("iII")  # struct ucred of unix(7): pid, uid, gid


class PeerError(AscproxyError):
    """Somebody else is at the other end; the sentence says who, and who was expected."""


class Meeting:
    """The listening socket. ``uid`` is the only user that is let in."""

    def __init__(self, end: socket.socket, uid: int) -> None:
        self._socket = end
        self.uid = uid
        end.setblocking(False)

    @classmethod
    def open(cls, path: Path, uid: int) -> Meeting:
        """Listen at ``path``, where nothing is yet. Raises :class:`AscproxyError`."""
        end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            end.bind(str(path))
            path.chmod(MODE)
            end.listen(BACKLOG)
        except OSError as error:
            end.close()
            raise AscproxyError(f"cannot listen on {path}: {(error.strerror or str(error)).lower()}") from error
        return cls(end, uid)

    @classmethod
    def inherited(cls, descriptor: int, uid: int) -> Meeting:
        """The socket that the program before has left under this number."""
        os.set_inheritable(descriptor, False)
        return cls(socket.socket(fileno=descriptor), uid)

    def fileno(self) -> int:
        return self._socket.fileno()

    def accept(self) -> Mailbox | None:
        """The mailbox of who has come, None if nobody has. Raises :class:`PeerError` for another user."""
        try:
            end, _ = self._socket.accept()
        except OSError:  # gone again, or no descriptor is left: a supervisor does not end of that
            return None
        try:
            _expect(end, self.uid, "at the gateway's socket")
        except PeerError:
            end.close()
            raise
        return Mailbox(end)

    def close(self) -> None:
        self._socket.close()


def join(path: Path, uid: int) -> Mailbox:
    """Connect to who listens at ``path``. Raises OSError while nobody does, :class:`PeerError` if it is not ``uid``."""
    end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with contextlib.ExitStack() as undo:
        undo.callback(end.close)
        end.setblocking(False)  # a full queue is a reason to try again, not to hang in
        end.connect(str(path))
        _expect(end, uid, f"behind {path}")
        undo.pop_all()
    return Mailbox(end)


def uid_of(user: str) -> int:
    """The uid of a user's name, or of a number. Raises :class:`UsageError` if there is no such user."""
    if user.isdecimal():
        return int(user)
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        raise UsageError(f"there is no user {user} on this machine: make it, or name another with --peer") from None


def _expect(end: socket.socket, uid: int, where: str) -> None:
    pid, found, _ = PEER.unpack(end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))
    if found != uid:
        raise PeerError(f"{_user(found)} {where} is refused (pid {pid}): {_user(uid)} is expected there, see --peer")


def _user(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"
