"""Model servers that fail: the dialects in which a caller sees it, a service to see it through, and how to look.

What is seen is in :mod:`tests.kit.failure_table`. Nothing here knows what is right.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trustme

from tests.kit.rig import free_port
from tests.kit.service import Service, Simulator

Event = tuple[str, Any]  # its name, "" without one; its data as JSON, or the text where it is none
OURS = "What came before is not the whole answer"  # in every event that the gateway ends a stream with
QUIET = "150ms"  # how long a server may be silent where silence is the failure; its comments come each 100 ms


CODES = {code: code for code in ("truncated", "upstream_timeout", "upstream_aborted")}
TYPES = {"truncated": "api_error", "upstream_timeout": "timeout_error", "upstream_aborted": "api_error"}


@dataclass(frozen=True, eq=False)
class Dialect:
    """One wire. ``before`` and ``after``: how many events of the simulator hold no content, and some content.

    ``refuses``: whether an answer is a refusal with that code, as the dialect has them.
    ``tells``: what an event of ours says of each way to end, our code or the dialect's type; empty where there is none.
    """

    name: str
    type: str
    unary_path: str
    stream_path: str
    before: int
    after: int
    body: Callable[[str], dict[str, Any]]
    said: Callable[[Any], str]
    delta: Callable[[Event], str]
    terminates: Callable[[Event], bool]
    error: Callable[[Event], dict[str, Any] | None]
    refuses: Callable[[Any, str], bool]
    tells: Mapping[str, str]


def _words(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _openai_error(event: Event) -> dict[str, Any] | None:
    return event[1].get("error") if isinstance(event[1], dict) else None


def _openai_refusal(answer: Any, code: str) -> bool:
    return bool(answer["error"]["code"] == code and answer["error"]["type"] == "server_error")


def _choice(event: Event) -> dict[str, Any]:
    choices = event[1].get("choices") if isinstance(event[1], dict) else None
    return choices[0] if choices else {}


CHAT = Dialect(
    "chat",
    "vllm",
    "/v1/chat/completions",
    "/v1/chat/completions",
    before=1,  # the role
    after=3,
    body=lambda marker: {"messages": _words("x"), "user": marker},
    said=lambda answer: answer["choices"][0]["message"]["content"],
    delta=lambda event: _choice(event).get("delta", {}).get("content") or "",
    terminates=lambda event: event[1] == "[DONE]",
    error=_openai_error,
    refuses=_openai_refusal,
    tells=CODES,
)
COMPLETIONS = Dialect(
    "completions",
    "vllm",
    "/v1/completions",
    "/v1/completions",
    before=0,
    after=2,
    body=lambda marker: {"prompt": "x", "user": marker},
    said=lambda answer: answer["choices"][0]["text"],
    delta=lambda event: _choice(event).get("text") or "",
    terminates=lambda event: event[1] == "[DONE]",
    error=_openai_error,
    refuses=_openai_refusal,
    tells=CODES,
)
RESPONSES = Dialect(
    "responses",
    "vllm",
    "/v1/responses",
    "/v1/responses",
    before=4,  # created, in_progress, output_item.added, content_part.added
    after=6,
    body=lambda marker: {"input": "x", "user": marker},
    said=lambda answer: answer["output"][0]["content"][0]["text"],
    delta=lambda event: event[1]["delta"] if event[0] == "response.output_text.delta" else "",
    terminates=lambda event: event[0] in ("response.completed", "response.incomplete"),
    error=lambda event: event[1]["response"]["error"] if event[0] == "response.failed" else None,
    refuses=_openai_refusal,
    tells=CODES,
)
MESSAGES = Dialect(
    "messages",
    "vllm",
    "/v1/messages",
    "/v1/messages",
    before=2,  # message_start, content_block_start
    after=4,
    body=lambda marker: {"messages": _words("x"), "max_tokens": 64, "metadata": {"user_id": marker}},
    said=lambda answer: answer["content"][0]["text"],
    delta=lambda event: event[1]["delta"]["text"] if event[0] == "content_block_delta" else "",
    terminates=lambda event: event[0] == "message_stop",
    error=lambda event: event[1]["error"] if event[0] == "error" else None,
    refuses=lambda answer, _: answer["type"] == "error" and answer["error"]["type"] in ("api_error", "timeout_error"),
    tells=TYPES,
)
TGI = Dialect(
    "tgi",
    "tgi",
    "/generate",
    "/generate_stream",
    before=0,
    after=2,
    body=lambda marker: {"inputs": "x", "user": marker},
    said=lambda answer: answer["generated_text"],
    delta=lambda event: event[1].get("token", {}).get("text", ""),
    terminates=lambda event: bool(event[1].get("generated_text")),
    error=lambda event: {"message": event[1]["error"], **event[1]} if event[1].get("error") else None,
    refuses=lambda answer, code: isinstance(answer["error"], str) and answer["error_type"] == code,
    tells={},
)
DIALECTS = (CHAT, COMPLETIONS, RESPONSES, MESSAGES, TGI)


def events(body: bytes) -> list[Event]:
    """The events of a stream that ends where an event ends."""
    blocks = body.decode().split("\n\n")
    assert blocks.pop() == "", body  # whatever breaks off, no event is cut
    found = []
    for block in blocks:
        lines = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if lines:
            data = lines["data"]
            found.append((lines.get("event", ""), json.loads(data) if data.startswith("{") else data))
    return found


@dataclass(frozen=True)
class Got:
    """An answer as it came. ``whole`` as framing says, ``kept``: the client's connection was left open."""

    dialect: Dialect
    marker: str
    status: int
    fields: dict[str, str]
    body: bytes
    whole: bool
    kept: bool

    @property
    def code(self) -> str:
        """Of our own refusal; "" when the answer is the server's."""
        return self.fields.get("x-ascproxy-error", "")

    @property
    def streamed(self) -> bool:
        return self.fields.get("content-type", "").startswith("text/event-stream")

    @property
    def events(self) -> list[Event]:
        return events(self.body) if self.streamed else []

    @property
    def terminated(self) -> bool:
        return any(map(self.dialect.terminates, self.events))

    @property
    def error(self) -> str:
        """What the error event says: our code (our type where the dialect has no code), "theirs", "" without one."""
        found = [e for event in self.events if (e := self.dialect.error(event)) is not None]
        if not found:
            return ""
        (error,) = found
        assert self.dialect.error(self.events[-1]) is not None, "nothing follows an error"
        if OURS not in error["message"]:
            return "theirs"
        if self.dialect is RESPONSES:  # its events are numbered
            assert self.events[-1][1]["sequence_number"] == len(self.events) - 1
        return str(error.get("code") or error["type"])

    @property
    def good(self) -> bool:
        """The whole answer to this very request, and nothing else."""
        if self.status != 200 or not self.whole or self.error:
            return False
        if self.streamed:
            said = "".join(map(self.dialect.delta, self.events))
            return self.terminated and self.marker in said and self.dialect.terminates(self.events[-1])
        return self.marker in self.dialect.said(json.loads(self.body))


class Place:
    """A service before model servers that fail. A model's name says who serves it, see :meth:`resources`."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        endings = ("", "-pair", "-again")
        names = [arg for p in ("first", "hung", "stalled") for e in endings for arg in ("--model", f"vllm-{p}{e}")]
        authority = trustme.CA()
        served = authority.issue_cert("127.0.0.1")
        chain, key = folder / "chain.pem", folder / "key.pem"
        served.cert_chain_pems[0].write_to_path(os.fspath(chain))
        served.private_key_pem.write_to_path(os.fspath(key))
        start = stack.enter_context
        self.first = {
            "vllm": start(Simulator("--rate", "0", *names, model="other")),
            "tgi": start(Simulator("--rate", "0", "--type", "tgi", model="other")),
        }
        self.spare = {
            "vllm": start(Simulator("--rate", "0", model="spare")),
            "tgi": start(Simulator("--rate", "0", "--type", "tgi", model="spare")),
        }
        locked = start(Simulator("--tls-certificate", os.fspath(chain), "--tls-key", os.fspath(key)))
        bound = start(socket.socket())  # and never listening: every connection is refused
        bound.bind(("127.0.0.1", free_port()))
        self.hidden = {"refuse": bound.getsockname()[1], "tls": locked.port}
        self.service = start(
            Service(folder / "d", upstream=self.first["vllm"].url, models=["other"], resources=self.resources)
        )

    def resources(self, document: dict[str, Any]) -> None:
        """Models TYPE-PROVIDER with one target; with ``-pair`` the spare is the second one; with ``-again`` too, and
        the route says ``retry_ambiguous``."""
        document["providers"], document["routes"] = {}, {}
        for type_, first in self.first.items():
            patience = {"connect": "5s", "tls": "5s", "first_byte": "10s", "between_tokens": "10s"}
            refuse, tls = f"http://127.0.0.1:{self.hidden['refuse']}", f"https://127.0.0.1:{self.hidden['tls']}"
            endpoints: dict[str, tuple[str, dict[str, str]]] = {
                "first": (first.url, {}),
                "hung": (first.url, {"first_byte": QUIET}),
                "stalled": (first.url, {"between_tokens": QUIET}),
                "refuse": (refuse, {}),
                "tls": (tls, {}),
                "spare": (self.spare[type_].url, {}),
            }
            for name, (url, timeouts) in endpoints.items():
                me = f"{type_}-{name}"
                document["providers"][me] = {"type": type_, "endpoints": [url], "timeouts": patience | timeouts}
                alone, two = [{"provider": me}], [{"provider": me}, {"provider": f"{type_}-spare", "model": "spare"}]
                document["routes"] |= {
                    me: {"models": [me, f"{me}!*"], "targets": alone},
                    f"{me}-pair": {"models": [f"{me}-pair", f"{me}-pair!*"], "targets": two},
                    f"{me}-again": {
                        "models": [f"{me}-again", f"{me}-again!*"],
                        "targets": two,
                        "retry_ambiguous": True,
                    },
                }

    def client(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.service.http_port, timeout=20)

    def ask(self, client: http.client.HTTPConnection, dialect: Dialect, model: str, *, stream: bool = False) -> Got:
        """One request. The answer's text holds a word of its own, so that nobody gets another's."""
        marker = uuid.uuid4().hex
        body = {"model": f"{dialect.type}-{model}", **dialect.body(marker)}
        if dialect.unary_path == dialect.stream_path:
            body["stream"] = stream
        path = dialect.stream_path if stream else dialect.unary_path
        head = {"authorization": f"Bearer {self.service.key}", "content-type": "application/json"}
        client.request("POST", path, json.dumps(body), head)
        sock = client.sock
        answer = client.getresponse()
        whole = True
        try:
            data = answer.read()
        except http.client.IncompleteRead as error:
            data, whole = error.partial, False
        except ConnectionResetError:
            data, whole = b"", False
        fields = {name.lower(): value for name, value in answer.getheaders()}
        kept = whole and client.sock is sock and "connection" not in fields
        if not whole:
            assert sock.recv(1) == b""  # cut, and not usable again
            client.close()
        return Got(dialect, marker, answer.status, fields, data, whole, kept)
