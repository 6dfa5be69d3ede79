"""What a worker makes of one snapshot: router, credentials, pools and plans.

Frozen in meaning: everything that decides is fixed when it is made, and plans and courses are only remembered once they
were needed. A request keeps the runtime that it began with through its :class:`Course`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ascproxy.errors import AscproxyError
from ascproxy.gateway import rewrite
from ascproxy.gateway.meter import Meter
from ascproxy.gateway.rewrite import Native
from ascproxy.gateway.router import Match, Router
from ascproxy.model.node import Limits
from ascproxy.model.provider import Endpoint, Provider, UpstreamTls
from ascproxy.model.snapshot import Snapshot
from ascproxy.upstream.connection import Address
from ascproxy.upstream.pool import Pool

if TYPE_CHECKING:
    from ascproxy._native import Listener, Names, Plan, Secret, SecretArena, TlsContext

PoolKey = tuple[str, int, int]  # host, port, pool_idle_ms


class Leg:
    """One endpoint of the target ``index`` of a course: all that asking it takes. It does not know its course: a cycle
    would keep the secrets of a revision that is gone until the collector comes by."""

    __slots__ = ("address", "block", "index", "plan", "pool", "provider")

    def __init__(
        self,
        *,
        index: int,
        plan: Plan,
        block: int,
        pool: Pool,
        address: Address,
        provider: str,
    ) -> None:
        self.index = index
        self.plan = plan
        self.block = block
        self.pool = pool
        self.address = address
        self.provider = provider


class Course:
    """The targets of a route for one operation, as one listener's callers reach them, in order. ``only``: the leg of a
    first target that has one endpoint.

    ``turn`` moves on with each choice among several endpoints; it is the only thing here that changes.
    """

    __slots__ = ("match", "only", "targets", "total_ms", "turn")

    def __init__(self, match: Match) -> None:
        self.match = match
        self.targets: tuple[tuple[Leg, ...], ...] = ()
        self.only: Leg | None = None
        self.turn = 0
        total_ms = match.route.total_ms
        self.total_ms = max(p.timeouts.total_ms for _, p in match.targets) if total_ms is None else total_ms


class Runtime:
    """Made once per revision and worker. Raises :class:`AscproxyError` with one sentence per line for what is wrong.

    ``before`` is the runtime in force: pools of plaintext endpoints go on, so that a reload costs no connection. Those
    of TLS endpoints do not: files may have changed behind the same names (LIMITS 5, TLS reload).
    """

    __slots__ = (
        "_addresses",
        "_contexts",
        "_meter",
        "_names",
        "_native",
        "_plaintext",
        "_response_names",
        "_secrets",
        "courses",
        "limits",
        "max_body",
        "node_limits",
        "pools",
        "revision",
        "router",
        "tenants",
    )

    def __init__(
        self,
        snapshot: Snapshot,
        *,
        native: Native,
        arena: SecretArena,
        environ: Mapping[str, str],
        meter: Meter,
        before: Runtime | None,
    ) -> None:
        self._native = native
        self._meter = meter
        self.revision = snapshot.revision
        self.tenants = frozenset(tenant.name for tenant in snapshot.tenants)  # keys of others are no good
        self.router = Router(snapshot)
        self.limits: dict[str, Limits] = {listener.name: listener.limits for listener in snapshot.node.listeners}
        self.node_limits = snapshot.node.limits  # of a listener that this revision does not have any more
        self.max_body = max((route.max_body for route in snapshot.routes), default=0)
        self.courses: dict[tuple[Match, Listener, bytes], Course] = {}
        self._response_names = native.Names(rewrite.RESPONSE_HEADERS)
        self._secrets: dict[str, Secret] = {}
        self._names: dict[str, Names] = {}
        self._contexts: dict[UpstreamTls, TlsContext] = {}
        self._addresses: dict[int, tuple[Pool, Address]] = {}
        self.pools: list[Pool] = []
        self._plaintext: dict[PoolKey, Pool] = {}
        wrong: list[str] = []
        used = {provider.credential for provider in snapshot.providers}
        for credential in snapshot.credentials:
            if credential.name in used:
                try:
                    self._secrets[credential.name] = rewrite.secret_of(credential, arena, environ)
                except AscproxyError as error:
                    wrong.append(str(error))
        for provider in snapshot.providers:
            try:
                self._names[provider.name] = rewrite.request_names(native, provider)
                self._admit(provider, self._tls(provider), before)
            except AscproxyError as error:
                wrong.append(str(error))
        if wrong:
            raise AscproxyError("\n".join(wrong))

    def course(self, match: Match, listener: Listener, query: bytes) -> Course:
        """The course of ``match``, made at first use. ``query`` is one that the operation passes on, or empty."""
        course = self.courses.get((match, listener, query))
        if course is None:
            course = Course(match)
            targets = []
            for index, (target, provider) in enumerate(match.targets):
                block = self._meter.block(listener.name, match.route.name, provider.name, match.shape.operation)
                legs = []
                for endpoint in provider.endpoints:
                    plan = rewrite.plan(
                        self._native,
                        match,
                        target,
                        provider,
                        endpoint,
                        query=query,
                        names=(self._names[provider.name], self._response_names),
                        secret=self._secrets[provider.credential] if provider.credential is not None else None,
                        block=block,
                    )
                    pool, address = self._addresses[endpoint.id]
                    legs.append(
                        Leg(
                            index=index,
                            plan=plan,
                            block=block,
                            pool=pool,
                            address=address,
                            provider=provider.name,
                        )
                    )
                targets.append(tuple(legs))
            course.targets = tuple(targets)
            course.only = targets[0][0] if len(targets[0]) == 1 else None
            self.courses[match, listener, query] = course
        return course

    def _admit(self, provider: Provider, tls: TlsContext | None, before: Runtime | None) -> None:
        for endpoint in provider.endpoints:
            secure = endpoint.scheme == "https"
            self._addresses[endpoint.id] = (
                self._pool(provider, endpoint, before),
                Address(
                    endpoint=endpoint.id,
                    host=endpoint.host,
                    port=endpoint.port,
                    tls=tls if secure else None,
                    server_name=endpoint.host,
                    connect_ms=provider.timeouts.connect_ms,
                    tls_ms=provider.timeouts.tls_ms,
                ),
            )

    def _tls(self, provider: Provider) -> TlsContext | None:
        """Providers with the same files share a context: reading the system's authorities takes 30 ms."""
        if all(endpoint.scheme == "http" for endpoint in provider.endpoints):
            return None
        tls = provider.tls
        context = self._contexts.get(tls)
        if context is None:
            try:
                context = self._native.TlsContext.client(ca=tls.ca, certificate=tls.certificate, key=tls.key)
            except (self._native.TlsError, OSError) as error:
                raise AscproxyError(f"provider {provider.name}: tls: {error}") from error
            self._contexts[tls] = context
        return context

    def _pool(self, provider: Provider, endpoint: Endpoint, before: Runtime | None) -> Pool:
        if endpoint.scheme == "https":
            pool = Pool(provider.pool_idle_ms)
            self.pools.append(pool)
            return pool
        key = (endpoint.host, endpoint.port, provider.pool_idle_ms)
        kept = self._plaintext.get(key)
        if kept is None:
            kept = before._plaintext.get(key) if before is not None else None
            kept = self._plaintext[key] = kept if kept is not None else Pool(provider.pool_idle_ms)
            self.pools.append(kept)
        return kept
