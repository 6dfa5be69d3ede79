"""TLS contexts from configuration, checked before anything is swapped, and the keys of session tickets.

The native core does the TLS and reads the files; here is what a context must be beyond loading. The contexts of a
revision are built while the old ones serve, and one that fails changes nothing. A context is never changed, but for its
ticket keys. What does not happen here: making certificates (:mod:`ascproxy.net.authority`), sockets.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ascproxy import _native
from ascproxy.errors import AscproxyError
from ascproxy.model.node import ClientAuth, ListenerTls, Node
from ascproxy.model.provider import UpstreamTls

HTTP1 = (b"http/1.1",)
HTTP2 = (b"h2", *HTTP1)
TICKET_KEY_BYTES = 80  # name 16, AES-256 key 32, HMAC-SHA-256 key 32
SEED_BYTES = 32


class CertificateError(AscproxyError):
    """A certificate, key or CA file cannot be used; the sentence names the file and says what to do."""


def listener_context(
    tls: ListenerTls, *, tickets: TicketKeys | None = None, alpn: tuple[bytes, ...] = HTTP1
) -> _native.TlsContext:
    """The context of a listener. With ``client_ca`` a client certificate is required, unless it says otherwise.
    ``tickets`` are used where the listener has no file of its own.

    Raises :class:`CertificateError` when a file cannot be read or decoded, a key is not the certificate's or is too
    weak, a chain is out of order, a certificate is expired, not yet valid, not for servers, or names no host, a
    revocation list is missing or has ended, or others can read the ticket keys.
    """
    asks = tls.asks_clients
    try:
        context = _native.TlsContext.server(
            certificate=tls.certificate,
            key=tls.key,
            more=tuple((each.certificate, each.key) for each in tls.certificates),
            client_ca=tls.client_ca if asks else None,
            client_crl=tls.client_crl if asks else None,
            client_required=tls.client_auth is ClientAuth.REQUIRED,
            client_depth=tls.client_depth,
            alpn=alpn,
            minimum=tls.min_version,
            ticket_keys=tls.ticket_keys,
        )
    except _native.TlsError as error:
        raise CertificateError(str(error)) from error
    if tickets is not None:
        use_tickets(context, tickets)
    return context


def use_tickets(context: _native.TlsContext, tickets: TicketKeys) -> None:
    """Replace the ticket keys of a listener's context, unless they come from a file."""
    if not context.ticket_keys_from_file:
        context.set_ticket_keys(tickets.ordered())


def trust_of(node: Node) -> str:
    """A digest of everything that decides which clients are let in: it changes with the content of CA files and
    revocation lists. A session that was begun before must not be resumed then, as nobody would look at the client's
    certificate. A file that cannot be read counts as another content."""
    digest = hashlib.sha256()
    for listener in node.listeners:
        tls = listener.tls
        if tls is None or not tls.asks_clients:
            continue
        digest.update(f"{listener.name}\0{tls.client_auth}\0{tls.client_depth}\0".encode())
        for path in (tls.client_ca, tls.client_crl):
            digest.update(_content(path))
    return digest.hexdigest()


def _content(path: str | None) -> bytes:
    try:
        return hashlib.sha256(Path(path).read_bytes()).digest() if path is not None else b"-"
    except OSError as error:
        return f"?{error.errno}".encode()


def upstream_context(tls: UpstreamTls, *, alpn: tuple[bytes, ...] = HTTP1) -> _native.TlsContext:
    """The context towards a provider. Host names and addresses are always verified.

    Raises :class:`CertificateError` for files that cannot be used, and for a certificate without its key.
    """
    if (tls.certificate is None) != (tls.key is None):
        lone = tls.certificate or tls.key
        missing = "key" if tls.key is None else "certificate"
        raise CertificateError(f"{lone} stands alone: name its {missing} too, or neither")
    try:
        return _native.TlsContext.client(ca=tls.ca, certificate=tls.certificate, key=tls.key, alpn=alpn)
    except _native.TlsError as error:
        raise CertificateError(str(error)) from error


def expires_unix(context: _native.TlsContext) -> int:
    """When the context's own certificate ends, in seconds since 1970. Raises ValueError when it has none."""
    info = context.certificate_info
    if info is None:
        raise ValueError("the context has no certificate of its own")
    return int(info["not_after_unix"])


@dataclass(frozen=True, slots=True)
class TicketKeys:
    """Keys that every worker of a node shares, 80 bytes each, never shown.

    ``next`` decrypts before anyone encrypts with it, and ``previous`` after: a worker that has not heard of a rotation
    yet and one that has resume each other's sessions.
    """

    current: bytes = field(repr=False)
    previous: bytes = field(repr=False)
    next: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if any(len(key) != TICKET_KEY_BYTES for key in (self.current, self.previous, self.next)):
            raise ValueError(f"a ticket key has {TICKET_KEY_BYTES} bytes")

    def ordered(self) -> tuple[bytes, bytes, bytes]:
        """As :meth:`TlsContext.set_ticket_keys` takes them: the first encrypts."""
        return self.current, self.next, self.previous

    def pack(self) -> bytes:
        """240 bytes for the mailbox: current, previous, next."""
        return self.current + self.previous + self.next

    @classmethod
    def unpack(cls, packed: bytes) -> TicketKeys:
        """What :meth:`pack` made. Raises ValueError for any other length."""
        if len(packed) != 3 * TICKET_KEY_BYTES:
            raise ValueError(f"ticket keys have {3 * TICKET_KEY_BYTES} bytes, not {len(packed)}")
        return cls(*(packed[at : at + TICKET_KEY_BYTES] for at in range(0, len(packed), TICKET_KEY_BYTES)))


def derive(seed: bytes) -> bytes:
    """A ticket key of 80 bytes from 32 random ones: HKDF-Expand of RFC 5869 2.3 with SHA-256.

    Raises ValueError for a seed of another length.
    """
    if len(seed) != SEED_BYTES:
        raise ValueError(f"a seed has {SEED_BYTES} random bytes, not {len(seed)}")
    block, key = b"", b""
    for n in range(1, 4):
        block = hmac.digest(seed, block + b"ascproxy session ticket key" + bytes([n]), "sha256")
        key += block
    return key[:TICKET_KEY_BYTES]


def fresh(random: Callable[[int], bytes]) -> TicketKeys:
    """Keys that know no earlier ticket: at the start, and at once when a client CA changes. ``random(n)``: n bytes."""
    return TicketKeys(derive(random(SEED_BYTES)), derive(random(SEED_BYTES)), derive(random(SEED_BYTES)))


def rotate(keys: TicketKeys, random: Callable[[int], bytes]) -> TicketKeys:
    """One step on: ``next`` encrypts now, ``current`` decrypts a while longer, ``previous`` is forgotten."""
    return TicketKeys(current=keys.next, previous=keys.current, next=derive(random(SEED_BYTES)))
