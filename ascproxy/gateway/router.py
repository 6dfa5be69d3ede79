"""Where a request goes: (tenant, operation, model) to a route and its targets, compiled once per snapshot.

Theory. Routes that a tenant may see and that do not exclude the operation are candidates. Among them an exact name wins
over every glob, and among globs the longest literal prefix, then the most literal characters, then the order of the
configuration; for one and the same name or glob, a route that names the tenant wins over one for all. The candidate
found decides alone: where none of *its* targets is of a type that serves the operation, the answer is
``operation_not_supported``, and the request does not go to a less specific route, whose provider was never meant to see
that model's traffic.

Looking up costs the same however many routes there are: one dictionary for exact names, and one look-up per distinct
length of the globs' literal prefixes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from ascproxy.model.key import Principal
from ascproxy.model.provider import Provider
from ascproxy.model.route import Route, Target
from ascproxy.model.snapshot import Snapshot
from ascproxy.wire.operation import OPERATIONS, Operation, Shape

T = TypeVar("T")

SCOPES_MAX = 4_096  # distinct scopes of keys that are kept compiled


@dataclass(frozen=True, slots=True)
class Refused:
    """A decision against the caller: a code of the catalogue."""

    code: str


@dataclass(frozen=True, slots=True, eq=False)
class Match:
    """A route for one operation. ``targets`` are those whose provider type serves it, in order; never empty.

    Identity is meaning: there is one Match per route and operation of a snapshot, and others key on it.
    """

    route: Route
    shape: Shape
    targets: tuple[tuple[Target, Provider], ...]


NOT_FOUND = Refused("model_not_found")
NOT_SUPPORTED = Refused("operation_not_supported")
NOT_ALLOWED = Refused("model_not_allowed")


def is_glob(pattern: str) -> bool:
    """Whether a model of a route or scope is a glob: ``*`` is any run of characters, ``?`` exactly one."""
    return "*" in pattern or "?" in pattern


def glob_regex(pattern: str) -> re.Pattern[str]:
    """The expression of a glob. Each ``*`` matches lazily in an atomic group, up to the first place where the literal
    behind it fits, which is always good enough for globs: so a model name cannot make matching slow."""
    first, *rest = ["".join("." if c == "?" else re.escape(c) for c in part) for part in pattern.split("*")]
    if not rest:
        return re.compile(first, re.DOTALL)
    *middle, last = rest
    return re.compile(first + "".join(f"(?>.*?{part})" for part in middle if part) + f".*{last}", re.DOTALL)


class Glob:
    """A pattern whose expression is made when it is first asked: a revision may have thousands."""

    __slots__ = ("_pattern", "_regex")

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._regex: re.Pattern[str] | None = None

    def matches(self, name: str) -> bool:
        if self._regex is None:
            self._regex = glob_regex(self._pattern)
        return self._regex.fullmatch(name) is not None


def specificity(pattern: str) -> tuple[int, int]:
    """Sorts globs, the most specific first: length of the literal prefix, then number of literal characters."""
    return -len(_prefix(pattern)), -sum(c not in "*?" for c in pattern)


def _prefix(pattern: str) -> str:
    return pattern[: next((i for i, c in enumerate(pattern) if c in "*?"), len(pattern))]


@dataclass(slots=True)
class Node(Generic[T]):
    """What one name or glob stands for: for everybody, and for tenants that have a route of their own for it."""

    shared: T | None = None
    own: dict[str, T] | None = None

    def add(self, tenants: tuple[str, ...], value: T) -> None:
        """The first of the configuration stays."""
        if not tenants and self.shared is None:
            self.shared = value
        for tenant in tenants:
            if self.own is None:
                self.own = {}
            self.own.setdefault(tenant, value)


class Table(Generic[T]):
    """From (model, tenant) to values: exact names first, then globs, as the module says. Filled once, then only read.

    Takes ``(pattern, tenants, value)``; no tenants means all. For the same pattern a tenant's own entry wins.
    """

    __slots__ = ("_exact", "_globs", "_lengths")

    def __init__(self, entries: Iterable[tuple[str, tuple[str, ...], T]]) -> None:
        self._exact: dict[bytes, Node[T]] = {}
        globs: dict[str, Node[T]] = {}
        for pattern, tenants, value in entries:
            if is_glob(pattern):
                globs.setdefault(pattern, Node()).add(tenants, value)
            else:
                self._exact.setdefault(pattern.encode(), Node()).add(tenants, value)
        self._globs: dict[str, list[tuple[Glob, Node[T]]]] = {}  # by literal prefix, most specific first
        for pattern in sorted(globs, key=specificity):
            self._globs.setdefault(_prefix(pattern), []).append((Glob(pattern), globs[pattern]))
        self._lengths = sorted({len(prefix) for prefix in self._globs}, reverse=True)

    def find(self, model: bytes, tenant: str) -> T | None:
        """The value for ``model``, None where ``tenant`` has none."""
        node = self._exact.get(model)
        if node is not None:
            value = node.shared if node.own is None else node.own.get(tenant, node.shared)
            if value is not None:
                return value
        return self._find_glob(model, tenant) if self._lengths else None

    def _find_glob(self, model: bytes, tenant: str) -> T | None:
        name = model.decode("utf-8", "surrogateescape")
        for length in self._lengths:
            if length > len(name):
                continue
            for glob, node in self._globs.get(name[:length], ()):
                value = node.shared if node.own is None else node.own.get(tenant, node.shared)
                if value is not None and glob.matches(name):
                    return value
        return None


class Router:
    """The routes of one snapshot. The table of an operation is made when the first request for it comes, so that a
    reload of many routes keeps nobody waiting; besides, only a bounded memory of compiled scopes changes."""

    __slots__ = ("_anywhere", "_providers", "_routes", "_scopes", "_tables")

    def __init__(self, snapshot: Snapshot) -> None:
        self._providers = {provider.name: provider for provider in snapshot.providers}
        self._routes = snapshot.routes
        self._tables: dict[Operation, tuple[list[Match], Table[Match | Refused]]] = {}
        self._anywhere = Table((model, r.tenants, True) for r in snapshot.routes for model in r.models)
        self._scopes: dict[tuple[str, ...], Table[bool]] = {}

    def _of(self, operation: Operation) -> tuple[list[Match], Table[Match | Refused]]:
        """The matches of an operation, in the order of the configuration, and its table."""
        made = self._tables.get(operation)
        if made is None:
            shape = OPERATIONS[operation]
            candidates = [r for r in self._routes if not r.operations or operation in r.operations]
            found = {r.name: _match(r, shape, self._providers) for r in candidates}
            matches = [match for match in found.values() if isinstance(match, Match)]
            table = Table((m, r.tenants, found[r.name]) for r in candidates for m in r.models)
            made = self._tables[operation] = (matches, table)
        return made

    def route(self, principal: Principal, operation: Operation, model: bytes) -> Match | Refused:
        """Where ``principal`` is to be served. The scope is asked first, so that a key learns nothing about models
        outside of it."""
        if principal.models and not self._in_scope(principal, model):
            return NOT_ALLOWED
        if principal.operations and operation not in principal.operations:
            return NOT_ALLOWED
        found = self._of(operation)[1].find(model, principal.tenant)
        if found is None:
            return NOT_SUPPORTED if self._anywhere.find(model, principal.tenant) else NOT_FOUND
        return found

    def only(self, principal: Principal, operation: Operation) -> Match | Refused | None:
        """Where to send a request that names no model: the one route that this key can use for the operation
        (SEMANTICS 5). None where there are more."""
        if principal.operations and operation not in principal.operations:
            return NOT_ALLOWED
        only = None
        for match in self._of(operation)[0]:
            if self._within(principal, match.route):
                if only is not None:
                    return None
                only = match
        return only if only is not None else NOT_SUPPORTED

    def models(self, principal: Principal) -> list[str]:
        """The public names that ``principal`` can use, in the order of the configuration; globs are no names."""
        names = dict.fromkeys(
            model
            for route in self._routes
            if not route.tenants or principal.tenant in route.tenants
            for model in route.models
            if not is_glob(model)
        )
        return [name for name in names if not principal.models or self._in_scope(principal, name.encode())]

    def model(self, principal: Principal, model: bytes) -> str | Refused:
        """The name of one model as ``GET /v1/models/{id}`` shows it: also one that only a glob has."""
        if principal.models and not self._in_scope(principal, model):
            return NOT_ALLOWED
        if not self._anywhere.find(model, principal.tenant):
            return NOT_FOUND
        return model.decode("utf-8", "replace")

    def _within(self, principal: Principal, route: Route) -> bool:
        if route.tenants and principal.tenant not in route.tenants:
            return False
        # A glob of the route is within reach if the scope repeats it: whether two globs overlap is not asked.
        return not principal.models or any(
            model in principal.models or (not is_glob(model) and self._in_scope(principal, model.encode()))
            for model in route.models
        )

    def _in_scope(self, principal: Principal, model: bytes) -> bool:
        models = principal.models
        scope = self._scopes.get(models)
        if scope is None:
            if len(self._scopes) >= SCOPES_MAX:
                self._scopes.clear()
            scope = self._scopes[models] = Table((pattern, (), True) for pattern in models)
        return scope.find(model, "") is not None


def _match(route: Route, shape: Shape, providers: dict[str, Provider]) -> Match | Refused:
    targets = tuple(
        (target, providers[target.provider])
        for target in route.targets
        if providers[target.provider].type in shape.served_by
    )
    return Match(route, shape, targets) if targets else NOT_SUPPORTED
