"""Commands that were sent and not yet answered. Each is answered once: by the child, or by what became of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ascproxy.net.mailbox import Frame, Kind, Mailbox

Answer = Callable[[str | None, Frame | None], None]  # (why it failed, None for success; the answering frame if any)


@dataclass(frozen=True, slots=True)
class Pending:
    """A command that waits for its answer from a slot."""

    slot: int
    answer: Answer


@dataclass(slots=True)
class Commands:
    """Request ids, and who waits for what."""

    _pending: dict[int, Pending] = field(default_factory=dict)
    _last: int = 0

    def send(self, slot: int, mailbox: Mailbox | None, frame: Frame, answer: Answer) -> None:
        """Send a command; ``answer`` is called once, at once if it cannot be sent."""
        self._last += 1
        self._pending[self._last] = Pending(slot, answer)
        if mailbox is None or not mailbox.send(replace(frame, request=self._last)):
            self._answered(self._last, "its mailbox is full or closed", None)

    @property
    def idle(self) -> bool:
        """Whether every command has been answered."""
        return not self._pending

    def reply(self, frame: Frame) -> None:
        """A DONE or FAILED frame has come. One that nobody waits for any more is dropped."""
        failed = frame.kind is Kind.FAILED
        self._answered(frame.request, str(frame.payload.get("reason", "no reason given")) if failed else None, frame)

    def fail(self, slot: int) -> None:
        """The slot's process has gone: nothing more will be answered."""
        for request in [request for request, pending in self._pending.items() if pending.slot == slot]:
            self._answered(request, "the process exited", None)

    def _answered(self, request: int, reason: str | None, frame: Frame | None) -> None:
        pending = self._pending.pop(request, None)
        if pending is not None:
            pending.answer(reason, frame)
