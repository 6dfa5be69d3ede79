"""Shape: fifty users for an hour. For what fills up slowly, on a whole installation; `make soak` judges the gateway."""

from __future__ import annotations

from locust import LoadTestShape

SECONDS = 3600
USERS = 50


class Soak(LoadTestShape):
    """The same load all the time; it comes within ten seconds."""

    def tick(self) -> tuple[int, float] | None:
        """Users and how many come a second; None at the end."""
        return (USERS, USERS / 10) if self.get_run_time() < SECONDS else None
