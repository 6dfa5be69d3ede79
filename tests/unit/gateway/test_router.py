"""Routing: precedence, scopes, what a caller learns; and equality with a model that knows no index."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ascproxy.gateway.router import Match, Refused, Router, glob_regex
from ascproxy.model.key import Principal
from ascproxy.model.route import Route
from ascproxy.wire.operation import OPERATIONS, Operation
from tests.kit.snapshots import provider, route, snapshot

CHAT, MESSAGES, GENERATE = Operation.CHAT_COMPLETIONS, Operation.MESSAGES, Operation.GENERATE

PROVIDERS = (
    provider("rack-a", 1),
    provider("tgi", 2, type="tgi"),
    provider("openai", 3, type="openai"),
    provider("claude", 4, type="anthropic"),
)


def router(*routes: Route, tenants: tuple[str, ...] = ("acme", "other")) -> Router:
    return Router(snapshot(routes, PROVIDERS, tenants=tenants))


def caller(tenant: str = "acme", models: tuple[str, ...] = (), operations: tuple[str, ...] = ()) -> Principal:
    return Principal(tenant, "k1", models, operations, None, b"")


def outcome(found: Match | Refused | None) -> str | None:
    return found.route.name if isinstance(found, Match) else found.code if found is not None else None


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("llama", "exact"),
        ("llama-3-70b", "longer"),
        ("llama-2", "shorter"),
        ("l", "rest"),
        ("gpt-4o-mini", "rest"),
        ("gpt-4o-mini-2026", "letters"),
    ],
)
def test_an_exact_name_wins_then_the_longest_prefix_then_the_most_letters(model: str, name: str) -> None:
    r = router(
        route("rest", "*"),
        route("letters", "*-2026"),
        route("shorter", "llama*"),
        route("longer", "llama-3*"),
        route("exact", "llama"),
    )
    assert outcome(r.route(caller(), CHAT, model.encode())) == name


def test_of_equal_globs_the_first_of_the_configuration_wins() -> None:
    assert outcome(router(route("one", "a?c"), route("two", "a*c")).route(caller(), CHAT, b"abc")) == "one"


def test_a_route_of_the_tenant_wins_over_one_for_all() -> None:
    r = router(route("all", "m", "g*"), route("own", "m", "g*", tenants=("acme",)))
    assert outcome(r.route(caller(), CHAT, b"m")) == "own"
    assert outcome(r.route(caller(), CHAT, b"g1")) == "own"
    assert outcome(r.route(caller("other"), CHAT, b"m")) == "all"
    assert outcome(r.route(caller("other"), CHAT, b"g1")) == "all"


def test_a_tenant_does_not_see_routes_of_others() -> None:
    r = router(route("own", "secret-model", tenants=("other",)))
    assert outcome(r.route(caller(), CHAT, b"secret-model")) == "model_not_found"
    assert r.models(caller()) == []
    assert outcome(r.route(caller("other"), CHAT, b"secret-model")) == "own"


def test_only_targets_whose_type_serves_the_operation_are_asked() -> None:
    r = router(route("mixed", "m", to=("claude", "rack-a", "tgi")))
    chat, messages = r.route(caller(), CHAT, b"m"), r.route(caller(), MESSAGES, b"m")
    assert isinstance(chat, Match)
    assert isinstance(messages, Match)
    assert [p.name for _, p in chat.targets] == ["rack-a", "tgi"]
    assert [p.name for _, p in messages.targets] == ["claude", "rack-a"]


def test_an_operation_that_no_target_serves_is_not_supported_and_falls_through_to_no_other_route() -> None:
    """SEMANTICS 5: 404 operation_not_supported. Traffic of "m" must not reach a provider that was not meant for it."""
    r = router(route("narrow", "m", to=("tgi",)), route("wide", "*", to=("claude",)))
    assert outcome(r.route(caller(), MESSAGES, b"m")) == "operation_not_supported"
    assert outcome(r.route(caller(), MESSAGES, b"n")) == "wide"


def test_a_route_that_excludes_the_operation_is_no_candidate() -> None:
    r = router(route("chat", "m", operations=("chat_completions",)), route("other", "*"))
    assert outcome(r.route(caller(), MESSAGES, b"m")) == "other"
    assert outcome(router(route("chat", "m", operations=("embeddings",))).route(caller(), CHAT, b"m")) == (
        "operation_not_supported"
    )


@pytest.mark.parametrize(
    ("models", "operations", "model", "expected"),
    [
        ((), (), b"m", "r"),
        (("m",), (), b"m", "r"),
        (("other",), (), b"m", "model_not_allowed"),
        (("other",), (), b"no-such-model", "model_not_allowed"),
        (("*",), (), b"no-such-model", "model_not_found"),
        (("m*",), (), b"m", "r"),
        ((), ("chat_completions",), b"m", "r"),
        ((), ("embeddings",), b"m", "model_not_allowed"),
    ],
)
def test_scopes_are_asked_before_routes(
    models: tuple[str, ...], operations: tuple[str, ...], model: bytes, expected: str
) -> None:
    """Outside of its scope a key gets the same answer for a model that exists and one that does not."""
    found = router(route("r", "m")).route(caller(models=models, operations=operations), CHAT, model)
    assert outcome(found) == expected


def test_a_request_without_model_goes_to_the_only_route_of_the_key() -> None:
    r = router(route("one", "a", to=("tgi",)), route("two", "b", to=("tgi",)), route("chat", "c"))
    assert r.only(caller(), GENERATE) is None
    assert outcome(r.only(caller(models=("b",)), GENERATE)) == "two"
    assert outcome(r.only(caller(models=("c",)), GENERATE)) == "operation_not_supported"
    assert outcome(r.only(caller(operations=("embeddings",)), GENERATE)) == "model_not_allowed"


def test_models_are_listed_as_this_caller_may_use_them() -> None:
    r = router(
        route("one", "a", "g-*"),
        route("two", "b", "a"),
        route("mine", "c", tenants=("acme",)),
        route("theirs", "d", tenants=("other",)),
    )
    assert r.models(caller()) == ["a", "b", "c"]
    assert r.models(caller(models=("b", "c*"))) == ["b", "c"]
    assert r.model(caller(), b"g-7") == "g-7"
    assert r.model(caller(), b"d") == Refused("model_not_found")
    assert r.model(caller(models=("b",)), b"a") == Refused("model_not_allowed")


def test_a_name_that_is_not_utf8_is_not_found() -> None:
    assert outcome(router(route("r", "m", "g*")).route(caller(), CHAT, b"\xff\xfe")) == "model_not_found"


def test_more_scopes_than_are_remembered_are_still_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ascproxy.gateway.router.SCOPES_MAX", 2)
    r = router(route("r", "m1", "m2", "m3", "m4"))
    for _ in range(2):
        for n in "1234":
            who = caller(models=(f"m{n}",))
            assert outcome(r.route(who, CHAT, f"m{n}".encode())) == "r"
            assert outcome(r.route(who, CHAT, b"m9")) == "model_not_allowed"
            assert len(r._scopes) <= 2


letters = st.text(alphabet="ab-é", max_size=6)
patterns = st.text(alphabet="ab-é*?", min_size=1, max_size=6)


def naive_glob(pattern: str, name: str) -> bool:
    """By the definition: ``*`` is any run, ``?`` one character."""
    if not pattern:
        return not name
    if pattern[0] == "*":
        return any(naive_glob(pattern[1:], name[i:]) for i in range(len(name) + 1))
    return bool(name) and pattern[0] in ("?", name[0]) and naive_glob(pattern[1:], name[1:])


@given(pattern=patterns, name=letters)
def test_globs_mean_what_they_say(pattern: str, name: str) -> None:
    assert bool(glob_regex(pattern).fullmatch(name)) == naive_glob(pattern, name)


def test_a_hostile_name_does_not_make_a_glob_slow() -> None:
    """Each star is atomic: what does not match is given up in one pass for each, not in all combinations."""
    assert not glob_regex("*a*a*a*a*a*a*a*a*a*a*b").fullmatch("a" * 256)


routes = st.lists(
    st.builds(
        lambda models, tenants, operations, to: (models, tenants, operations, to),
        st.lists(patterns, min_size=1, max_size=3),
        st.lists(st.sampled_from(["acme", "other"]), max_size=1),
        st.lists(st.sampled_from([CHAT, MESSAGES, GENERATE]), max_size=2),
        st.lists(st.sampled_from([p.name for p in PROVIDERS]), min_size=1, max_size=2),
    ),
    max_size=6,
)


def naive(table: list[Route], who: Principal, operation: Operation, model: str) -> str:
    """The router's definition, read from front to back without any index."""
    if who.models and not any(naive_glob(p, model) for p in who.models):
        return "model_not_allowed"
    if who.operations and operation not in who.operations:
        return "model_not_allowed"
    seen = [r for r in table if not r.tenants or who.tenant in r.tenants]
    found = []
    for order, r in enumerate(seen):
        for place, pattern in enumerate(r.models):
            if (not r.operations or operation in r.operations) and naive_glob(pattern, model):
                glob = re.search(r"[*?]", pattern)
                prefix = glob.start() if glob else 0
                count = len(re.sub(r"[*?]", "", pattern))
                # Globs that are equally specific keep the order in which each pattern is first written.
                first = min(
                    (o, p)
                    for o, other in enumerate(table)
                    for p, text in enumerate(other.models)
                    if text == pattern and (not other.operations or operation in other.operations)
                )
                found.append(((bool(glob), -prefix, -count, first if glob else (), not r.tenants, order, place), r))
    if not found:
        known = any(naive_glob(p, model) for r in seen for p in r.models)
        return "operation_not_supported" if known else "model_not_found"
    best = min(found, key=lambda entry: entry[0])[1]
    types = {p.name: p.type for p in PROVIDERS}
    served = any(types[t.provider] in OPERATIONS[operation].served_by for t in best.targets)
    return best.name if served else "operation_not_supported"


@settings(max_examples=400)
@given(
    rows=routes,
    tenant=st.sampled_from(["acme", "other"]),
    scope=st.lists(patterns, max_size=2),
    operation=st.sampled_from([CHAT, MESSAGES, GENERATE]),
    model=letters,
)
def test_the_router_equals_its_definition(
    rows: list[tuple[list[str], list[str], list[Operation], list[str]]],
    tenant: str,
    scope: list[str],
    operation: Operation,
    model: str,
) -> None:
    table = [
        route(f"r{i}", *models, tenants=tuple(tenants), operations=tuple(operations), to=tuple(to))
        for i, (models, tenants, operations, to) in enumerate(rows)
    ]
    who = caller(tenant, models=tuple(scope))
    assert outcome(router(*table).route(who, operation, model.encode())) == naive(table, who, operation, model)
