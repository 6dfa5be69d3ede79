"""Shape: fifty users for an hour. For what fills up slowly, on a whole installation; `make soak` judges the gateway."""

from __future__ import annotations

from shape import Shape

SECONDS = 3600
USERS = 50


class Soak(Shape):
    """The same load all the time; it comes within ten seconds."""

    def users(self, now: float) -> tuple[int, float] | None:
        """The plan."""
        return (USERS, USERS / 10) if now < SECONDS else None
