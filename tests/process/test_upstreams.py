"""Model servers that fail, one failure at a time, and what each leaves behind: through the real service.

The table is :mod:`tests.kit.failure_table`: failure, moment and dialect against what the client sees. Here each cell is
held to: what comes, how often the server was asked, whether the next target answers instead (SEMANTICS 3: after a
definite failure, never after an ambiguous one unless the route says so), and that the next request is clean on the
client's connection and on whatever connection to the server is used for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from itertools import groupby

import pytest

from tests.kit.failure_table import BROKEN_OFF, CUT, MALFORMED, TRUNCATED, Case, Seen, cases
from tests.kit.failures import CHAT, DIALECTS, TGI, Dialect, Got, Place
from tests.kit.service import wait_for

CHUNK = 61  # bytes: shorter than an event, and no divisor of any
RETRY_COSTS = 12  # requests, and a little more: the budget for retries is a tenth of them
CASES = [pytest.param(case, id=case.id) for case in cases()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(stack, tmp_path_factory.mktemp("upstreams"))


def check(got: Got, seen: Seen) -> None:
    """``got`` is the cell."""
    error = got.dialect.tells.get(seen.error, seen.error)
    assert (got.status, got.code, got.error, got.whole) == (seen.status, seen.code, error, seen.whole), got
    assert got.kept is seen.whole
    assert got.good is (seen.status == 200 and not seen.error and seen.whole), got
    assert not (got.terminated and error), "a terminator makes a broken answer look complete"
    if seen.code:
        assert got.dialect.refuses(json.loads(got.body), seen.code), got.body


@pytest.mark.parametrize("case", CASES)
def test_what_the_client_sees(place: Place, case: Case) -> None:
    first, seen, dialect = place.first[case.dialect.type], case.seen, case.dialect
    with closing(place.client()) as client:
        for _ in range(RETRY_COSTS if seen.asked > 1 else 1):
            assert place.ask(client, dialect, "first").good  # and its connection to the server waits
        before = first.stats()
        got = place.ask(client, dialect, case.failure.at + case.order, stream=case.stream)
        check(got, seen)
        left = first.stats()
        assert left["requests"] - before["requests"] == seen.asked
        if case.order == "!rate-limited:7":
            assert got.fields["retry-after"] == "7"
        for stream in (False, True):
            assert place.ask(client, dialect, "first", stream=stream).good
        after = first.stats()
        assert after["connections"] - left["connections"] == (0 if seen.kept else 1)
        assert after["malformed"] == after["incomplete"] == 0
        wait_for(lambda: first.stats()["running"] == 0, "nothing is generated for nobody")


@pytest.mark.parametrize("case", CASES)
def test_who_answers_where_there_is_a_second_target(place: Place, case: Case) -> None:
    spare, seen = place.spare[case.dialect.type], case.seen
    before = spare.stats()["requests"]

    def ask(route: str) -> Got:
        with closing(place.client()) as client:
            return place.ask(client, case.dialect, f"{case.failure.at}-{route}{case.order}", stream=case.stream)

    with ThreadPoolExecutor(2) as threads:  # at once, because some of them wait
        answers = list(threads.map(ask, ("pair", "again")))
    assert spare.stats()["requests"] - before == seen.next + seen.anyway
    for got, goes_on in zip(answers, (seen.next, seen.anyway), strict=True):
        check(got, Seen() if goes_on else seen)
        if got.dialect is not TGI:  # which does not say who it is
            assert (b'"model":"spare"' in got.body) is goes_on


@pytest.mark.parametrize("where", ["refuse", "tls"])
def test_where_servers_are_is_no_business_of_callers(place: Place, where: str) -> None:
    with closing(place.client()) as client:
        got = place.ask(client, CHAT, where)
    assert got.code == "upstream_unreachable"
    assert str(place.hidden[where]).encode() not in got.body
    port = str(place.hidden[where])
    wait_for(lambda: port in place.service.out.read_text(), "whoever runs it learns")


@pytest.mark.parametrize("dialect", [pytest.param(d, id=d.name) for d in DIALECTS])
def test_a_stream_is_complete_with_its_terminator(place: Place, dialect: Dialect) -> None:
    """The server closes behind the terminator and leaves out the last chunk: nothing is missing to the client."""
    with closing(place.client()) as client:
        whole = place.ask(client, dialect, "first", stream=True)
        unseen = dialect.type == "vllm" and dialect.terminates(("", "[DONE]"))  # the event of usage that we asked for
        n = len(whole.events) + unseen
        got = place.ask(client, dialect, f"first!truncate:{n}", stream=True)
        assert got.good
        assert got.kept
        short = place.ask(client, dialect, f"first!truncate:{n - 1}", stream=True)
        assert not short.good  # so that was the terminator
        if short.whole:
            assert place.ask(client, dialect, "first").good


@pytest.mark.parametrize("way", ["truncate", "bad-chunk"])
@pytest.mark.parametrize("dialect", [pytest.param(d, id=d.name) for d in DIALECTS])
def test_a_stream_may_break_off_anywhere(place: Place, dialect: Dialect, way: str) -> None:
    """Between events and inside of them: first it is refused, from its content on it is told, and only the terminator
    makes it an answer. No client is handed half an event (``Got.events`` would not read it)."""
    first, refused = place.first[dialect.type], {"truncate": BROKEN_OFF, "bad-chunk": MALFORMED}[way]
    first.set(chunk=CHUNK)
    try:
        stages = []
        with closing(place.client()) as client:
            for n in range(1_000):
                got = place.ask(client, dialect, f"first!{way}:{n}", stream=True)
                if got.good:
                    break
                stages.append(got.code == "")
                if got.code:
                    check(got, refused)
                else:
                    check(got, TRUNCATED if dialect.tells else CUT)
            else:
                raise AssertionError("it was never whole")
    finally:
        first.set(chunk=0)
    assert [told for told, _ in groupby(stages)] == [False, True]
