"""Findings: what is wrong with a configuration, where, and what to do about it. All of them at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from ascproxy.errors import AscproxyError


class Severity(StrEnum):
    """An error keeps the revision from being loaded; a warning does not."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence about one place. ``line`` and ``column`` count from 1; ``path`` reads ``listeners[0].tls.key``."""

    severity: Severity
    file: str
    line: int
    column: int
    path: str
    reason: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}: {self.severity}: "
        return place + (f"{self.path}: {self.reason}" if self.path else self.reason)


class InvalidConfigError(AscproxyError):
    """A configuration with at least one error; ``findings`` holds all of them, warnings too."""

    def __init__(self, findings: Iterable[Finding]) -> None:
        self.findings = tuple(findings)
        super().__init__("\n".join(str(f) for f in self.findings))


def has_errors(findings: Iterable[Finding]) -> bool:
    """Whether one of them keeps the configuration from being used."""
    return any(f.severity is Severity.ERROR for f in findings)
