"""Times and sizes as they are written: a whole number and a unit, ``250ms``, ``10s``, ``64KiB``.

The unit is required, so that nobody has to remember whether a bare 10 means seconds or milliseconds; sizes are binary
only, because 64KB means two things.
"""

from __future__ import annotations

import re

TIME_UNITS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
SIZE_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
# Deadlines end in 32-bit milliseconds (24.8 days) in the core; sizes in counters that are summed.
MAX_TIME_MS = 7 * TIME_UNITS["d"]
MAX_SIZE = 64 * SIZE_UNITS["GiB"]
MAX_MEMORY = 65_536 * SIZE_UNITS["GiB"]

_QUANTITY = re.compile(r"([0-9]{1,15})([A-Za-z]*)")
_LOOSE_SIZES = {"k": "KiB", "kb": "KiB", "kib": "KiB", "m": "MiB", "mb": "MiB", "mib": "MiB", "g": "GiB", "gb": "GiB"}


def parse_time(text: object) -> int:
    """Milliseconds. Raises ValueError with a sentence that says how to write it."""
    number, unit = _split(text, "a time is written with its unit, such as 10s, 250ms or 5m")
    if not unit:
        raise ValueError(f"a time needs its unit: {number}s or {number}ms")
    if unit not in TIME_UNITS:
        raise ValueError(f"{unit!r} is not a unit of time; use ms, s, m, h or d")
    if number == 0:
        raise ValueError("a time of 0 would end everything at once; write at least 1ms")
    if number * TIME_UNITS[unit] > MAX_TIME_MS:
        raise ValueError("is longer than 7d, the most that a time can be")
    return number * TIME_UNITS[unit]


def parse_size(text: object, most: int = MAX_SIZE) -> int:
    """Bytes, at most ``most``. Raises ValueError with a sentence that says how to write it."""
    number, unit = _split(text, "a size is written with its unit, such as 64KiB, 32MiB or 512B")
    if not unit:
        raise ValueError(f"a size needs its unit: {number}B or {number}KiB")
    if unit not in SIZE_UNITS:
        meant = _LOOSE_SIZES.get(unit.lower())
        hint = f"; did you mean {number}{meant}?" if meant else ""
        raise ValueError(f"{unit!r} is not a unit of size; use B, KiB, MiB or GiB{hint}")
    if number == 0:
        raise ValueError("a size of 0 would let nothing through; write at least 1B")
    if number * SIZE_UNITS[unit] > most:
        raise ValueError(f"is more than {show_size(most)}, the most that a size can be")
    return number * SIZE_UNITS[unit]


def parse_memory(text: object) -> int:
    """Bytes of a machine's memory, which can be more than any size that passes through one."""
    return parse_size(text, MAX_MEMORY)


def show_time(ms: int) -> str:
    """The shortest way to write ``ms`` milliseconds: the inverse of :func:`parse_time`."""
    return _show(ms, TIME_UNITS)


def show_size(size: int) -> str:
    """The shortest way to write ``size`` bytes: the inverse of :func:`parse_size`."""
    return _show(size, SIZE_UNITS)


def _show(value: int, units: dict[str, int]) -> str:
    unit, factor = max((u for u in units.items() if value % u[1] == 0), key=lambda u: u[1])
    return f"{value // factor}{unit}"


def _split(text: object, how: str) -> tuple[int, str]:
    if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
        text = str(text)
    match = _QUANTITY.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(how)
    return int(match[1]), match[2]
