"""vLLM's ``/v1/chat/completions`` and ``/v1/completions`` objects, with their members in vLLM's order.

Frames of a stream are the hot path of the simulator: they are joined from bytes that are encoded once per answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import orjson

from ascproxy.sim.answer import Event
from ascproxy.sim.text import Plan, Vocabulary, quoted

FINGERPRINT = "vllm-0.32.0-ea1d92a1"
DONE = b"data: [DONE]\n\n"

# Frames without their constant head: choice, delta, logprobs, token ids, usage, fingerprint.
CHAT_FRAME = b'%b{"index":%d,"delta":{"content":%b},"logprobs":%b,"finish_reason":null,"token_ids":%b}]%b}\n\n'
LAST_CHAT_FRAME = (
    b'%b{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":"%b","stop_reason":null,"token_ids":%b}]%b%b}\n\n'
)
TOOL_FRAME = (
    b'%b{"index":0,"delta":{"content":null,"tool_calls":[%b]},"logprobs":null,"finish_reason":null,"token_ids":null}]'
    b"%b}\n\n"
)
TEXT_FRAME = (
    b'%b{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b,"stop_reason":null,"prompt_token_ids":null,'
    b'"token_ids":%b}]%b}\n\n'
)
RUNNING_USAGE = (
    b',"usage":{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d,"completion_tokens_details":null}'
)

LOGPROB = -6.931467533111572  # a uniform choice among 1,024


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool call that the answer makes: its plan's text is the arguments."""

    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer of either operation, ready to be said as one body or as frames."""

    id: str
    created: int
    model: str
    prompt_tokens: int
    plans: Sequence[Plan]
    vocabulary: Vocabulary
    tool: Tool | None = None
    logprobs: int | None = None  # how many alternatives per token; None: no logprobs
    token_ids: bool = False
    prompt_ids: Sequence[int] = ()
    include_usage: bool = False
    continuous_usage: bool = False

    @property
    def tokens(self) -> int:
        """Completion tokens of all choices."""
        return sum(len(plan.tokens) for plan in self.plans)

    def usage(self, details: dict[str, Any]) -> dict[str, Any]:
        """The usage object of a unary answer; the operations differ in the cache details."""
        made = self.tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + made,
            "completion_tokens": made,
            "prompt_tokens_details": details,
            "completion_tokens_details": None,
        }


# -- chat


def chat_body(answer: Completion) -> bytes:
    """The unary answer of ``/v1/chat/completions``."""
    return orjson.dumps(
        {
            "id": answer.id,
            "object": "chat.completion",
            "created": answer.created,
            "model": answer.model,
            "choices": [_chat_choice(answer, i, plan) for i, plan in enumerate(answer.plans)],
            "service_tier": None,
            "system_fingerprint": FINGERPRINT,
            "usage": answer.usage({"cached_tokens": 0, "created_cache_tokens": 0, "multimodal_tokens": None}),
            "prompt_logprobs": None,
            "prompt_token_ids": list(answer.prompt_ids) if answer.token_ids else None,
            "prompt_text": None,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }
    )


def _chat_choice(answer: Completion, index: int, plan: Plan) -> dict[str, Any]:
    text = plan.text()
    message: dict[str, Any] = {
        "role": "assistant",
        "content": text if answer.tool is None else "",
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
    }
    if answer.tool is not None:
        call = {"name": answer.tool.name, "arguments": text}
        message["tool_calls"] = [{"id": answer.tool.id, "type": "function", "function": call}]
    message["reasoning"] = None
    logprobs = None
    if answer.logprobs is not None:
        logprobs = {"content": [_logprob(token, answer.logprobs) for token in plan.tokens]}
    return {
        "index": index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": plan.finish,
        "stop_reason": None,
        "token_ids": answer.vocabulary.encode(text) if answer.token_ids else None,
        "routed_experts": None,
    }


def _logprob(token: str, top: int) -> dict[str, Any]:
    chosen = {"token": token, "logprob": LOGPROB, "bytes": list(token.encode())}
    return {**chosen, "top_logprobs": [chosen] * top}


def chat_frames(answer: Completion) -> Iterator[Event]:
    """The events of a streamed chat, without the terminator."""
    head = _frame_head(answer, "chat.completion.chunk")
    for index in range(len(answer.plans)):
        role = b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}' % index
        prompt_ids = orjson.dumps(list(answer.prompt_ids)) if answer.token_ids else b"null"
        tail = b',"prompt_token_ids":' + prompt_ids + b',"prompt_text":null'
        yield 0, b"%b%b]%b%b}\n\n" % (head, role, _running_usage(answer, 0), tail)
    if answer.tool is None:
        yield from _text_frames(answer, head)
    else:
        yield from _tool_frames(answer, answer.tool, head)
    if answer.include_usage:
        yield 0, _usage_frame(answer, head, {"cached_tokens": 0, "created_cache_tokens": 0})


def _text_frames(answer: Completion, head: bytes) -> Iterator[Event]:
    end = b"" if answer.include_usage else b',"system_fingerprint":"%b"' % FINGERPRINT.encode()
    for index, made, token, finish in _interleaved(answer.plans):
        usage = _running_usage(answer, made) if answer.continuous_usage else b""
        logprobs = b"null"
        if answer.logprobs is not None:
            logprobs = orjson.dumps({"content": [_logprob(token, answer.logprobs)]})
        ids = orjson.dumps(answer.vocabulary.encode(token)) if answer.token_ids else b"null"
        said = quoted(token)
        if finish is None or finish == "abort":
            yield 1, CHAT_FRAME % (head, index, said, logprobs, ids, usage)
        else:
            delta = b'{"content":%b}' % said
            yield 1, LAST_CHAT_FRAME % (head, index, delta, logprobs, finish.encode(), ids, usage, end)
        if finish == "abort":  # an aborted choice ends with a frame of its own
            yield 0, LAST_CHAT_FRAME % (head, index, b'{"content":""}', b"null", b"abort", b"null", usage, end)


def _tool_frames(answer: Completion, tool: Tool, head: bytes) -> Iterator[Event]:
    end = b"" if answer.include_usage else b',"system_fingerprint":"%b"' % FINGERPRINT.encode()
    opening = b'{"id":%b,"type":"function","index":0,"function":{"name":%b}}' % (quoted(tool.id), quoted(tool.name))
    plan = answer.plans[0]
    yield 0, TOOL_FRAME % (head, opening, _running_usage(answer, 0))
    for made, token in enumerate(plan.tokens, 1):
        call = b'{"index":0,"function":{"arguments":%b}}' % quoted(token)
        yield 1, TOOL_FRAME % (head, call, _running_usage(answer, made))
    usage = _running_usage(answer, answer.tokens)
    yield 0, LAST_CHAT_FRAME % (head, 0, b"{}", b"null", plan.finish.encode(), b"null", usage, end)


# -- completions


def text_body(answer: Completion, echo: Sequence[str]) -> bytes:
    """The unary answer of ``/v1/completions``; ``echo`` is the prompt before each choice's text."""
    return orjson.dumps(
        {
            "id": answer.id,
            "object": "text_completion",
            "created": answer.created,
            "model": answer.model,
            "choices": [
                {
                    "index": index,
                    "text": echo[index] + plan.text(),
                    "logprobs": _text_logprobs(echo[index], plan, answer.logprobs)
                    if answer.logprobs is not None
                    else None,
                    "finish_reason": plan.finish,
                    "stop_reason": None,
                    "token_ids": answer.vocabulary.encode(plan.text()) if answer.token_ids else None,
                    "prompt_logprobs": None,
                    "prompt_token_ids": None,
                    "routed_experts": None,
                }
                for index, plan in enumerate(answer.plans)
            ],
            "service_tier": None,
            "system_fingerprint": FINGERPRINT,
            "usage": answer.usage({"cached_tokens": 0, "created_cache_tokens": None, "multimodal_tokens": None}),
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }
    )


def _text_logprobs(echo: str, plan: Plan, top: int) -> dict[str, Any]:
    tokens = [echo, *plan.tokens] if echo else list(plan.tokens)
    offsets = [0]
    for token in tokens[:-1]:
        offsets.append(offsets[-1] + len(token))
    return {
        "text_offset": offsets[: len(tokens)],
        "token_logprobs": [LOGPROB] * len(tokens),
        "tokens": tokens,
        "top_logprobs": [{token: LOGPROB} if top else None for token in tokens],
    }


def text_frames(answer: Completion, echo: Sequence[str]) -> Iterator[Event]:
    """The events of a streamed completion, without the terminator."""
    head = _frame_head(answer, "text_completion")
    begun: set[int] = set()
    for index, made, token, finish in _interleaved(answer.plans):
        before = echo[index] if index not in begun else ""
        begun.add(index)
        logprobs = b"null"
        if answer.logprobs is not None:
            logprobs = orjson.dumps(_text_logprobs(before, Plan((token,), ""), answer.logprobs))
        ids = orjson.dumps(answer.vocabulary.encode(token)) if answer.token_ids else b"null"
        end = quoted(finish) if finish is not None else b"null"
        yield 1, TEXT_FRAME % (head, index, quoted(before + token), logprobs, end, ids, _running_usage(answer, made))
    if answer.include_usage:
        yield 0, _usage_frame(answer, head, {"cached_tokens": 0})


# -- shared


def _frame_head(answer: Completion, kind: str) -> bytes:
    return b'data: {"id":%b,"object":"%b","created":%d,"model":%b,"choices":[' % (
        quoted(answer.id), kind.encode(), answer.created, quoted(answer.model),
    )  # fmt: skip


def _running_usage(answer: Completion, made: int) -> bytes:
    if not answer.continuous_usage:
        return b""
    return RUNNING_USAGE % (answer.prompt_tokens, answer.prompt_tokens + made, made)


def _usage_frame(answer: Completion, head: bytes, details: dict[str, int]) -> bytes:
    made = answer.tokens
    usage = {
        "prompt_tokens": answer.prompt_tokens,
        "total_tokens": answer.prompt_tokens + made,
        "completion_tokens": made,
        "prompt_tokens_details": details,
    }
    return b'%b],"usage":%b,"system_fingerprint":"%b"}\n\n' % (head, orjson.dumps(usage), FINGERPRINT.encode())


def _interleaved(plans: Sequence[Plan]) -> Iterator[tuple[int, int, str, str | None]]:
    """(choice, tokens of that choice so far, token, finish reason on a choice's last token); the choices take turns.

    The count is per choice because vLLM's continuous usage is.
    """
    if len(plans) == 1:
        plan = plans[0]
        last = len(plan.tokens)
        for made, token in enumerate(plan.tokens, 1):
            yield 0, made, token, plan.finish if made == last else None
        return
    for made, row in enumerate(zip_longest(*(plan.tokens for plan in plans)), 1):
        for index, said in enumerate(row):
            if said is not None:
                plan = plans[index]
                yield index, made, said, plan.finish if made == len(plan.tokens) else None
