"""What control answers over HTTP: two small ASGI applications.

``public`` is on the metrics address: metrics and health, nothing else. ``local`` is on the control socket in the run
directory (mode 0600): status and keys. A data-plane listener has neither (DESIGN D15).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import orjson

from ascproxy.control.node import Node
from ascproxy.errors import AscproxyError, UsageError
from ascproxy.telemetry import exposition

MAX_BODY = 65_536
JSON = "application/json"

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP answer."""

    status: int
    body: bytes
    content_type: str = JSON

    @classmethod
    def json(cls, status: int, document: Any) -> Answer:
        return cls(status, orjson.dumps(document) + b"\n")

    @classmethod
    def error(cls, status: int, reason: str) -> Answer:
        return cls.json(status, {"error": reason})


class Keys(Protocol):
    """What may be done with API keys; called on a thread, one call at a time. Raises AscproxyError."""

    def create(self, wanted: dict[str, Any]) -> dict[str, Any]: ...
    def list(self) -> list[dict[str, Any]]: ...
    def revoke(self, key_id: str) -> dict[str, Any]: ...
    def tidy(self) -> None: ...


@dataclass(slots=True)
class Service:
    """What the applications answer about. ``revision`` changes with each reload."""

    node: Node
    keys: Keys
    revision: str | None = None


def public(service: Service) -> Application:
    """``/metrics``, ``/healthz/live``, ``/healthz/ready``."""
    collector = exposition.PageCollector(service.node.pages, service.node.now_ns, service.node.shared_page())

    async def answer(method: str, path: str, _: bytes) -> Answer:
        if path not in ("/metrics", "/healthz/live", "/healthz/ready"):
            return Answer.error(404, "here are /metrics, /healthz/live and /healthz/ready")
        if method not in ("GET", "HEAD"):
            return Answer.error(405, "only GET and HEAD")
        if path == "/metrics":
            return Answer(200, exposition.render(collector), exposition.CONTENT_TYPE)
        if path == "/healthz/live":
            live = service.node.live()
            return Answer.json(200 if live else 503, {"live": live})
        readiness = service.node.readiness(service.revision)
        return Answer.json(200 if readiness.ready else 503, asdict(readiness))

    return _application(answer)


def local(service: Service) -> Application:
    """``GET /status``, ``GET`` and ``POST /keys``, ``DELETE /keys/{id}``."""
    writing = asyncio.Lock()

    async def answer(method: str, path: str, body: bytes) -> Answer:
        match method, path.split("/")[1:]:
            case "GET", ["status"]:
                return Answer.json(200, service.node.status(service.revision))
            case "GET", ["keys"]:
                return Answer.json(200, await asyncio.to_thread(service.keys.list))
            case "POST", ["keys"]:
                wanted = orjson.loads(body)
                if not isinstance(wanted, dict):
                    return Answer.error(400, "the body must be a JSON object")
                async with writing:
                    return Answer.json(201, await asyncio.to_thread(service.keys.create, wanted))
            case "DELETE", ["keys", key_id] if key_id:
                async with writing:
                    return Answer.json(200, await asyncio.to_thread(service.keys.revoke, key_id))
        return Answer.error(404, "here are /status, /keys and /keys/ID")

    return _application(answer)


def _application(answer: Callable[[str, str, bytes], Awaitable[Answer]]) -> Application:
    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # neither lifespan nor websocket: the server goes on without
            return
        body, more = b"", True
        while more and len(body) <= MAX_BODY:
            event = await receive()
            if event["type"] == "http.disconnect":
                return
            body += event.get("body", b"")
            more = event.get("more_body", False)
        found = await _answer(answer, scope, body)
        head = scope["method"] == "HEAD"
        headers = [(b"content-type", found.content_type.encode()), (b"content-length", str(len(found.body)).encode())]
        await send({"type": "http.response.start", "status": found.status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if head else found.body})

    return application


async def _answer(answer: Callable[[str, str, bytes], Awaitable[Answer]], scope: Scope, body: bytes) -> Answer:
    if len(body) > MAX_BODY:
        return Answer.error(413, f"at most {MAX_BODY} bytes")
    try:
        return await answer(scope["method"], scope["path"], body)
    except orjson.JSONDecodeError as error:
        return Answer.error(400, f"the body is not JSON: {error}")
    except UsageError as error:
        return Answer.error(400, str(error))
    except AscproxyError as error:
        return Answer.error(409, str(error))
