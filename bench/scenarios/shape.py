"""What all shapes share: they end when their plan does, or with `--run-time`."""

from __future__ import annotations

from locust import LoadTestShape


class Shape(LoadTestShape):
    """A plan of users over time."""

    abstract = True
    use_common_options = True  # of which --run-time; --users and --spawn-rate are the plan's

    def tick(self) -> tuple[int, float] | None:
        """Users and how many come or go a second; None at the end."""
        now = self.get_run_time()
        limit = self.runner.environment.parsed_options.run_time if self.runner else None
        return None if limit and now >= limit else self.users(now)

    def users(self, now: float) -> tuple[int, float] | None:
        """The plan: what there is `now`, in seconds since the start."""
        raise NotImplementedError
