"""Every code of the catalogue, reached through the real processes and looked at from the caller's side of a socket.

A case says how to reach a code, in which dialects that can be done, and whether the connection goes on afterwards. What
an answer must look like comes from the catalogue, so that a case holds nothing twice. A code without a case fails.
"""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from ascproxy.gateway.refusal import CATALOGUE, NAME_MAX
from ascproxy.store.env import open_store
from ascproxy.wire.operation import Dialect
from tests.kit import rig
from tests.kit.rig import Answer, free_port
from tests.kit.service import Service, Simulator, command, wait_for

PATHS = {Dialect.OPENAI: "/v1/chat/completions", Dialect.ANTHROPIC: "/v1/messages", Dialect.TGI: "/generate"}
ALL = tuple(PATHS)
PLAIN = (Dialect.OPENAI,)  # where the path is not known or is not one of an operation
MIB = 1 << 20


class Place:
    """A service with a listener as usual and a ``hasty`` one, before a simulator of each kind that fails when told to.

    Keys: the service's own, ``scoped`` for one model, and ``damaged``, whose row in the store cannot be read."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self.vllm = stack.enter_context(Simulator("--rate", "0", "--tokens", "2", model="m"))
        self.tgi = stack.enter_context(Simulator("--rate", "0", "--tokens", "2", "--type", "tgi", model="m"))
        bound = stack.enter_context(socket.socket())  # and never listening: every connection is refused
        bound.bind(("127.0.0.1", free_port()))
        self.gone = f"http://127.0.0.1:{bound.getsockname()[1]}"
        self.hasty_port = free_port()
        self.service = Service(
            folder / "d", upstream=self.vllm.url, models=["m"], node=self.node, resources=self.resources
        )
        self.key = self.service.key
        self.scoped = self.create_key("--model", "another")
        self.damaged = self.create_key()
        self.damage(self.damaged)
        stack.enter_context(self.service)

    def node(self, document: dict[str, Any]) -> None:
        document["listeners"].append(
            {"address": f"127.0.0.1:{self.hasty_port}", "name": "hasty", "limits": {"body_idle": "200ms"}}
        )
        document["limits"] = {"max_bodies": "2MiB"}

    def resources(self, document: dict[str, Any]) -> None:
        providers = {"vllm": ("vllm", self.vllm.url), "tgi": ("tgi", self.tgi.url)}
        providers |= {"gone": ("vllm", self.gone), "gone-tgi": ("tgi", self.gone)}
        document["providers"] = {
            name: {
                "type": kind,
                "endpoints": [url],
                "timeouts": {"first_byte": "300ms"},
                "request_headers": ["x-sim-fail"],
            }
            for name, (kind, url) in providers.items()
        }
        both = [{"provider": "vllm"}, {"provider": "tgi"}]
        document["routes"] = {
            "m": {"models": ["m"], "targets": [{"provider": "vllm"}]},
            "t": {"models": ["t"], "targets": [{"provider": "tgi", "model": "m"}]},
            "small": {"models": ["small"], "targets": both, "limits": {"max_body": "1KiB"}},
            "gone": {"models": ["gone"], "targets": [{"provider": "gone"}]},
            "gone-t": {"models": ["gone-t"], "targets": [{"provider": "gone-tgi"}]},
            "embed": {"models": ["embed"], "targets": both, "operations": ["embeddings"]},
        }

    def create_key(self, *more: str) -> str:
        tenant = str(self.service.facts["tenant"])
        done = command("key", "create", "--tenant", tenant, *more, "--config", str(self.service.folder), "--json")
        assert done.returncode == 0, done.stderr
        return str(json.loads(done.stdout)["api_key"])

    def damage(self, key: str) -> None:
        """Overwrite the row of a key, as a disk would that has forgotten it."""
        node = yaml.safe_load((self.service.folder / "ascproxy.yaml").read_text())
        env = open_store(self.service.folder / node.get("state_dir", "state"), write=True)
        table = env.open_db(b"keys")
        key_id = key.split("_")[1].encode()
        with env.begin(db=table, write=True) as txn:
            assert txn.get(key_id) is not None
            txn.put(key_id, b"\0" * 64)
        env.close()

    def line(self, request_id: str) -> dict[str, Any]:
        """The access line of a request."""

        def found() -> dict[str, Any] | None:
            for text in self.service.out.read_text(errors="replace").splitlines():
                if request_id in text and '"kind":"access"' in text:
                    line: dict[str, Any] = json.loads(text)
                    return line
            return None

        line = wait_for(found, f"an access line of {request_id}")
        assert isinstance(line, dict)
        return line

    def refusals(self, code: str) -> float:
        start = f'ascproxy_refusals_total{{code="{code}"}} '
        lines = [line for line in self.service.metrics().splitlines() if line.startswith(start)]
        return float(lines[0].split()[1]) if lines else 0.0


@dataclass(frozen=True)
class Case:
    """``request`` makes the bytes that lead to the code, for a dialect. ``kept``: the connection goes on.

    ``fields`` are parts of the answer's head besides what the catalogue says, ``limit`` what the access line names."""

    request: Callable[[Place, Dialect], bytes]
    kept: bool = True
    dialects: tuple[Dialect, ...] = ALL
    hasty: bool = False
    fields: tuple[tuple[str, str], ...] = ()
    limit: str | None = None


def head(
    place: Place, path: str, *fields: str, method: str = "POST", key: str | None = "", version: str = "HTTP/1.1"
) -> bytes:
    lines = [f"{method} {path} {version}", "host: gateway", *fields]
    if key is not None:
        lines.append(f"authorization: Bearer {key or place.key}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def post(
    place: Place,
    dialect: Dialect,
    body: bytes | None = None,
    *fields: str,
    model: str = "",
    query: str = "",
    **more: Any,
) -> bytes:
    """A whole request in a dialect, for ``model`` or the one that there is for it."""
    if body is None:
        model = model or ("t" if dialect is Dialect.TGI else "m")
        body = json.dumps({"model": model, "max_tokens": 2, "messages": [], "inputs": "x"}).encode()
    return head(place, PATHS[dialect] + query, f"content-length: {len(body)}", *fields, **more) + body


def failing(kind: str) -> Callable[[Place, Dialect], bytes]:
    return lambda place, dialect: post(place, dialect, None, f"x-sim-fail: {kind}")


def part(size: int, sent: int, **more: Any) -> Callable[[Place, Dialect], bytes]:
    """A head that announces ``size`` bytes of body, and ``sent`` of them."""
    return lambda place, dialect: head(place, PATHS[dialect], f"content-length: {size}", **more) + b" " * sent


def wrong(key: str) -> str:
    return key[:-1] + ("B" if key.endswith("A") else "A")


def small(place: Place, dialect: Dialect) -> bytes:
    body = {"model": "small", "max_tokens": 2, "messages": [], "inputs": "x" * 1_024}
    return post(place, dialect, json.dumps(body).encode())


CASES: dict[str, tuple[Case, ...]] = {
    "invalid_request": (
        Case(lambda p, d: post(p, d, b'{"model": 1}')),
        Case(lambda p, d: post(p, d, query="?a=b")),
        Case(lambda p, d: post(p, d, b'{"model": "m", "x": ' + b"[" * 70 + b"]" * 70 + b"}"), limit="json_depth"),
        Case(lambda p, d: head(p, PATHS[d], "content-length: 2", "content-length: 3"), kept=False, dialects=PLAIN),
    ),
    "invalid_json": (Case(lambda p, d: post(p, d, b'{"model": "m"')), Case(lambda p, d: post(p, d, b""))),
    "duplicate_field": (Case(lambda p, d: post(p, d, b'{"model": "m", "model": "m"}')),),
    "two_credentials": (Case(lambda p, d: post(p, d, None, f"x-api-key: {p.scoped}")),),
    "invalid_api_key": (
        Case(lambda p, d: post(p, d, key=None), fields=(("www-authenticate", "Bearer"),)),
        Case(lambda p, d: post(p, d, key=wrong(p.key)), fields=(("www-authenticate", "Bearer"),)),
        Case(part(65_537, 0, key=None), kept=False, limit="max_unauthenticated_body"),
    ),
    "model_not_allowed": (Case(lambda p, d: post(p, d, key=p.scoped)),),
    "model_not_found": (Case(lambda p, d: post(p, d, model="nobody")),),
    "unknown_path": (
        Case(lambda p, d: head(p, "/v1/chat/completions/"), dialects=PLAIN),
        Case(lambda p, d: head(p, "/v1/messages/x"), dialects=(Dialect.ANTHROPIC,)),
    ),
    "operation_not_supported": (Case(lambda p, d: post(p, d, model="embed")),),
    "method_not_allowed": (Case(lambda p, d: head(p, PATHS[d], method="GET"), fields=(("allow", "POST"),)),),
    "request_timeout": (Case(part(100, 50), kept=False, hasty=True, limit="body_idle"),),
    "body_too_large": (
        Case(small, limit="max_body"),
        Case(part(33 * MIB, 0), kept=False, limit="max_body"),
    ),
    "uri_too_long": (
        Case(lambda p, d: head(p, "/" + "a" * 9_000), kept=False, dialects=PLAIN, limit="max_request_line"),
    ),
    "headers_too_large": (
        Case(lambda p, d: post(p, d, b"", "x: " + "y" * 17_000), kept=False, dialects=PLAIN, limit="max_field"),
        Case(lambda p, d: post(p, d, b"", *["x: y"] * 100), kept=False, dialects=PLAIN, limit="max_fields"),
        Case(lambda p, d: post(p, d, b"", *["x: " + "y" * 9_000] * 4), kept=False, dialects=PLAIN, limit="max_head"),
    ),
    "internal_error": (Case(lambda p, d: post(p, d, key=p.damaged), kept=False),),
    "upstream_unreachable": (
        Case(lambda p, d: post(p, d, model="gone-t" if d is Dialect.TGI else "gone")),
        Case(failing("reset")),
    ),
    "upstream_malformed": (Case(failing("malformed")),),
    "upstream_credential": (Case(failing("unauthorized")),),
    "overloaded": (Case(part(3 * MIB, 2 * MIB + 1), kept=False, limit="max_bodies"),),
    "upstream_timeout": (Case(failing("hang"), limit="first_byte"),),
    "version_not_supported": (
        Case(lambda p, d: head(p, PATHS[d], version="HTTP/1.2"), kept=False, dialects=PLAIN),
        Case(lambda p, d: head(p, PATHS[d], version="HTTP/2.0"), kept=False, dialects=PLAIN),
    ),
}

EACH = [
    pytest.param(code, case, dialect, id=f"{code}-{number}-{dialect}")
    for code, cases in CASES.items()
    for number, case in enumerate(cases)
    for dialect in case.dialects
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(stack, tmp_path_factory.mktemp("errors"))


def read_answer(connection: socket.socket) -> Answer:
    with connection.makefile("rb") as file:
        lines = []
        while line := file.readline():
            lines.append(line)
            if line == b"\r\n":
                break
        assert lines, "the connection closed without an answer"
        answer = Answer(b"".join(lines), b"")
        answer.body = file.read(int(answer.fields["content-length"]))
    return answer


def message_of(body: Any, dialect: Dialect, status: int, code: str, request_id: str) -> str:
    """The message, after everything else in a body was found to be what the dialect's SDK expects."""
    if dialect is Dialect.TGI:
        assert set(body) == {"error", "error_type"}
        assert body["error_type"] in ("validation", "overloaded", code)
        return str(body["error"])
    if dialect is Dialect.ANTHROPIC:
        assert set(body) == {"type", "error", "request_id"}
        assert (body["type"], body["request_id"]) == ("error", request_id)
        assert set(body["error"]) == {"type", "message"}
        assert body["error"]["type"].endswith("_error") or status == 413
        return str(body["error"]["message"])
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == code
    assert body["error"]["param"] is None
    assert body["error"]["type"] == ("server_error" if 500 <= status <= 504 else "invalid_request_error")
    return str(body["error"]["message"])


def test_every_code_of_the_catalogue_has_a_case_and_every_case_a_code() -> None:
    assert set(CASES) | {"draining"} == set(CATALOGUE)
    assert all(CASES.values())


def test_a_stop_that_waits_no_longer_says_so_in_every_dialect(tmp_path: Path) -> None:
    """``draining``, which costs a service: model servers hang, the service is told to end and waits for 300 ms."""
    entry = CATALOGUE["draining"]
    with ExitStack() as stack:
        vllm = stack.enter_context(Simulator("--fail", "hang", model="m"))
        tgi = stack.enter_context(Simulator("--fail", "hang", "--type", "tgi", model="m"))

        def resources(document: dict[str, Any]) -> None:
            kinds = {"vllm": vllm.url, "tgi": tgi.url}
            document["providers"] = {kind: {"type": kind, "endpoints": [url]} for kind, url in kinds.items()}
            document["routes"] = {
                kind: {"models": [kind], "targets": [{"provider": kind, "model": "m"}]} for kind in kinds
            }

        service = Service(
            tmp_path / "d",
            upstream=vllm.url,
            models=["m"],
            node=lambda document: document.setdefault("limits", {}).update(drain_unary="300ms"),
            resources=resources,
        )
        with service:
            waiting = {}
            for dialect, path in PATHS.items():
                model = "tgi" if dialect is Dialect.TGI else "vllm"
                body = json.dumps({"model": model, "messages": [], "inputs": "x", "max_tokens": 1}).encode()
                address = "127.0.0.1", service.http_port
                connection = stack.enter_context(socket.create_connection(address, timeout=20))
                fields = f"authorization: Bearer {service.key}", f"x-ascproxy-model: {model}"
                connection.sendall(rig.post(body, *fields, "content-type: application/json", path=path))
                waiting[dialect] = connection
            wait_for(lambda: vllm.stats()["requests"] + tgi.stats()["requests"] >= len(PATHS), "all are asked")
            service.signal(signal.SIGTERM)
            for dialect, connection in waiting.items():
                answer = read_answer(connection)
                assert (answer.status, answer.fields["x-ascproxy-error"]) == (503, "draining")
                assert (answer.fields["connection"], answer.fields["retry-after"]) == ("close", "1")
                said = json.loads(answer.body)
                message = message_of(said, dialect, 503, "draining", answer.fields["x-request-id"])
                assert message == entry.message
                assert connection.recv(1) == b""


@pytest.mark.parametrize(("code", "case", "dialect"), EACH)
def test_what_the_caller_gets(place: Place, code: str, case: Case, dialect: Dialect) -> None:
    entry = CATALOGUE[code]
    before = place.refusals(code)
    port = place.hasty_port if case.hasty else place.service.http_port
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(case.request(place, dialect))
        answer = read_answer(connection)
        fields = answer.fields
        assert (answer.status, fields["x-ascproxy-error"]) == (entry.status, code)
        assert fields["content-type"] == "application/json"
        assert fields.get("x-should-retry") == (None if entry.again else "false")
        assert fields.get("retry-after") == (None if entry.after is None else str(entry.after))
        assert fields.get("connection") == (None if case.kept else "close")
        assert (fields.get("request-id") == fields["x-request-id"]) is (dialect is Dialect.ANTHROPIC)
        for name, value in case.fields:
            assert fields[name] == value

        message = message_of(json.loads(answer.body), dialect, answer.status, code, fields["x-request-id"])
        start, _, end = entry.message.partition("{detail}")
        assert message.startswith(start)
        assert message.endswith(end)
        assert len(message) <= len(entry.message) + NAME_MAX + 100
        assert place.key not in answer.body.decode()
        assert place.gone.removeprefix("http://") not in answer.body.decode()

        if case.kept:
            connection.sendall(head(place, "/v1/models", method="GET"))
            assert read_answer(connection).status == 200
        else:
            assert connection.recv(1) == b"", "the connection closes behind the answer"

    line = place.line(fields["x-request-id"])
    assert (line["status"], line["code"]) == (entry.status, code)
    assert line.get("limit") == case.limit
    assert ("path" in line) is (case.dialects is not PLAIN or code == "unknown_path")
    wait_for(lambda: place.refusals(code) > before, f"{code} is counted")
