"""vLLM's ``/v1/responses``, unary and streamed, as recorded.

Not recorded, and written from the protocol instead: ``response.failed``, and the status ``cancelled`` of an abort.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from ascproxy.sim.answer import Event
from ascproxy.sim.text import Plan, quoted

STATUSES = {"stop": "completed", "length": "incomplete", "abort": "cancelled"}


@dataclass(frozen=True, slots=True)
class Response:
    """One answer, ready to be said as one body or as events."""

    id: str
    message_id: str
    created: int
    model: str
    input_tokens: int
    plan: Plan
    temperature: float
    max_output_tokens: int

    def snapshot(self, *, done: bool, status: str | None = None) -> dict[str, Any]:
        """The response object, before (no output, no usage) or after generation."""
        length = done and self.plan.finish == "length"
        made = len(self.plan.tokens)
        usage = {
            "input_tokens": self.input_tokens,
            "input_tokens_details": {
                "cached_tokens": 0,
                "cache_write_tokens": 0,
                "input_tokens_per_turn": [],
                "cached_tokens_per_turn": [],
            },
            "output_tokens": made,
            "output_tokens_details": {
                "reasoning_tokens": 0,
                "tool_output_tokens": 0,
                "output_tokens_per_turn": [],
                "tool_output_tokens_per_turn": [],
            },
            "total_tokens": self.input_tokens + made,
        }
        return {
            "id": self.id,
            "created_at": self.created,
            "incomplete_details": {"reason": "max_output_tokens"} if length else None,
            "instructions": None,
            "metadata": None,
            "model": self.model,
            "object": "response",
            "output": [self._item("completed", [self._part(self.plan.text(), None)])] if done else [],
            "parallel_tool_calls": True,
            "temperature": self.temperature,
            "tool_choice": "none",
            "tools": [],
            "top_p": 1.0,
            "background": False,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": None,
            "previous_response_id": None,
            "prompt": None,
            "reasoning": None,
            "service_tier": "auto",
            "status": status or (STATUSES[self.plan.finish] if done else "in_progress"),
            "text": None,
            "top_logprobs": None,
            "truncation": "disabled",
            "usage": usage if done else None,
            "user": None,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "input_messages": None,
            "output_messages": None,
        }

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        fixed = {"role": "assistant", "status": status, "type": "message", "phase": None}
        return {"id": self.message_id, "content": content, **fixed}

    @staticmethod
    def _part(text: str, logprobs: list[Any] | None) -> dict[str, Any]:
        return {"annotations": [], "text": text, "type": "output_text", "logprobs": logprobs}


def body(response: Response) -> bytes:
    """The unary answer."""
    return orjson.dumps(response.snapshot(done=True))


def events(response: Response) -> Iterator[Event]:
    """The events of a streamed response, with their terminator ``response.completed``.

    vLLM sends ``response.completed`` for a response that ran into its length limit too, with status ``incomplete``.
    """
    where = {"item_id": response.message_id, "output_index": 0}
    number = 0

    def event(kind: str, members: dict[str, Any]) -> bytes:
        nonlocal number
        data = orjson.dumps({**members, "sequence_number": number, "type": kind})
        number += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), data)

    yield 0, event("response.created", {"response": response.snapshot(done=False)})
    yield 0, event("response.in_progress", {"response": response.snapshot(done=False)})
    item = response._item("in_progress", [])
    yield 0, event("response.output_item.added", {"item": item, "output_index": 0})
    yield 0, event("response.content_part.added", {"content_index": 0, **where, "part": response._part("", [])})
    form = (
        b'event: response.output_text.delta\ndata: {"content_index":0,"delta":%b,"item_id":%b,"logprobs":[],'
        b'"output_index":0,"sequence_number":%d,"type":"response.output_text.delta"}\n\n'
    )
    for token in response.plan.tokens:
        yield 1, form % (quoted(token), quoted(response.message_id), number)
        number += 1
    text = response.plan.text()
    spoken = {"content_index": 0, "item_id": response.message_id, "logprobs": [], "output_index": 0}
    done = {"sequence_number": number, "text": text, "type": "response.output_text.done"}
    number += 1
    yield 0, b"event: response.output_text.done\ndata: %b\n\n" % orjson.dumps({**spoken, **done})
    part = response._part(text, None)
    yield 0, event("response.content_part.done", {"content_index": 0, **where, "part": part})
    yield 0, event("response.output_item.done", {"item": response._item("completed", [part]), "output_index": 0})
    yield 0, event("response.completed", {"response": response.snapshot(done=True)})


def failed(response: Response, error: dict[str, Any]) -> bytes:
    """The event that ends a failed stream."""
    members = {"response": {**response.snapshot(done=False, status="failed"), "error": error}}
    data = orjson.dumps({**members, "sequence_number": 4, "type": "response.failed"})
    return b"event: response.failed\ndata: %b\n\n" % data
