"""The two clocks, behind names that tests can replace.

Durations and deadlines use :func:`monotonic_ns` only (SEMANTICS: a jump of the wall clock changes nothing but
timestamps and the validity of tokens); :func:`wall_ns` is for timestamps and expiry dates.
"""

from __future__ import annotations

from time import monotonic_ns
from time import time_ns as wall_ns

__all__ = ["monotonic_ns", "wall_ns"]
