"""The exception tree of ascproxy: every leaf is a sentence for a human that says what to do.

Floor 0: imports nothing of ours. Foreign exceptions are mapped to these once, at the border of the
room that called out.
"""

from __future__ import annotations


class AscproxyError(Exception):
    """Root of all errors that ascproxy raises on purpose. ``str(error)`` is shown to an operator as it is."""

    exit_code = 1


class UsageError(AscproxyError):
    """The command line, or a file it names, cannot be used: exit code 2."""

    exit_code = 2


class NotRunningError(AscproxyError):
    """A command needs a running service and there is none: exit code 3."""

    exit_code = 3
