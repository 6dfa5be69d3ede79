"""Shape: five users, then a hundred at once, then five again. Shows how an overload is refused and how it passes."""

from __future__ import annotations

from shape import Shape

# until second, users, users a second
PHASES = ((20, 5, 5), (40, 100, 100), (80, 5, 100))


class Spike(Shape):
    """Calm, spike, calm."""

    def users(self, now: float) -> tuple[int, float] | None:
        """The plan."""
        return next(((users, rate) for until, users, rate in PHASES if now < until), None)
