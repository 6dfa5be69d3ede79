"""Model servers that fail, one failure at a time, and what each leaves behind: through the real service.

For every failure of the simulator, unary and streaming: what the client sees, how often the server was asked, whether
the next target answers instead (SEMANTICS 3: after a definite failure, never after an ambiguous one), and that the next
request is clean on the client's connection and on whatever connection to the server is used for it.
"""

from __future__ import annotations

import http.client
import json
import socket
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from tests.kit.rig import free_port
from tests.kit.service import Service, Simulator, wait_for

PATH = "/v1/chat/completions"


@dataclass(frozen=True)
class Seen:
    """What a client gets. ``code`` is ours, "" when the answer is the server's own; ``whole`` as framing says.

    ``asked``: how often the first server saw the request, where a connection to it waits. ``next``: the next target
    answers, where there is one. ``anyway``: the same where the route says ``retry_ambiguous``.
    """

    status: int
    code: str = ""
    whole: bool = True
    asked: int = 1
    next: bool = False
    anyway: bool = False


DEFINITE = {"next": True, "anyway": True}
BUSY = Seen(503, **DEFINITE)
ERROR = Seen(500, **DEFINITE)
CREDENTIAL = Seen(502, "upstream_credential", **DEFINITE)
LIMITED = Seen(429, **DEFINITE)
# A connection that had waited and was closed before a byte came back: once more on a new one, but never elsewhere.
CLOSED = Seen(502, "upstream_unreachable", asked=2, anyway=True)
TIMEOUT = Seen(504, "upstream_timeout", anyway=True)
MALFORMED = Seen(502, "upstream_malformed")
GOOD = Seen(200)
BROKEN = Seen(200, whole=False)

# failure: (unary, stream)
FAILURES: dict[str, tuple[Seen, Seen]] = {
    "busy": (BUSY, BUSY),
    "error": (ERROR, ERROR),
    "unauthorized": (CREDENTIAL, CREDENTIAL),
    "rate-limited:7": (LIMITED, LIMITED),
    "reset": (CLOSED, CLOSED),
    "reset:3": (BROKEN, BROKEN),
    "hang": (TIMEOUT, TIMEOUT),
    "slow-first-byte:0.1": (GOOD, GOOD),
    "stall:3": (BROKEN, BROKEN),
    "comments:3": (BROKEN, BROKEN),
    "truncate:3": (BROKEN, BROKEN),
    "malformed": (MALFORMED, MALFORMED),
    "bad-chunk": (BROKEN, BROKEN),
    "extra-bytes": (GOOD, GOOD),
    "extra-bytes:70000": (GOOD, GOOD),
    "headers:2000": (GOOD, GOOD),
    "headers:65536": (MALFORMED, MALFORMED),
    "1xx:3": (GOOD, GOOD),
    "1xx:1000": (MALFORMED, MALFORMED),
    "abort": (GOOD, GOOD),
    "error-frame:3": (ERROR, GOOD),
}
CASES = [pytest.param(f, s, id=f"{f}-{'stream' if s else 'unary'}") for f in FAILURES for s in (False, True)]


class Place:
    """A service before two simulators. Models: ``alone`` has one target, ``pair`` two, ``again`` two and
    ``retry_ambiguous``, ``lost`` one that is not there, ``found`` the same and a second one that is."""

    def __init__(self, stack: ExitStack, folder: Any) -> None:
        models = [arg for name in ("pair", "again") for arg in ("--model", name)]
        self.first = stack.enter_context(Simulator("--rate", "0", *models, model="alone"))
        self.spare = stack.enter_context(Simulator("--rate", "0", model="spare"))
        bound = stack.enter_context(socket.socket())  # and never listening: every connection is refused
        bound.bind(("127.0.0.1", free_port()))
        self.gone = f"http://127.0.0.1:{bound.getsockname()[1]}"
        self.service = stack.enter_context(
            Service(folder / "d", upstream=self.first.url, models=["alone"], resources=self.resources)
        )

    def resources(self, document: dict[str, Any]) -> None:
        timeouts = {"connect": "1s", "first_byte": "500ms", "between_tokens": "500ms"}
        urls = {"first": self.first.url, "spare": self.spare.url, "gone": self.gone}
        document["providers"] = {
            name: {"type": "vllm", "endpoints": [url], "timeouts": timeouts} for name, url in urls.items()
        }
        first, gone, spare = {"provider": "first"}, {"provider": "gone"}, {"provider": "spare", "model": "spare"}
        document["routes"] = {
            "alone": {"models": ["alone", "alone!*"], "targets": [first]},
            "pair": {"models": ["pair!*"], "targets": [first, spare]},
            "again": {"models": ["again!*"], "targets": [first, spare], "retry_ambiguous": True},
            "lost": {"models": ["lost"], "targets": [gone]},
            "found": {"models": ["found"], "targets": [gone, spare]},
        }

    def client(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.service.http_port, timeout=10)

    def ask(self, client: http.client.HTTPConnection, model: str, *, stream: bool = False) -> Got:
        marker = uuid.uuid4().hex
        body = {"model": model, "messages": [{"role": "user", "content": "x"}], "user": marker, "stream": stream}
        client.request(
            "POST",
            PATH,
            json.dumps(body),
            {"authorization": f"Bearer {self.service.key}", "content-type": "application/json"},
        )
        answer = client.getresponse()
        whole = True
        try:
            data = answer.read()
        except http.client.IncompleteRead as error:
            data, whole = error.partial, False
        except ConnectionResetError:
            data, whole = b"", False
        if answer.status == 200 and whole:
            assert marker in text(data, stream), data
        fields = {name.lower(): value for name, value in answer.getheaders()}
        return Got(answer.status, fields, data, whole)


@dataclass(frozen=True)
class Got:
    status: int
    fields: dict[str, str]
    body: bytes
    whole: bool

    @property
    def code(self) -> str:
        return self.fields.get("x-ascproxy-error", "")


def text(body: bytes, stream: bool) -> str:
    """All content of an answer of chat completions."""
    if not stream:
        return str(json.loads(body)["choices"][0]["message"]["content"])
    events = [json.loads(e[6:]) for e in body.decode().split("\n\n") if e.startswith("data: {")]
    return "".join(e["choices"][0]["delta"].get("content") or "" for e in events if e.get("choices"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(stack, tmp_path_factory.mktemp("upstreams"))


@pytest.mark.parametrize(("failure", "stream"), CASES)
def test_what_the_client_sees(place: Place, failure: str, stream: bool) -> None:
    expected = FAILURES[failure][stream]
    client = place.client()
    assert place.ask(client, "alone").status == 200  # and its connection to the server waits
    before = place.first.stats()
    got = place.ask(client, f"alone!{failure}", stream=stream)
    assert (got.status, got.code, got.whole) == (expected.status, expected.code, expected.whole), got
    assert place.first.stats()["requests"] - before["requests"] == expected.asked
    if failure.startswith("rate-limited"):
        assert got.fields["retry-after"] == "7"
    if not expected.whole:
        assert client.sock is None or client.sock.recv(1) == b""  # cut, and not usable again
        client.close()
    else:
        assert "connection" not in got.fields
    for streamed in (False, True):
        assert place.ask(client, "alone", stream=streamed).status == 200
    after = place.first.stats()
    assert after["malformed"] == after["incomplete"] == 0
    wait_for(lambda: place.first.stats()["running"] == 0, "nothing is generated for nobody")
    client.close()


@pytest.mark.parametrize("model", ["pair", "again"])
@pytest.mark.parametrize(("failure", "stream"), CASES)
def test_who_answers_where_there_is_a_second_target(place: Place, failure: str, stream: bool, model: str) -> None:
    expected = FAILURES[failure][stream]
    goes_on = expected.anyway if model == "again" else expected.next
    client = place.client()
    assert place.ask(client, "alone").status == 200
    before = place.spare.stats()["requests"]
    got = place.ask(client, f"{model}!{failure}", stream=stream)
    assert place.spare.stats()["requests"] - before == goes_on
    if goes_on:
        assert (got.status, got.code, got.whole) == (200, "", True)
        assert b'"model":"spare"' in got.body
    else:
        assert (got.status, got.code, got.whole) == (expected.status, expected.code, expected.whole)
    client.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_is_not_there(place: Place, stream: bool) -> None:
    client = place.client()
    lost = place.ask(client, "lost", stream=stream)
    assert (lost.status, lost.code) == (502, "upstream_unreachable")
    assert place.gone.rsplit(":", 1)[1] not in lost.body.decode()  # where servers are is no business of callers
    found = place.ask(client, "found", stream=stream)
    assert (found.status, found.code) == (200, "")
    assert b'"model":"spare"' in found.body
    client.close()


def test_a_surprise_is_the_end_of_that_connection_only(place: Place) -> None:
    """After bytes too many, the connection to the server is not used again; a good one is."""
    client = place.client()
    assert place.ask(client, "alone").status == 200
    before = place.first.stats()["connections"]
    assert place.ask(client, "alone").status == 200
    assert place.first.stats()["connections"] == before
    assert place.ask(client, "alone!extra-bytes").status == 200
    assert place.ask(client, "alone").status == 200
    assert place.first.stats()["connections"] == before + 1
    client.close()
