"""Listening sockets: bound before any worker exists, one per slot for TCP, shared for Unix and passed sockets.

A TCP address gets one ``SO_REUSEPORT`` socket per slot, held by the supervisor for the life of the service (measured:
worker-owned sockets reset 95 of 200 queued connections at a respawn, supervisor-held none). What goes wrong while
binding becomes one sentence for the operator. What does not do: accept.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ascproxy.errors import AscproxyError

BACKLOG = 4096  # the kernel caps it at net.core.somaxconn
UNIX_PREFIX = "unix:"
SD_LISTEN_FDS_START = 3
SD_NAME_UNKNOWN = "unknown"
REMEDIES = {
    errno.EADDRINUSE: "the address is in use by another process: stop it or choose another port",
    errno.EACCES: "permission denied: ports below 1024 need CAP_NET_BIND_SERVICE, choose another or grant it",
    errno.EADDRNOTAVAIL: "this machine has no such address: choose one that `ip address` lists, or 0.0.0.0",
    errno.EAFNOSUPPORT: "this machine does not speak that address family",
}


class ListenError(AscproxyError):
    """An address cannot be listened on; the sentence says what to do."""


@dataclass(frozen=True, slots=True)
class Bound:
    """A listening socket for the listener ``name``. ``shared``: every worker accepts on it, else one slot's worker.

    ``passed``: it came from the service manager, which still holds it: closed, never shut down or unlinked by us.
    """

    name: str
    socket: socket.socket
    shared: bool
    passed: bool = False


def resolve(address: str) -> tuple[socket.AddressFamily, tuple[str, int] | str]:
    """Family and socket address of ``host:port``, ``[v6]:port`` or ``unix:/path``. Raises :class:`ListenError`."""
    if address.startswith(UNIX_PREFIX):
        return socket.AF_UNIX, address.removeprefix(UNIX_PREFIX)
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, ValueError) as error:
        raise ListenError(
            f"cannot listen on {address}: it is not an address (host:port, [v6]:port, unix:/path)"
        ) from error
    family, _, _, _, where = found[0]
    return family, (str(where[0]), int(where[1]))


def bind_slot(addresses: Mapping[str, str]) -> tuple[Bound, ...]:
    """One ``SO_REUSEPORT`` socket for each TCP listener (name to address): a slot's own. Not listening yet."""
    bound = []
    for name, address in addresses.items():
        family, where = resolve(address)
        if family != socket.AF_UNIX:
            bound.append(Bound(name, _bind(address, family, where, reuse_port=True), shared=False))
    return tuple(bound)


def bind_shared(addresses: Mapping[str, str]) -> tuple[Bound, ...]:
    """One socket for each Unix listener (name to address). A stale socket file is replaced, anything else is not."""
    bound = []
    for name, address in addresses.items():
        family, where = resolve(address)
        if family == socket.AF_UNIX:
            bound.append(Bound(name, bind_unix(str(where)), shared=True))
    return tuple(bound)


def bind_alone(address: str) -> socket.socket:
    """One listening TCP or Unix socket, for a single process. Raises :class:`ListenError`."""
    family, where = resolve(address)
    if isinstance(where, str):
        return bind_unix(where)
    alone = _bind(address, family, where, reuse_port=False)
    alone.listen(BACKLOG)
    return alone


def ensure_free(addresses: Mapping[str, str]) -> None:
    """Raise :class:`ListenError` when somebody listens on a TCP address already.

    ``SO_REUSEPORT`` would let two services of one user share a port unnoticed, so this binds without it first.
    """
    for address in addresses.values():
        family, where = resolve(address)
        if family != socket.AF_UNIX:
            _bind(address, family, where, reuse_port=False).close()


def bind_unix(path: str, mode: int = 0o666) -> socket.socket:
    """A listening Unix socket with these permissions. Raises :class:`ListenError`."""
    end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(Path(path).lstat().st_mode):
                raise ListenError(f"cannot listen on unix:{path}: a file that is no socket is there, move it away")
            if _answers(path):
                raise OSError(errno.EADDRINUSE, "in use")
            Path(path).unlink()
        end.bind(path)
        Path(path).chmod(mode)
        end.listen(BACKLOG)
    except OSError as error:
        end.close()
        raise _sentence(f"unix:{path}", error) from error
    except ListenError:
        end.close()
        raise
    return end


def passed_sockets(environment: Mapping[str, str], pid: int, addresses: Mapping[str, str]) -> tuple[Bound, ...]:
    """The sockets that systemd passed (sd_listen_fds(3)), by listener.

    They belong to a listener when their name (FileDescriptorName=) or their address is its own. Raises
    :class:`ListenError` for one that belongs to none, and for one that is not a listening stream socket.
    """
    if environment.get("LISTEN_PID") != str(pid):
        return ()
    count = int(environment.get("LISTEN_FDS", "0"))
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    wanted = {resolve(address)[1]: name for name, address in addresses.items()}
    bound = []
    for i in range(count):
        descriptor = SD_LISTEN_FDS_START + i
        os.set_inheritable(descriptor, False)
        end = socket.socket(fileno=descriptor)
        where = end.getsockname()
        given = names[i] if i < len(names) else SD_NAME_UNKNOWN
        name = given if given in addresses else wanted.get(where[:2] if isinstance(where, tuple) else where)
        if name is None:
            known = ", ".join(addresses.values())
            raise ListenError(f"systemd passed a socket on {where}, which is no listener of the node file ({known})")
        if end.type != socket.SOCK_STREAM or not end.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise ListenError(f"systemd passed a socket for {name} that does not listen: use ListenStream=")
        end.setblocking(False)
        bound.append(Bound(name, end, shared=True, passed=True))
    return tuple(bound)


def stop_listening(sockets: Sequence[Bound]) -> None:
    """Refuse new connections from now on, in every process that holds these sockets but the service manager."""
    for bound in sockets:
        if not bound.passed:
            with contextlib.suppress(OSError):
                bound.socket.shutdown(socket.SHUT_RDWR)
            if bound.socket.family == socket.AF_UNIX:
                with contextlib.suppress(OSError):
                    Path(bound.socket.getsockname()).unlink()
        bound.socket.close()


def _bind(address: str, family: int, where: tuple[str, int] | str, *, reuse_port: bool) -> socket.socket:
    end = socket.socket(family, socket.SOCK_STREAM)
    try:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            end.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        end.bind(where)
    except OSError as error:
        end.close()
        raise _sentence(address, error) from error
    end.setblocking(False)
    return end


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
        except BlockingIOError:  # its backlog is full: somebody is there
            return True
    return True


def _sentence(address: str, error: OSError) -> ListenError:
    why = REMEDIES.get(error.errno or 0, (error.strerror or str(error)).lower())
    return ListenError(f"cannot listen on {address}: {why}")
