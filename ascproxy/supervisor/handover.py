"""What one program hands to the next at an upgrade: one JSON object in a sealed memory file (docs/formats/handover.md).

Descriptors keep their numbers over an exec, so the object names numbers. It has a layout version of its own: this
version writes :data:`LAYOUT`, and reads it and the one before, which :data:`LIFTS` makes into it. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import orjson

from ascproxy.errors import AscproxyError
from ascproxy.supervisor.slots import Slot, State

LAYOUT = 1
# Each makes a document of the layout that is its key into one of the next. Only the newest step is kept: N reads N-1.
LIFTS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
# How a program finds what was handed to it, and that it is asked for a rehearsal only.
DESCRIPTOR_VARIABLE = "ASCPROXY_HANDOVER"
REHEARSAL_VARIABLE = "ASCPROXY_REHEARSAL"


class HandoverError(AscproxyError):
    """What was handed over cannot be read by this version."""


@dataclass(frozen=True, slots=True)
class Process:
    """A process of a slot. ``post``: its own, None for the one that the slot's berth has. ``until_ns``: when its drain
    is over, None while it accepts."""

    slot: Slot
    pid: int
    pidfd: int
    post: Mapping[str, Any] | None = None
    until_ns: int | None = None

    def descriptors(self) -> Iterator[int]:
        yield self.pidfd
        if self.post is not None:
            yield from (self.post["ours"], self.post["theirs"])


@dataclass(frozen=True, slots=True)
class ControlProcess:
    """Control, and our end of its mailbox. One that is no child of ours has only that."""

    pid: int | None
    pidfd: int | None
    mailbox: int


@dataclass(frozen=True, slots=True)
class Handover:
    """``version`` is of the program that wrote it; ``number`` counts the upgrades of this service.

    ``slots`` are the machines of all slots as they were, ``wanted`` how many of them have to run. Times are monotonic.
    """

    version: str
    number: int
    wanted: int
    rotate_ns: int
    holdings: Mapping[str, Any]
    slots: tuple[Slot, ...]
    processes: tuple[Process, ...]
    control: ControlProcess | None

    def encode(self) -> bytes:
        return orjson.dumps({"layout": LAYOUT, **asdict(self)})

    def descriptors(self) -> Iterator[int]:
        """Those of the processes; those of the holdings are :meth:`Holdings.descriptors`."""
        for process in self.processes:
            yield from process.descriptors()
        if self.control is not None:
            yield self.control.mailbox
            if self.control.pidfd is not None:
                yield self.control.pidfd


def decode(
    data: bytes, lifts: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = LIFTS, newest: int = LAYOUT
) -> Handover:
    """The handover in ``data``. Raises :class:`HandoverError` for a layout that this version does not read."""
    try:
        document = orjson.loads(data)
        layout = document.pop("layout")
    except (orjson.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise HandoverError(f"what was handed over has no layout: {error!r}") from error
    if layout != newest and layout not in lifts:
        reads = " and ".join(str(known) for known in sorted({*lifts, newest}))
        raise HandoverError(
            f"the running service hands over layout {layout}, this version reads layout {reads}: "
            "upgrade to a version between the two first, or restart the service"
        )
    try:
        while layout != newest:
            document = lifts[layout](document)
            layout += 1
        return _handover(document)
    except (KeyError, TypeError, ValueError) as error:
        raise HandoverError(f"what was handed over is damaged: {error!r}") from error


def _handover(document: dict[str, Any]) -> Handover:
    control = document["control"]
    return Handover(
        version=str(document["version"]),
        number=int(document["number"]),
        wanted=int(document["wanted"]),
        rotate_ns=int(document["rotate_ns"]),
        holdings=document["holdings"],
        slots=tuple(_slot(raw) for raw in document["slots"]),
        processes=tuple(
            Process(_slot(raw["slot"]), raw["pid"], raw["pidfd"], raw["post"], raw["until_ns"])
            for raw in document["processes"]
        ),
        control=None if control is None else ControlProcess(**control),
    )


def _slot(raw: Mapping[str, Any]) -> Slot:
    known = {field.name: raw[field.name] for field in fields(Slot)}
    return Slot(**{**known, "state": State(known["state"])})
