"""Shape: ten users more every ten seconds, up to a hundred. Shows from where on answers take longer."""

from __future__ import annotations

from locust import LoadTestShape

STEP_S = 10
STEP_USERS = 10
STEPS = 10


class Ramp(LoadTestShape):
    """Steps upwards; the last is held as long as the others."""

    def tick(self) -> tuple[int, float] | None:
        """Users and how many come a second; None at the end."""
        step = int(self.get_run_time() // STEP_S) + 1
        return (step * STEP_USERS, STEP_USERS) if step <= STEPS else None
