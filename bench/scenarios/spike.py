"""Shape: five users, then a hundred at once, then five again. Shows how an overload is refused and how it passes."""

from __future__ import annotations

from locust import LoadTestShape

# until second, users, users a second
PHASES = ((20, 5, 5), (40, 100, 100), (80, 5, 100))


class Spike(LoadTestShape):
    """Calm, spike, calm."""

    def tick(self) -> tuple[int, float] | None:
        """Users and how many come a second; None at the end."""
        now = self.get_run_time()
        return next(((users, rate) for until, users, rate in PHASES if now < until), None)
