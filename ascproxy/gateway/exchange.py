"""The walk of one request: the table of contents of the product, its phases in reading order.

A worker has one :class:`Exchange`. The native core calls it for decisions and moves the bytes itself; a request that
finds a waiting connection makes two calls, ``on_request`` and ``on_settle``, and neither a task nor a timer.
"""

from __future__ import annotations

from asyncio import AbstractEventLoop, TimerHandle
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

import orjson

from ascproxy import _native, clock
from ascproxy.auth.authenticator import Authenticator
from ascproxy.gateway.dispatch import Dispatcher
from ascproxy.gateway.meter import NONE, Meter
from ascproxy.gateway.refusal import refuse, shown
from ascproxy.gateway.rewrite import Native
from ascproxy.gateway.router import Match, Refused
from ascproxy.gateway.runtime import Course, Runtime
from ascproxy.model.key import KeyRow, Principal
from ascproxy.model.snapshot import Snapshot
from ascproxy.telemetry.log import Log
from ascproxy.upstream.connection import Connector
from ascproxy.wire import anthropic, openai
from ascproxy.wire.operation import MODEL_PREFIX, Operation, Shape, at

if TYPE_CHECKING:
    from ascproxy._native import Core, Page, SecretArena, Stream

SWEEP_S = 1.0
MS = 1_000_000
ADMITTED_MAX = 16_384  # remembered by each worker; with more, it begins anew


class Admitted:
    """What phases 1 and 2 made of one ``stream.asks``. Holds for one key epoch and one revision."""

    __slots__ = ("course", "expires_ms", "log", "max_body")

    def __init__(self, principal: Principal, course: Course) -> None:
        self.expires_ms = principal.expires_ms
        self.log = principal.log
        self.course = course
        self.max_body = course.match.route.max_body


class Exchange:
    """Decides for every request of one worker (:class:`ascproxy._native.Walk`).

    ``page`` is the worker's; ``key_lookup`` and ``key_epoch`` read the store; ``environ`` is where ``env:`` and
    ``systemd:`` credentials are found. Call :meth:`bind`, then :meth:`adopt`, before the core listens.
    """

    def __init__(
        self,
        loop: AbstractEventLoop,
        *,
        page: Page,
        arena: SecretArena,
        key_lookup: Callable[[str], KeyRow | None],
        key_epoch: Callable[[], int],
        log: Log,
        environ: Mapping[str, str],
        monotonic_ns: Callable[[], int] = clock.monotonic_ns,
        wall_ns: Callable[[], int] = clock.wall_ns,
        native: Native = _native,
    ) -> None:
        self._loop = loop
        self._native = native
        self._arena = arena
        self._meter = Meter(page)
        self._log = log
        self._environ = environ
        self._monotonic_ns = monotonic_ns
        self._wall_ns = wall_ns
        self._key_epoch = key_epoch
        self._epoch = key_epoch()
        self._authenticate = Authenticator(key_lookup, key_epoch, wall_ns).authenticate
        self._admitted: dict[object, Admitted] = {}  # by stream.asks; of self._epoch and self._runtime
        self._runtime: Runtime
        self._dispatcher: Dispatcher
        self._sweeping: TimerHandle | None = None

    # ---- the revision in force -----------------------------------------------------------------------------------

    def bind(self, core: Core, connector: Connector | None = None) -> None:
        """Use ``core`` for connections (or ``connector`` in its place). Once."""
        if connector is None:
            connector = Connector(self._loop, core.connect)
        self._dispatcher = Dispatcher(
            self._loop, connector, meter=self._meter, log=self._log, monotonic_ns=self._monotonic_ns
        )

    def adopt(self, snapshot: Snapshot) -> None:
        """Put a revision in force: requests that begin from now on are decided by it. Raises :class:`AscproxyError`
        and keeps the old one when its credentials or certificates cannot be read."""
        before = getattr(self, "_runtime", None)
        self._runtime = runtime = Runtime(
            snapshot,
            native=self._native,
            arena=self._arena,
            environ=self._environ,
            meter=self._meter,
            before=before,
        )
        self._admitted.clear()
        if before is None:
            self._sweeping = self._loop.call_later(SWEEP_S, self._sweep)
        else:
            kept = set(map(id, runtime.pools))
            for pool in before.pools:
                if id(pool) not in kept:
                    pool.close()

    def _sweep(self) -> None:
        now_ns = self._monotonic_ns()
        for pool in self._runtime.pools:
            pool.sweep(now_ns)
        self._sweeping = self._loop.call_later(SWEEP_S, self._sweep)

    async def close(self) -> None:
        """Close the connections that wait. Those at work end with their exchanges."""
        if self._sweeping is not None:
            self._sweeping.cancel()
            self._sweeping = None
        for pool in self._runtime.pools:
            pool.close()

    # ---- the walk ------------------------------------------------------------------------------------------------

    def on_head(self, stream: Stream) -> None:
        """Before a body that is not here yet: may this caller send it? (LIMITS 1: more than 64 KiB only with a key.)"""
        runtime = self._runtime
        shape = self._shape(stream)
        if shape is None:
            return
        limits = runtime.limits.get(stream.listener.name, runtime.node_limits)
        if stream.two_credentials:
            refuse(stream, self._meter, "two_credentials")
            return
        principal = self._authenticate(stream)
        if principal is not None and principal.tenant in runtime.tenants:
            stream.body_limit = min(limits.max_body, runtime.max_body)
        elif 0 <= stream.content_length <= limits.max_unauthenticated_body:
            stream.body_limit = limits.max_unauthenticated_body
        else:
            stream.trip("max_unauthenticated_body")
            refuse(stream, self._meter, "invalid_api_key")

    def on_request(self, stream: Stream) -> None:
        """The request is whole: authenticate, route, dispatch. Who asks again for the same is admitted already."""
        if self._key_epoch() != self._epoch:
            self._admitted.clear()
            self._epoch = self._key_epoch()
        admitted = self._admitted.get(stream.asks)
        if admitted is None or (admitted.expires_ms is not None and self._wall_ns() >= admitted.expires_ms * MS):
            admitted = self._admit(stream)
            if admitted is None:
                return
        stream.log = admitted.log
        if stream.body_len > admitted.max_body:
            stream.trip("max_body")
            refuse(stream, self._meter, "body_too_large", detail=f"this model takes at most {admitted.max_body} bytes")
            return

        # 3 dispatch
        self._dispatcher.begin(stream, admitted.course)

    def _admit(self, stream: Stream) -> Admitted | None:
        """Phases 1 and 2, for a request that is to be dispatched; None when it is answered here. The outcome is
        remembered where ``stream.asks`` holds everything that led to it."""
        runtime = self._runtime
        shape = self._shape(stream)
        if shape is None:
            return None

        # 1 authenticate
        if stream.two_credentials:
            refuse(stream, self._meter, "two_credentials")
            return None
        principal = self._authenticate(stream)
        if principal is None or principal.tenant not in runtime.tenants:
            refuse(stream, self._meter, "invalid_api_key")
            return None
        stream.log = principal.log
        if not shape.served_by:
            self._list_models(stream, runtime, principal)
            return None

        # 2 route
        match = self._route(stream, runtime, principal, shape)
        if match is None:
            return None
        course = runtime.course(match, stream.listener, stream.query)
        admitted = Admitted(principal, course)
        asks = stream.asks
        if asks is not None:
            if len(self._admitted) >= ADMITTED_MAX:
                self._admitted.clear()
            self._admitted[asks] = admitted
        return admitted

    def on_reject(self, stream: Stream) -> None:
        """The core cannot serve this."""
        code = stream.reject
        detail = ""
        if code == "body_too_large":
            detail = f"at most {stream.body_limit} bytes are accepted here"
        elif code == "invalid_request":
            detail = "it is not valid HTTP/1.1"
        refuse(stream, self._meter, code, detail=detail)

    def on_response(self, stream: Stream) -> None:
        """An attempt failed before anything was sent to the client: again, elsewhere, or an error."""
        self._dispatcher.failed(stream)

    def on_settle(self, stream: Stream) -> None:
        """The exchange is over."""
        # 4 settle
        if stream.context is not None:
            self._dispatcher.settle(stream)

    # ---- route ---------------------------------------------------------------------------------------------------

    def _shape(self, stream: Stream) -> Shape | None:
        """The operation that is asked for, or None after a refusal."""
        path, method = stream.path, stream.method
        shape = at(path) if path is not None else None
        if shape is None:
            refuse(stream, self._meter, "unknown_path")
        elif method not in shape.methods:
            refuse(stream, self._meter, "method_not_allowed", headers=b"allow: %b\r\n" % b", ".join(shape.methods))
        else:
            return shape
        return None

    def _route(self, stream: Stream, runtime: Runtime, principal: Principal, shape: Shape) -> Match | None:
        """Where the request goes, or None after a refusal."""
        if stream.scan_error or stream.body_len == 0:
            self._refuse_body(stream)
            return None
        query = stream.query
        if query and query not in shape.queries:
            refuse(stream, self._meter, "invalid_request", detail="the query string is not one that this operation has")
            return None
        model = stream.model if stream.model is not None else stream.header("x-ascproxy-model")
        match = (
            runtime.router.route(principal, shape.operation, model)
            if model is not None
            else runtime.router.only(principal, shape.operation)
        )
        if match is None:
            detail = "it names no model: put it into the body or into the header x-ascproxy-model"
            refuse(stream, self._meter, "invalid_request", detail=detail)
        elif isinstance(match, Refused):
            self._refuse_route(stream, match, shape)
        else:
            return match
        return None

    def _refuse_body(self, stream: Stream) -> None:
        coding = stream.header("content-encoding")
        if coding is not None and coding.lower() != b"identity":
            refuse(stream, self._meter, "invalid_request", detail="its body has a content-encoding: send it without")
        elif stream.body_len == 0:
            refuse(stream, self._meter, "invalid_json", detail="it is empty")
        else:
            if stream.scan_limit:
                stream.trip(stream.scan_limit)
            refuse(stream, self._meter, stream.scan_code, detail=stream.scan_error)

    def _refuse_route(self, stream: Stream, refused: Refused, shape: Shape) -> None:
        model = stream.model if stream.model is not None else stream.header("x-ascproxy-model")
        name = shown(model) if model is not None else "of this key"
        if refused.code == "model_not_allowed":
            name = f"{name} for {shape.operation}" if model is not None else shape.operation
        refuse(stream, self._meter, refused.code, detail=name)

    def _list_models(self, stream: Stream, runtime: Runtime, principal: Principal) -> None:
        """``GET /v1/models`` and ``/v1/models/{id}``: what this caller may use, under public names. Its query (paging)
        is not looked at: there is always one page."""
        shape = anthropic if stream.header("anthropic-version") is not None else openai
        path = stream.path or b""
        if principal.operations and Operation.MODELS not in principal.operations:
            refuse(stream, self._meter, "model_not_allowed", detail="the list of models")
            return
        if path.startswith(MODEL_PREFIX):
            asked = unquote_to_bytes(path[len(MODEL_PREFIX) :])  # names with a slash come as %2F
            found = runtime.router.model(principal, asked)
            if isinstance(found, Refused):
                refuse(stream, self._meter, found.code, detail=shown(asked))
                return
            body = orjson.dumps(shape.model(found))
        else:
            body = orjson.dumps(shape.model_list(runtime.router.models(principal)))
        block = self._meter.block(stream.listener.name, NONE, NONE, Operation.MODELS)
        stream.respond(200, b"content-type: application/json\r\n", body, block=block)
