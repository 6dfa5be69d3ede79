"""Shape: ten users more every ten seconds, up to a hundred. Shows from where on answers take longer."""

from __future__ import annotations

from shape import Shape

STEP_S = 10
STEP_USERS = 10
STEPS = 10


class Ramp(Shape):
    """Steps upwards; the last is held as long as the others."""

    def users(self, now: float) -> tuple[int, float] | None:
        """The plan."""
        step = int(now // STEP_S) + 1
        return (step * STEP_USERS, STEP_USERS) if step <= STEPS else None
