"""What remains for Python to count: refusals, and answers that never had a plan. All else is counted natively.

Label sets are closed (SEMANTICS 11): listeners, routes, providers and operations of the configuration, codes of the
catalogue; ``-`` where a request did not get far enough to have one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ascproxy.telemetry import metrics

if TYPE_CHECKING:
    from ascproxy._native import Page

NONE = "-"


class Meter:
    """The cells of one worker's page, found once each."""

    __slots__ = ("_blocks", "_page", "_refusals")

    def __init__(self, page: Page) -> None:
        self._page = page
        self._blocks: dict[tuple[str, str, str, str], int] = {}
        self._refusals: dict[str, int] = {}

    def block(self, listener: str, route: str, provider: str, operation: str) -> int:
        """The meter block of exchanges with these labels."""
        key = (listener, route, provider, operation)
        block = self._blocks.get(key)
        if block is None:
            block = self._blocks[key] = metrics.exchange_block(self._page, *key)
        return block

    def refused(self, code: str) -> None:
        """Count a refusal."""
        cell = self._refusals.get(code)
        if cell is None:
            cell = self._refusals[code] = metrics.refusal_cell(self._page, code)
        self._page.add(cell, 1)
