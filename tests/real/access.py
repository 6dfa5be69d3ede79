"""What the service logged of one request."""

from __future__ import annotations

import json
from typing import Any

from tests.kit.service import Service, wait_for


def access_lines(service: Service) -> list[dict[str, Any]]:
    """Every access line so far; the last may be half written."""
    whole = service.out.read_text(errors="replace").split("\n")[:-1]
    return [json.loads(line) for line in whole if '"kind":"access"' in line]


def access_line(service: Service, request_id: str) -> dict[str, Any]:
    """The access line of a request, which is written soon after its end."""
    found = wait_for(
        lambda: [line for line in access_lines(service) if line["request_id"] == request_id],
        f"an access line of {request_id}",
        5,
    )
    (line,) = found
    assert isinstance(line, dict)
    return line
