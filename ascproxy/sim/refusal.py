"""vLLM's refusals: what it checks in a body, and its error objects, equal to the recordings in every byte."""

from __future__ import annotations

import json
from typing import Any, NoReturn

import orjson

from ascproxy.sim.answer import Answer


class Refusal(Exception):
    """A request that vLLM answers with an error object."""

    def __init__(self, status: int, message: str, kind: str, param: str | None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param


def error(path: str, refusal: Refusal) -> Answer:
    """The error answer on ``path``."""
    # What fails validation never reaches the Anthropic layer, so it has OpenAI's shape on /v1/messages too.
    if path.startswith("/v1/messages") and refusal.kind != "Bad Request":
        shape: dict[str, Any] = {"type": "error", "error": {"type": refusal.kind, "message": refusal.message}}
    else:
        members = {"message": refusal.message, "type": refusal.kind, "param": refusal.param, "code": refusal.status}
        shape = {"error": members}
    return Answer(refusal.status, orjson.dumps(shape))


def invalid(kind: str, where: str, message: str, given: str) -> NoReturn:
    """Refuse with pydantic's finding, as vLLM prints it."""
    finding = f"{{'type': '{kind}', 'loc': '{where}', 'msg': '{message}', 'input': '{given}'}}"
    raise Refusal(400, f"1 validation error:\n  {finding}", "Bad Request", where)


def invalid_json(body: bytes) -> NoReturn:
    """Refuse a body that is no JSON, with the place and words of Python's own parser."""
    try:
        json.loads(body)
        place, reason = 0, "Invalid JSON"  # the two parsers disagree; orjson is the stricter one
    except UnicodeDecodeError as error:
        place, reason = error.start, "There was an error parsing the body"
    except json.JSONDecodeError as error:
        place, reason = error.pos, error.msg
    where = f"body.{place}"
    finding = (
        f"'loc': '{where}', 'msg': 'JSON decode error', 'input': '<dict of 0 items>', 'ctx': {{'error': '{reason}'}}"
    )
    raise Refusal(400, f"1 validation error:\n  {{'type': 'json_invalid', {finding}}}", "Bad Request", where)


def check_number(body: dict[str, Any], name: str) -> None:
    """Refuse the member ``name`` unless it is missing, null or a number of 0 or more."""
    value = body.get(name)
    if value is None:
        return
    if isinstance(value, str):
        invalid(
            "float_parsing",
            f"body.{name}",
            "Input should be a valid number, unable to parse string as a number",
            value[:40],
        )
    if isinstance(value, bool) or not isinstance(value, int | float):
        invalid("float_type", f"body.{name}", "Input should be a valid number", str(value)[:40])
    if value < 0:
        message = f"{name} must be non-negative, got {float(value)}. (parameter={name}, value={float(value)})"
        raise Refusal(400, message, "BadRequestError", name)


def check_integer(body: dict[str, Any], name: str, least: int | None = None, most: int | None = None) -> None:
    """Refuse the member ``name`` unless it is missing, null or an integer (from ``least`` to ``most``)."""
    value = body.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        invalid("int_type", f"body.{name}", "Input should be a valid integer", str(value)[:40])
    if least is None or most is None or value is None:
        return
    if not least <= value <= most:
        message = f"{name} must be between {least} and {most}, got {value}. (parameter={name}, value={value})"
        raise Refusal(400, message, "BadRequestError", name)


def stream_options(body: dict[str, Any], *, stream: bool) -> tuple[bool, bool]:
    """What a chat or completion asked for: (usage frame at the end, usage in every frame)."""
    options = body.get("stream_options")
    if options is None:
        return False, False
    if not stream:
        message = "Stream options can only be defined when `stream=True`. (parameter=stream_options)"
        raise Refusal(400, message, "BadRequestError", "stream_options")
    if not isinstance(options, dict):
        invalid("model_attributes_type", "body.stream_options", "Input should be a valid dictionary", str(options)[:40])
    usage = options.get("include_usage") is True
    return usage, usage and options.get("continuous_usage_stats") is True
