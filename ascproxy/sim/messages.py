"""vLLM's ``/v1/messages``: Anthropic's shape with vLLM's ids, as recorded.

Not recorded, and written from the protocol instead: the error event, and an aborted message (no stop_reason).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from ascproxy.sim.answer import Event
from ascproxy.sim.chat import Tool
from ascproxy.sim.text import Plan, quoted

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


@dataclass(frozen=True, slots=True)
class Message:
    """One answer, ready to be said as one body or as events."""

    id: str
    model: str
    input_tokens: int
    plan: Plan
    tool: Tool | None = None

    def usage(self) -> dict[str, int]:
        """The final usage object."""
        return {
            "input_tokens": self.input_tokens,
            "output_tokens": len(self.plan.tokens),
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
        }


def body(message: Message) -> bytes:
    """The unary answer. Members that are null are left out, as vLLM does."""
    text = message.plan.text()
    block: dict[str, Any] = {"type": "text", "text": text}
    if message.tool is not None:
        block = {"type": "tool_use", "id": message.tool.id, "name": message.tool.name, "input": orjson.loads(text)}
    answer = {"id": message.id, "type": "message", "role": "assistant", "content": [block], "model": message.model}
    if message.plan.finish in STOP_REASONS:
        answer["stop_reason"] = STOP_REASONS[message.plan.finish]
    return orjson.dumps({**answer, "usage": message.usage()})


def events(message: Message) -> Iterator[Event]:
    """The events of a streamed message, with their terminator ``message_stop``."""
    start: dict[str, Any] = {
        "id": message.id,
        "type": "message",
        "role": "assistant",
        "content": [],
        "model": message.model,
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": message.input_tokens, "output_tokens": 0},
    }
    yield 0, event("message_start", {"message": start})
    if message.tool is None:
        block: dict[str, Any] = {"type": "text", "text": ""}
        delta = b'{"type":"text_delta","text":%b}'
    else:
        block = {"type": "tool_use", "id": message.tool.id, "name": message.tool.name, "input": {}}
        delta = b'{"type":"input_json_delta","partial_json":%b}'
    yield 0, event("content_block_start", {"content_block": block, "index": 0})
    form = b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":%b,"index":0}\n\n'
    for token in message.plan.tokens:
        yield 1, form % (delta % quoted(token))
    yield 0, event("content_block_stop", {"index": 0})
    stop = {"stop_reason": STOP_REASONS.get(message.plan.finish), "stop_sequence": None}
    yield 0, event("message_delta", {"delta": stop, "usage": message.usage()})
    yield 0, event("message_stop", {})


def event(kind: str, members: dict[str, Any]) -> bytes:
    """One server-sent event of type ``kind``."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps({"type": kind, **members}))
