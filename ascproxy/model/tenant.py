"""Tenants: who owns keys and traffic."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant is its name; what it may do is said by its keys and by routes."""

    name: str
