"""One reload, from the signal to the last worker's answer. Pure.

Theory. Control checks the new configuration; then every ready worker gets the revision and answers. The first success
puts the revision in force, so that a worker started later gets it too; if all fail, the old one stays in force, and
nothing is said to be new. A worker that dies while it is asked counts as failed: its successor starts on what is
in force.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Outcome(Enum):
    """What an answer decided."""

    WAITING = "waiting"
    FIRST_SUCCESS = "first success"
    NONE = "none"  # the last answer, and none was a success
    ALL = "all"
    SOME = "some"


@dataclass(slots=True)
class Reload:
    """``revision`` is being handed to the slots in ``waiting``; ``snapshot`` is its descriptor."""

    revision: str
    snapshot: int
    waiting: set[int]
    failed: dict[int, str] = field(default_factory=dict)
    succeeded: int = 0

    def answer(self, slot: int, reason: str | None) -> tuple[Outcome, ...]:
        """A slot's answer, ``reason`` None for success; what follows from it, in order."""
        if slot not in self.waiting:
            return ()
        self.waiting.discard(slot)
        outcomes = []
        if reason is None:
            self.succeeded += 1
            if self.succeeded == 1:
                outcomes.append(Outcome.FIRST_SUCCESS)
        else:
            self.failed[slot] = reason
        if self.waiting:
            return (*outcomes, Outcome.WAITING)
        if not self.succeeded:
            return (Outcome.NONE,)
        return (*outcomes, Outcome.SOME if self.failed else Outcome.ALL)
