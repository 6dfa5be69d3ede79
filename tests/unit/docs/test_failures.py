"""The page of failures is what its table says; the table is proven by ``tests/process/test_upstreams.py``."""

from __future__ import annotations

from tests.kit.failure_table import FAILURES, PAGE, Moment, cases, page
from tests.kit.failures import DIALECTS


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "docs/failures.md: python -m tests.kit.failure_table"


def test_every_failure_has_a_cell_in_every_dialect() -> None:
    """A row that is None everywhere, or a dialect that no row reaches, would be a table that proves nothing."""
    for failure in FAILURES:
        for dialect in DIALECTS:
            assert any(failure.seen(dialect, moment) for moment in Moment), (failure.title, dialect.name)


def test_every_case_has_a_name_of_its_own() -> None:
    names = [case.id for case in cases()]
    assert len(set(names)) == len(names)
