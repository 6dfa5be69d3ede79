"""What the simulator counts, so that tests can prove what reached the model server and when it stopped working.

``GET /sim/stats`` shows it all as one JSON object; see :meth:`Gauges.page`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ascproxy.sim.request import Request

LAST_BODY = 65536  # bytes of the last request's body that are kept


class Gauges:
    """Counters of one server, written by it (``prompt_tokens`` by its dialect) and read by metrics and tests."""

    def __init__(self) -> None:
        self.requests = 0
        self.running = 0
        self.aborted = 0
        self.incomplete = 0
        self.malformed = 0
        self.connections = 0
        self.connections_open = 0
        self.bytes_received = 0
        self.prompt_tokens = 0
        self.finished_tokens = 0
        self.last: Request | None = None
        self.running_tokens: Callable[[], int] = int

    def generated(self) -> int:
        """Tokens made so far, by finished, aborted and running generations."""
        return self.finished_tokens + self.running_tokens()

    def page(self) -> dict[str, Any]:
        """The members of ``/sim/stats``.

        ``requests`` that arrived whole, ``running`` generations now, ``aborted`` answers because the client went away
        before they were complete, ``incomplete`` requests that were cut off while arriving, ``malformed`` ones,
        ``connections`` since the start, ``connections_open`` now, ``bytes_received``, token counts, and the ``last``
        request: its exact ``head``, the first 64 KiB of its ``body`` (both as Latin-1), and the body's ``length``.
        Requests below ``/sim/`` count nowhere, nor does a connection whose first request is one.
        """
        last = None
        if self.last is not None:
            body = self.last.body
            last = {
                "head": self.last.head.decode("latin-1"),
                "body": body[:LAST_BODY].decode("latin-1"),
                "length": len(body),
            }
        return {
            "requests": self.requests,
            "running": self.running,
            "aborted": self.aborted,
            "incomplete": self.incomplete,
            "malformed": self.malformed,
            "connections": self.connections,
            "connections_open": self.connections_open,
            "bytes_received": self.bytes_received,
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated(),
            "last": last,
        }
