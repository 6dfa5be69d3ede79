"""The contract between the native core and Python (DESIGN 5); why it differs from its first draft is in
docs/decisions/0002-native-contract.md.

One :class:`Core` per worker, used from its event-loop thread only. Bytes move natively; Python is called for decisions:
at most ``on_request`` and ``on_settle`` for a request that succeeds, never per chunk.
"""

from asyncio import AbstractEventLoop, Task
from collections.abc import Callable
from typing import Any, Protocol, final

# How answers are scanned (Plan.scan): what counts as usage, error, content and end.
SCAN_NONE: int
SCAN_OPENAI: int
SCAN_MESSAGES: int
SCAN_RESPONSES: int
SCAN_TGI: int

@final
class Names:
    """A set of header names: exact lower-case names, or patterns with one ``*`` (``x-ratelimit-*``, ``x-*-time``)."""

    def __init__(self, names: tuple[str, ...]) -> None: ...
    def __contains__(self, name: str) -> bool: ...

@final
class Plan:
    """How to ask one endpoint for one operation: everything of a forward that is the same for each request. Immutable.

    ``head``: request line and static fields, each line ended by CRLF, without the empty line
    (``b"POST /v1/chat/completions HTTP/1.1\\r\\nhost: h\\r\\naccept-encoding: identity\\r\\n"``).
    ``secret``: appended as ``secret_prefix + secret`` (``b"authorization: Bearer "``), after every other field.
    ``request_headers`` / ``response_headers``: allow-lists of what passes from the client and back; framing, host,
    connection and x-request-id fields are always written by the core.
    ``model``: replaces the value of the body's ``model`` member (plain text; escaped here), None leaves it.
    ``block``: first cell of the meter block on the page. ``log``: JSON members of the access line that belong to this
    plan, without braces or outer commas (``b'"route":"chat","provider":"rack-a"'``).
    Deadlines are milliseconds; 0 means none.
    ``ask``: members of ``stream_options`` that are set for a stream whose caller did not ask for usage
    (``b'"include_usage":true'``); with ``strip``, what comes of it is not shown to the caller. ``endings``: by outcome
    (``"upstream_timeout"``, ``"truncated"``, ``"upstream_aborted"``, ``"draining"``) the whole event that ends a stream
    which breaks off after content; a NUL in it stands for the number of the event. Without one the framing is broken.
    """

    def __init__(
        self,
        *,
        endpoint: int,
        head: bytes,
        request_headers: Names,
        response_headers: Names,
        secret: Secret | None = None,
        secret_prefix: bytes = b"",
        model: str | None = None,
        scan: int = 0,
        first_byte_ms: int = 300_000,
        idle_ms: int = 120_000,
        total_ms: int = 3_600_000,
        block: int = 0,
        log: bytes = b"",
        ask: bytes | None = None,
        strip: bool = False,
        endings: dict[str, bytes] = ...,
    ) -> None: ...
    @property
    def endpoint(self) -> int: ...

@final
class Listener:
    """A listening address: its name, its TLS context (one reference, read per new connection) and its limits.

    ``limits`` are the attributes of :class:`ascproxy.model.node.Limits` by name. ``proxy_protocol``: each connection
    has to be of ``trusted_peers`` (of the core) or of a Unix socket, and begins with a PROXY v2 header. ``http2``:
    whether a plaintext connection may begin with the preface of HTTP/2; over TLS the context's ALPN decides.
    """

    def __init__(
        self,
        *,
        name: str,
        tls: TlsContext | None,
        limits: dict[str, int],
        proxy_protocol: bool = False,
        http2: bool = True,
    ) -> None: ...
    tls: TlsContext | None
    http2: bool
    def take_refused(self) -> tuple[int, str, str] | None:
        """How many connections ``proxy_protocol`` closed since the last call, why the last one was and from where."""

    @property
    def name(self) -> str: ...

@final
class ClientCertificate(tuple[Any, ...]):
    """Who a client is by its certificate, which a CA of the listener has signed. The same object for all requests of a
    connection. ``names`` are those of the subjectAltName, each behind its kind: ``DNS:``, ``IP:``, ``URI:`` or
    ``email:``.
    """

    @property
    def subject(self) -> str: ...  # RFC 2253
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def fingerprint_sha256(self) -> str: ...  # of the DER, hexadecimal
    @property
    def not_after_unix(self) -> int: ...

@final
class Stream:
    """One exchange, from its head to its settlement.

    Attributes about the request are fixed once ``on_request`` is called.

    ``reject``: why the core asks for a refusal in ``on_reject`` (a public error code of SEMANTICS 5).
    ``failure``: in ``on_response``: ``""`` (the upstream answered with ``upstream_status`` 401, 403, 429 or >= 500),
    ``"closed"`` (before any response byte), ``"reset"``, ``"timeout"``, ``"malformed"``, ``"truncated"``,
    ``"error_event"`` (a stream began with an error and without content: it may be relayed).
    ``outcome``, in ``on_settle``: ``"complete"``, ``"refused"`` (we answered), ``"client_gone"``,
    ``"upstream_failed"``, ``"upstream_timeout"``, ``"truncated"``, ``"write_stall"``, ``"upstream_aborted"``,
    ``"draining"``.
    """

    # the request
    method: bytes | None  # None when the head could not be parsed
    path: bytes | None
    query: bytes
    listener: Listener
    peer: str  # the caller: who is connected, or whom that speaks for (PROXY header, X-Forwarded-For of a trusted peer)
    request_id: bytes  # the client's when acceptable (SEMANTICS 5), else 32 hex digits
    credential: bytes | None  # of Authorization: Bearer, x-api-key
    credential_digest: bytes | None  # its SHA-256, 32 bytes
    two_credentials: bool
    client_cert: ClientCertificate | None  # who the client is by its certificate, where the listener asks for one
    content_length: int  # -1 unknown (chunked), 0 none
    body_len: int
    scan_error: str  # "" or a sentence; scan_code "invalid_json" | "duplicate_field" | "invalid_request"
    scan_code: str
    scan_limit: str  # the limit that the body's JSON is over (of LIMIT_NAMES), or ""
    model: bytes | None
    stream: bool
    max_tokens: int  # -1 absent
    # (listener, method, path, query, credential_digest, model): who asks for what, as one key. None when there is
    # something to look into first: no credential or two, no body or one with an error, no model.
    asks: tuple[Listener, bytes, bytes, bytes, bytes, bytes] | None
    reject: str
    body_limit: int  # writable in on_head: bytes of body that may be collected
    # the answer
    failure: str
    upstream_status: int
    upstream_header: Callable[[str], bytes | None]
    reused: bool  # the upstream connection had served before
    attempts: int  # forwards so far
    status: int  # sent to the client, 0 none, 499 client gone
    committed: bool  # a content byte or an answer head is on its way to the client
    outcome: str
    usage_in: int
    usage_out: int
    usage_source: str  # "none", "reported", "partial" (of a stream cut short), "counted" (one an event)
    finish: str
    bytes_in: int
    bytes_out: int
    upstream: Upstream | None
    # the walk's own
    context: Any
    log: bytes  # JSON members of the access line, set by the walk (the principal's fragment)
    code: str  # public error code, set by respond
    task: Task[None] | None
    done: bool  # settled, or the client is gone: a task must stop

    def header(self, name: str) -> bytes | None:
        """The value of the first field of that lower-case name. Raises ValueError after the head was dropped."""

    def body(self) -> bytes:
        """A copy of the collected body."""

    def forward(self, upstream: Upstream, plan: Plan) -> None:
        """Send the request over a ready upstream. May be called again from ``on_response`` or from a task."""

    def relay(self) -> None:
        """In ``on_response`` with ``failure`` ``""`` or ``"error_event"``: pass the upstream's answer on as it is."""

    def respond(
        self, status: int, headers: bytes, body: bytes, *, code: str = "", close: bool = False, block: int = 0
    ) -> None:
        """Answer ourselves. ``headers``: complete lines ended by CRLF; framing, date and x-request-id are added.

        ``block`` counts the answer in that meter block. Raises RuntimeError once the answer is committed.
        """

    def abort(self, outcome: str) -> None:
        """Cut both connections; the client sees broken framing."""

    def trip(self, limit: str) -> None:
        """Count that a limit of LIMIT_NAMES tripped, and name it in the access line. Raises ValueError for another
        name. For limits that only the walk knows: the core counts its own."""

@final
class Upstream:
    """One connection to an endpoint; also its own asyncio protocol. Owned by a pool while idle."""

    endpoint: int
    ready: bool
    reusable: bool
    served: int
    idle_since_ns: int
    pool: Any

    def usable(self, now_ns: int, idle_ms: int) -> bool:
        """Alive, idle, and idle for less than ``idle_ms``."""

    def close(self) -> None: ...

class Walk(Protocol):
    """What a worker hands to its Core: synchronous methods, never called per chunk.

    Each of the first four must end in exactly one of ``forward``, ``relay``, ``respond``, ``abort``, or leave a task in
    ``stream.task`` that will. ``on_head`` may also just return. An exception is logged and answered with 500.
    """

    def on_head(self, stream: Stream, /) -> None:
        """The head is here but its body is not: check credential, operation and size; return to let the body come."""

    def on_request(self, stream: Stream, /) -> None:
        """The request is complete and scanned."""

    def on_reject(self, stream: Stream, /) -> None:
        """The core cannot serve this (``stream.reject``): respond. The connection closes afterwards."""

    def on_response(self, stream: Stream, /) -> None:
        """The upstream failed before anything was committed: forward elsewhere, relay, or respond."""

    def on_settle(self, stream: Stream, /) -> None:
        """Exactly once, last. The upstream, if ``stream.upstream`` is reusable, goes back to its pool."""

@final
class Core:
    """The data path of one worker. ``limits`` as for Listener (upstream heads and node-wide bounds). ``trusted_peers``:
    networks that are exempt from the caps per address and may speak for others, as 16 bytes (IPv4: ``::ffff:a.b.c.d``)
    and a number of bits."""

    def __init__(
        self, *, walk: Walk, page: Page, limits: dict[str, int], trusted_peers: tuple[tuple[bytes, int], ...] = ()
    ) -> None: ...
    def attach(self, loop: AbstractEventLoop) -> None:
        """Turn with this event loop, which must be uvloop's, from now on. Raises RuntimeError for another."""

    def detach(self) -> None:
        """Cut every connection, accept no more, and leave the loop: to be called before the loop is closed."""

    def listen(self, listener: Listener, descriptor: int) -> Acceptor:
        """Accept connections on a copy of this listening socket's descriptor."""

    def connect(
        self,
        descriptor: int,
        endpoint: int,
        tls: TlsContext | None,
        server_name: str,
        ready: Callable[[Upstream, str], None],
    ) -> Upstream:
        """Take over a connected socket. ``ready(upstream, "")`` is called once it can carry a request, TLS included,
        perhaps before this returns; ``ready(upstream, reason)`` when it failed before that. Raises OSError, and then
        the descriptor is still the caller's."""

    def tick(self, now_ns: int) -> None:
        """Every 100 ms: all deadlines, heartbeat and gauges. ``now_ns`` is monotonic."""

    def drain(self, unary_ns: int, stream_ns: int, idle_ns: int = 0) -> None:
        """Answer every request with ``Connection: close`` from now on; cut unary exchanges and streams that are still
        there at these monotonic times. Idle connections are closed after ``idle_ns`` (a duration), by default at once:
        a client that is just about to send its next request on one would find it reset."""

    def take_log(self) -> bytes:
        """The access lines since the last call, newline-terminated JSON; at most 1 MiB is kept."""

    @property
    def in_flight(self) -> int: ...
    @property
    def connections(self) -> int: ...
    @property
    def body_bytes(self) -> int: ...
    @property
    def calls(self) -> int:
        """Python calls made for walks so far: tests assert on it (PERFORMANCE)."""

    access_log: bool
    overload: int  # the step of supervisor/memory.py, 0 to 3; read by the core at every head

@final
class Acceptor:
    def close(self) -> None: ...

@final
class Page:
    """A slot's metric page over a writable or read-only buffer (an ``mmap``). Layout in native/page.h."""

    def __init__(self, buffer: Any) -> None: ...
    def series(self, key: bytes, cells: int) -> int: ...
    def add(self, cell: int, n: int) -> None: ...
    def store(self, cell: int, value: int) -> None: ...
    def load(self, cell: int) -> int: ...
    def records(self) -> list[tuple[bytes, int, int]]:
        """``(key, first cell, cells)`` of every series."""

    CELLS: dict[str, int]  # names of the header cells: "pid" -> number

LIMIT_NAMES: tuple[str, ...]  # every limit that can trip (native/limit.h)
METER_STATUSES: tuple[int, ...]
METER_CELLS: int
METER_N_BUCKETS: int
METER_BOUNDS_GATEWAY: tuple[int, ...]
METER_BOUNDS_LATENCY: tuple[int, ...]
# "status", "tokens_in", "tokens_out", the histograms "gateway", "first_token", "between_tokens", "request", and "sums"
METER_OFFSETS: dict[str, int]

class TlsError(Exception):
    """Certificates, keys or CA files that cannot be used: a sentence that names the file and says what to do."""

@final
class TlsContext:
    """An OpenSSL context, never changed once made but for its ticket keys. Paths are PEM files."""

    @staticmethod
    def server(
        *,
        certificate: str,
        key: str,
        more: tuple[tuple[str, str], ...] = (),
        client_ca: str | None = None,
        client_crl: str | None = None,
        client_required: bool = True,
        client_depth: int = 0,
        alpn: tuple[bytes, ...] = (b"http/1.1",),
        minimum: str = "1.2",
        ticket_keys: str | None = None,
    ) -> TlsContext:
        """``certificate``: the server's own first, then its issuers. ``more``: further certificates with their keys,
        for clients that name one of their hosts, or take another kind of key; at most 15. ``client_depth``:
        certificates above a client's own, its root included (0: nine). ``alpn``: in order of preference; a client that
        offers others only is refused (alert 120), none at all: ALPN is ignored. ``minimum``: "1.2" or "1.3".
        ``ticket_keys``: a file of 64 hexadecimal digits a line, the first encrypts. Raises TlsError."""

    @staticmethod
    def client(
        *,
        ca: str | None = None,
        certificate: str | None = None,
        key: str | None = None,
        alpn: tuple[bytes, ...] = (b"http/1.1",),
    ) -> TlsContext:
        """``ca`` None: the system's store. Raises TlsError."""

    def set_ticket_keys(self, keys: tuple[bytes, ...]) -> None:
        """Of a server: at most 8 keys of 80 bytes (name 16, AES-256 32, HMAC-SHA-256 32). The first encrypts, all
        decrypt; a ticket of another than the first is renewed. Without keys there are no tickets and no resumption.
        Raises ValueError where the keys come from a file."""

    @property
    def ticket_keys_from_file(self) -> bool: ...
    @property
    def file_dates(self) -> tuple[tuple[str, str, int, int], ...]:
        """``(kind, path, since_unix, until_unix)`` of each file of a server: kind is ``server``, ``client_ca`` or
        ``client_crl``; of several certificates or lists in a file, the one that ends first."""

    @property
    def certificate_info(self) -> dict[str, Any] | None:
        """``subject`` (RFC 2253), ``names`` (tuple of DNS names and IP addresses), ``not_before_unix``,
        ``not_after_unix``, ``fingerprint_sha256`` (hex) of the context's own certificate; None without one."""

class SecretError(Exception):
    """A credential that cannot be used: a sentence that names the file and says what to do, never the value."""

@final
class Secret:
    """A value in the arena. Python cannot read, copy or pickle it; it is wiped when the last reference goes."""

@final
class SecretArena:
    """Locked, undumpable memory for credentials (DESIGN D14). Make it after fork: a child sees zeroes, not secrets."""

    def __init__(self, size: int = 65_536) -> None: ...
    def load(self, path: str) -> Secret:
        """Read a regular file of 1 to 16384 visible ASCII characters, a last line end aside. Raises SecretError."""

    def put(self, value: bytearray) -> Secret:
        """Move a value here, under the same rule, and wipe the bytearray, refused or not. Raises SecretError."""

    @property
    def locked(self) -> bool:
        """Whether the memory cannot be swapped out (RLIMIT_MEMLOCK)."""

    @property
    def used(self) -> int:
        """Bytes in use, rounded up to 16 for each value."""
