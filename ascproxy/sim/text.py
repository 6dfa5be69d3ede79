"""Text and tokens of a model that is not there: deterministic words, reversible token ids, real counts.

A token is a word with the space before it, a run of punctuation, or a run of white space. That is no model's
vocabulary, but counts behave as counts do: they grow with the text, agree between usage, ``/tokenize`` and
``count_tokens``, and ``/detokenize`` undoes ``/tokenize``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import orjson

PIECE = re.compile(r" ?\w+| ?[^\w\s]+|\s+")
WORDS = tuple(PIECE.findall(" The gateway relays every token in the order it came, and adds none of its own."))
FIRST_LEARNED = 256
MAX_LEARNED = 65536
MESSAGE_OVERHEAD = 4  # tokens of a chat template around one message
REPLY_OVERHEAD = 3  # tokens that open the reply


def pieces(text: str) -> list[str]:
    """``text`` cut into tokens; joined they are ``text`` again."""
    return PIECE.findall(text)


def count(text: str) -> int:
    """How many tokens ``text`` has."""
    return len(PIECE.findall(text))


def content_text(content: object) -> str:
    """The text of a message's content: a string, or a list of parts of which those with text count."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return " ".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return ""


def conversation_tokens(messages: Sequence[object], system: object = None) -> int:
    """Prompt tokens of a conversation, template included."""
    texts = [content_text(m.get("content")) for m in messages if isinstance(m, dict)]
    if system:
        texts.append(content_text(system))
    return sum(count(text) + MESSAGE_OVERHEAD for text in texts) + REPLY_OVERHEAD


class Vocabulary:
    """Token ids. 0-255 are bytes; pieces of text get the next id when first seen, until the table is full.

    Written by the one server that owns it.
    """

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._pieces: list[str] = []

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``."""
        ids: list[int] = []
        for piece in pieces(text):
            known = self._ids.get(piece)
            if known is None and len(self._pieces) < MAX_LEARNED:
                known = self._ids[piece] = FIRST_LEARNED + len(self._pieces)
                self._pieces.append(piece)
            if known is None:
                ids.extend(piece.encode())
            else:
                ids.append(known)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``. Ids that were never handed out become U+FFFD."""
        out = bytearray()
        for token in ids:
            if 0 <= token < FIRST_LEARNED:
                out.append(token)
            elif 0 <= token - FIRST_LEARNED < len(self._pieces):
                out += self._pieces[token - FIRST_LEARNED].encode()
            else:
                out += "\ufffd".encode()
        return out.decode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class Plan:
    """What one choice is going to say, token by token, and why it ends: stop, length, abort or tool_calls."""

    tokens: Sequence[str]
    finish: str

    def text(self) -> str:
        """The whole text."""
        return "".join(self.tokens)


def speech(length: int, limit: int | None, *, marker: str | None, ignore_eos: bool, turn: int = 0) -> Plan:
    """An answer of ``length`` tokens, cut to ``limit``; ``ignore_eos`` talks on until ``limit``.

    It begins with ``marker`` as its first token, so that a test can tell whose answer it got; ``turn`` starts elsewhere
    in the sentence, so that the choices of one request differ.
    """
    wanted = limit if ignore_eos and limit is not None else min(length, limit if limit is not None else length)
    words = islice(cycle(WORDS), turn, turn + wanted)
    said = list(words)
    if marker and said:
        said[0] = marker
    return Plan(said, "length" if limit is not None and wanted >= limit else "stop")


def recital(text: str, finish: str, limit: int | None) -> Plan:
    """A given text as an answer, cut to ``limit`` tokens."""
    said = pieces(text)
    if limit is not None and len(said) > limit:
        return Plan(said[:limit], "length")
    return Plan(said, finish)


def aborted(plan: Plan) -> Plan:
    """The first half of ``plan``, ended as vLLM ends it when it is being stopped."""
    return Plan(plan.tokens[: max(1, len(plan.tokens) // 2)], "abort")


def instance(schema: object, marker: str | None = None, depth: int = 0) -> Any:
    """The smallest value that fits a JSON schema; strings carry ``marker``. Deep or odd schemas end in null."""
    if not isinstance(schema, dict) or depth > 16:
        return None
    if "const" in schema:
        return schema["const"]
    choices = schema.get("enum") or None
    if isinstance(choices, list):
        return choices[0]
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(schema.get(key), list) and schema[key]:
            return instance(schema[key][0], marker, depth + 1)
    kind = schema.get("type", "object" if "properties" in schema else None)
    if isinstance(kind, list):
        kind = kind[0] if kind else None
    match kind:
        case "object":
            properties = schema.get("properties")
            known = properties if isinstance(properties, dict) else {}
            required = schema.get("required")
            names = required if isinstance(required, list) else list(known)
            return {name: instance(known.get(name), marker, depth + 1) for name in names if isinstance(name, str)}
        case "array":
            return [instance(schema.get("items"), marker, depth + 1)] * int(schema.get("minItems", 1))
        case "string":
            return marker or "sim"
        case "integer" | "number":
            return schema.get("minimum", 0)
        case "boolean":
            return False
    return None


def quoted(text: str) -> bytes:
    """``text`` as a JSON string."""
    return orjson.dumps(text)
