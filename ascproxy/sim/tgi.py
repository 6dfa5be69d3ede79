"""TGI 3.3's HTTP surface, after its source (no TGI was observed): native routes, chat, completions, errors, headers.

Usage of the native routes is in response headers; their errors inside a stream are events of a 200; the terminator is
an event whose ``generated_text`` is not null, and there is no ``[DONE]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import orjson

from ascproxy.sim import text
from ascproxy.sim.answer import Answer, Event, status_line
from ascproxy.sim.chat import DONE
from ascproxy.sim.failure import Failure, Kind
from ascproxy.sim.request import Request
from ascproxy.sim.settings import Settings
from ascproxy.sim.stats import Gauges

VERSION = "3.3.6-dev0"
FINGERPRINT = "3.3.6-dev0-native"
DEFAULT_NEW_TOKENS = 100
DEFAULT_CHAT_TOKENS = 1024
LOGPROB = -6.9314675
OPEN_TO_ALL = frozenset({"/health", "/ping", "/info", "/metrics", "/v1/models"})
VARY = (
    b"vary: origin, access-control-request-method, access-control-request-headers\r\naccess-control-allow-origin: *\r\n"
)

METRICS = """\
# TYPE tgi_queue_size gauge
tgi_queue_size 0
# TYPE tgi_batch_current_size gauge
tgi_batch_current_size {running}
# TYPE tgi_request_count counter
tgi_request_count {requests}
# TYPE tgi_request_generated_tokens_total counter
tgi_request_generated_tokens_total {generated}
"""


class Refusal(Exception):
    """A request that TGI answers with an error."""

    def __init__(self, status: int, message: str, kind: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind

    def members(self) -> dict[str, str]:
        """The error object."""
        return {"error": self.message, "error_type": self.kind}


@dataclass(frozen=True, slots=True)
class Generation:
    """One native answer: what was asked, what is said, and why it ends."""

    prompt: str
    plan: text.Plan
    finish: str
    seed: int | None

    def details(self, ids: Sequence[int]) -> dict[str, Any]:
        """The ``details`` of a unary answer."""
        tokens: list[dict[str, Any]] = [_token(i, t) for i, t in zip(ids, self.plan.tokens, strict=True)]
        return {
            "finish_reason": self.finish,
            "generated_tokens": len(tokens),
            "seed": self.seed,
            "prefill": [],
            "tokens": tokens,
        }


class TGI:
    """The dialect. It owns its vocabulary, and writes the prompt token counter in ``gauges``."""

    idle_close_s: float | None = None

    def __init__(
        self, settings: Settings, gauges: Gauges, *, now: Callable[[], int], new_id: Callable[[], str]
    ) -> None:
        """``now`` gives Unix seconds, ``new_id`` 16 random hex digits (TGI's ids are empty or 0, so it is not used)."""
        del new_id
        self._settings = settings
        self._gauges = gauges
        self._now = now
        self._vocabulary = text.Vocabulary()
        self._post: dict[str, Callable[[Request, dict[str, Any], bool], Answer]] = {
            "/": self._compat,
            "/invocations": self._compat,
            "/generate": self._generate,
            "/generate_stream": self._generate_stream,
            "/v1/chat/completions": self._chat,
            "/v1/completions": self._completions,
            "/tokenize": self._tokenize,
            "/chat_tokenize": self._chat_tokenize,
        }
        self._get: dict[str, Callable[[], Answer]] = {
            "/": self._health,
            "/health": self._health,
            "/ping": self._health,
            "/info": self._info,
            "/v1/models": self._models,
            "/metrics": self._metrics,
        }

    # -- what the server calls

    def answer(self, request: Request, failure: Failure | None) -> Answer:
        """The answer to ``request``; ``failure`` matters here only where it changes what is generated."""
        post, get = self._post.get(request.path), self._get.get(request.path)
        if post is None and get is None:
            return Answer(404, content_type=None)
        if get is not None and request.method == "GET":
            return get()
        if post is None or request.method != "POST":
            return Answer(405, content_type=None, extra=b"allow: %b\r\n" % (b"GET,HEAD" if post is None else b"POST"))
        if self._settings.api_key is not None and request.path not in OPEN_TO_ALL and not self._admits(request):
            return self.refusal(Failure(Kind.UNAUTHORIZED, 0), request)
        kind = (request.header("content-type") or "").partition(";")[0].strip().lower()
        if kind != "application/json":
            return _words(415, "Expected request with `Content-Type: application/json`")
        try:
            body = request.document()
        except orjson.JSONDecodeError as error:
            return _words(400, f"Failed to parse the request body as JSON: {error}")
        if not isinstance(body, dict):
            return _words(422, "Failed to deserialize the JSON body into the target type: expected a map")
        missing = next((name for name in _required(request.path) if name not in body), None)
        if missing is not None:
            return _words(422, f"Failed to deserialize the JSON body into the target type: missing field `{missing}`")
        try:
            return post(request, body, failure is not None and failure.kind is Kind.ABORT)
        except Refusal as refusal:
            return self._refused(request, body, refusal)

    def refusal(self, failure: Failure, request: Request) -> Answer:
        """The answer of a server in the state that ``failure`` names."""
        if failure.kind is Kind.UNAUTHORIZED:
            return Answer(401, content_type=None)
        body: dict[str, Any] = {}
        if request.body:
            try:
                parsed = request.document()
            except orjson.JSONDecodeError:
                parsed = None
            body = parsed if isinstance(parsed, dict) else {}
        if failure.kind is Kind.BUSY:
            return self._refused(request, body, Refusal(429, "Model is overloaded", "overloaded"))
        if failure.kind is Kind.RATE_LIMITED:
            answer = _error(Refusal(429, "Model is overloaded", "overloaded"))
            answer.extra = b"retry-after: %d\r\n" % failure.argument
            return answer
        return self._refused(
            request, body, Refusal(424, "Request failed during generation: Server error: killed", "generation")
        )

    def error_events(self, request: Request) -> list[bytes]:
        """The events of a stream whose model server died."""
        return self._error_events(
            request.path, Refusal(424, "Request failed during generation: Server error: killed", "generation")
        )

    def head(self, answer: Answer, request: Request, date: bytes, *, close: bool) -> bytes:  # noqa: ARG002  TGI echoes no id
        """The response head with its blank line."""
        lines = [status_line(answer.status)]
        if answer.content_type is not None:
            lines.append(b"content-type: %b\r\n" % answer.content_type)
        lines.append(answer.extra)
        if answer.body is not None:
            lines.append(b"content-length: %d\r\n" % len(answer.body))
        if not answer.bare:
            lines.append(VARY)
        if close:
            lines.append(b"connection: close\r\n")
        if answer.body is None:
            lines.append(b"transfer-encoding: chunked\r\n")
        lines.append(b"date: %b\r\n\r\n" % date)
        return b"".join(lines)

    # -- checks and refusals

    def _admits(self, request: Request) -> bool:
        given = request.header("authorization") or ""
        return given.lower() == f"bearer {self._settings.api_key}".lower()  # TGI compares without case

    def _refused(self, request: Request, body: dict[str, Any], refusal: Refusal) -> Answer:
        """A native stream carries its error inside a 200 (TGI's handler has sent the head by then); the rest do not."""
        native = request.path == "/generate_stream" or (
            request.path in ("/", "/invocations") and body.get("stream") is True
        )
        if native:
            return self._stream(((0, event) for event in self._error_events("/generate_stream", refusal)), "")
        return _error(refusal)

    @staticmethod
    def _error_events(path: str, refusal: Refusal) -> list[bytes]:
        if path.startswith("/v1/"):
            # Always 422 inside a stream, whatever the cause; the terminator still follows.
            error = {"error": {"message": refusal.message, "http_status_code": 422}}
            return [b"data: %b\n\n" % orjson.dumps(error), DONE]
        return [b"data: %b\n\n" % orjson.dumps(refusal.members())]

    def _limit(self, wanted: object, name: str, default: int) -> int:
        if wanted is None:
            return default
        if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1:
            raise Refusal(422, f"Input validation error: `{name}` must be strictly positive", "validation")
        return wanted

    def _fits(self, prompt_tokens: int, new_tokens: int) -> int:
        longest = self._settings.max_model_len
        if prompt_tokens + new_tokens > longest:
            sentence = (
                f"Input validation error: `inputs` tokens + `max_new_tokens` must be <= {longest}. "
                f"Given: {prompt_tokens} `inputs` tokens and {new_tokens} `max_new_tokens`"
            )
            raise Refusal(422, sentence, "validation")
        self._gauges.prompt_tokens += prompt_tokens
        return prompt_tokens

    # -- native routes

    def _compat(self, request: Request, body: dict[str, Any], abort: bool) -> Answer:
        if body.get("stream") is True:
            return self._generate_stream(request, body, abort)
        answer = self._generate(request, body, abort)
        answer.body = b"[%b]" % (answer.body or b"")  # POST / answers as a text-generation pipeline: a list
        return answer

    def _plan(self, body: dict[str, Any], abort: bool) -> Generation:
        parameters = body.get("parameters")
        if parameters is None:
            parameters = {}
        inputs = body["inputs"]
        if not isinstance(inputs, str) or not isinstance(parameters, dict):
            raise Refusal(422, "Input validation error: `inputs` must be a string", "validation")
        if not inputs:
            raise Refusal(422, "Input validation error: `inputs` cannot be empty", "validation")
        temperature = parameters.get("temperature")
        if temperature is not None and not (isinstance(temperature, int | float) and temperature > 0):
            raise Refusal(422, "Input validation error: `temperature` must be strictly positive", "validation")
        limit = self._limit(parameters.get("max_new_tokens"), "max_new_tokens", DEFAULT_NEW_TOKENS)
        self._fits(text.count(inputs), limit)
        user = body.get("user")
        plan = text.speech(
            self._settings.tokens, limit, marker=user if isinstance(user, str) else None, ignore_eos=False
        )
        if abort:
            plan = text.aborted(plan)
        finish = "length" if plan.finish == "length" else "eos_token"
        seed = parameters.get("seed") if parameters.get("do_sample") is True else None
        return Generation(inputs, plan, finish, seed if isinstance(seed, int) else None)

    def _generate(self, request: Request, body: dict[str, Any], abort: bool) -> Answer:  # noqa: ARG002  one signature for all
        generation = self._plan(body, abort)
        if abort:
            raise Refusal(500, "Incomplete generation", "incomplete_generation")
        said = {"generated_text": generation.plan.text()}
        shown: dict[str, Any] = dict(said)
        if (body.get("parameters") or {}).get("details") is True:
            shown["details"] = generation.details(self._ids(generation.plan))
        made = len(generation.plan.tokens)
        return Answer(
            body=orjson.dumps(shown), tokens=made, extra=self._usage_headers(generation.prompt, made), generates=True
        )

    def _usage_headers(self, prompt: str, made: int) -> bytes:
        per_token = 1000 / self._settings.rate if self._settings.rate > 0 else 0.0
        total = per_token * made
        return (
            b"x-compute-type: cpu\r\nx-compute-time: %.9f\r\nx-compute-characters: %d\r\nx-total-time: %d\r\n"
            b"x-validation-time: 0\r\nx-queue-time: 0\r\nx-inference-time: %d\r\nx-time-per-token: %d\r\n"
            b"x-prompt-tokens: %d\r\nx-generated-tokens: %d\r\n"
            % (total / 1000, len(prompt), total, total, per_token, text.count(prompt), made)
        )

    def _generate_stream(self, request: Request, body: dict[str, Any], abort: bool) -> Answer:  # noqa: ARG002  as above
        generation = self._plan(body, abort)
        return self._stream(self._native_events(generation, abort), generation.prompt)

    def _native_events(self, generation: Generation, abort: bool) -> Iterator[Event]:
        said = generation.plan.tokens
        last = len(said)
        for index, (token_id, token) in enumerate(zip(self._ids(generation.plan), said, strict=True), 1):
            members: dict[str, Any] = {
                "index": index,
                "token": _token(token_id, token),
                "generated_text": None,
                "details": None,
            }
            if index == last and not abort:
                members["generated_text"] = generation.plan.text()
                members["details"] = {
                    "finish_reason": generation.finish,
                    "generated_tokens": last,
                    "seed": generation.seed,
                    "input_length": text.count(generation.prompt),
                }
            yield 1, b"data: %b\n\n" % orjson.dumps(members)
        if abort:
            refusal = Refusal(500, "Incomplete generation", "incomplete_generation")
            yield 0, b"data: %b\n\n" % orjson.dumps(refusal.members())

    def _ids(self, plan: text.Plan) -> list[int]:
        return [self._vocabulary.encode(token)[0] for token in plan.tokens]

    @staticmethod
    def _stream(events: Iterator[Event], prompt: str) -> Answer:
        extra = (
            b"cache-control: no-cache\r\nx-compute-type: cpu\r\nx-compute-characters: %d\r\nx-accel-buffering: no\r\n"
        )
        return Answer(
            body=None, events=events, content_type=b"text/event-stream", extra=extra % len(prompt), generates=True
        )

    # -- OpenAI routes

    def _chat(self, request: Request, body: dict[str, Any], abort: bool) -> Answer:  # noqa: ARG002  as above
        messages = body["messages"]
        if not isinstance(messages, list) or not messages:
            raise Refusal(422, "Input validation error: `inputs` cannot be empty", "validation")
        limit = self._limit(body.get("max_tokens"), "max_tokens", DEFAULT_CHAT_TOKENS)
        prompt_tokens = self._fits(text.conversation_tokens(messages), limit)
        call = _forced_call(body)
        user = body.get("user")
        marker = user if isinstance(user, str) else None
        if call is not None:
            name, schema = call
            plan = text.recital(orjson.dumps(text.instance(schema, marker)).decode(), "tool_calls", limit)
        else:
            name = ""
            plan = text.speech(self._settings.tokens, limit, marker=marker, ignore_eos=False)
        plan = text.aborted(plan) if abort else plan
        if body.get("stream") is True:
            events = self._chat_events(body, plan, name, prompt_tokens)
            return self._stream(chain(events, [(0, DONE)]), _said(messages))
        message: dict[str, Any] = {"role": "assistant", "content": plan.text()}
        if name:
            function = {"description": None, "name": name, "arguments": plan.text()}
            message = {"role": "assistant", "tool_calls": [{"id": "0", "type": "function", "function": function}]}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": plan.finish}
        made = len(plan.tokens)
        return Answer(
            body=orjson.dumps(
                {
                    "object": "chat.completion",
                    "id": "",
                    "created": self._now(),
                    "model": self._model(body),
                    "system_fingerprint": FINGERPRINT,
                    "choices": [choice],
                    "usage": _usage(prompt_tokens, made),
                }
            ),
            tokens=made,
            extra=self._usage_headers(_said(messages), made),
            generates=True,
        )

    def _chat_events(self, body: dict[str, Any], plan: text.Plan, tool: str, prompt_tokens: int) -> Iterator[Event]:
        head = {
            "object": "chat.completion.chunk",
            "id": "",
            "created": self._now(),
            "model": self._model(body),
            "system_fingerprint": FINGERPRINT,
        }
        last = len(plan.tokens)
        for made, token in enumerate(plan.tokens, 1):
            delta: dict[str, Any] = {"role": "assistant", "content": token}
            if tool:
                function = {"name": tool if made == 1 else None, "arguments": token}
                delta = {
                    "role": "assistant",
                    "tool_calls": [{"index": 0, "id": "0", "type": "function", "function": function}],
                }
            finish = plan.finish if made == last else None
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
            yield 1, b"data: %b\n\n" % orjson.dumps({**head, "choices": [choice], "usage": None})
        options = body.get("stream_options")
        if isinstance(options, dict) and options.get("include_usage") is True:
            yield 0, b"data: %b\n\n" % orjson.dumps({**head, "choices": [], "usage": _usage(prompt_tokens, last)})

    def _completions(self, request: Request, body: dict[str, Any], abort: bool) -> Answer:  # noqa: ARG002  as above
        prompt = body["prompt"]
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, list) or not prompts or not all(isinstance(one, str) and one for one in prompts):
            raise Refusal(422, "Input validation error: `inputs` cannot be empty", "validation")
        limit = self._limit(body.get("max_tokens"), "max_tokens", DEFAULT_CHAT_TOKENS)
        prompt_tokens = self._fits(sum(map(text.count, prompts)), limit)
        user = body.get("user")
        marker = user if isinstance(user, str) else None
        speak = partial(text.speech, self._settings.tokens, limit, marker=marker, ignore_eos=False)
        plans = [text.aborted(plan) if abort else plan for plan in (speak(turn=i) for i in range(len(prompts)))]
        head = {
            "object": "text_completion",
            "id": "",
            "created": self._now(),
            "model": self._model(body),
            "system_fingerprint": FINGERPRINT,
        }
        if body.get("stream") is True:
            events = self._completion_events(head, plans)
            return self._stream(chain(events, [(0, DONE)]), "".join(prompts))
        choices = [
            {"index": i, "text": plan.text(), "logprobs": None, "finish_reason": _native(plan.finish)}
            for i, plan in enumerate(plans)
        ]
        made = sum(len(plan.tokens) for plan in plans)
        return Answer(
            body=orjson.dumps({**head, "choices": choices, "usage": _usage(prompt_tokens, made)}),
            tokens=made,
            extra=self._usage_headers("".join(prompts), made),
            generates=True,
        )

    @staticmethod
    def _completion_events(head: dict[str, Any], plans: Sequence[text.Plan]) -> Iterator[Event]:
        for index, plan in enumerate(plans):
            for made, token in enumerate(plan.tokens, 1):
                finish = _native(plan.finish) if made == len(plan.tokens) else None
                choice = {"index": index, "text": token, "logprobs": None, "finish_reason": finish}
                yield 1, b"data: %b\n\n" % orjson.dumps({**head, "choices": [choice]})

    # -- tokens and probes

    def _tokenize(self, request: Request, body: dict[str, Any], abort: bool) -> Answer:  # noqa: ARG002  as above
        if not isinstance(body["inputs"], str):
            raise Refusal(422, "Input validation error: `inputs` must be a string", "validation")
        return Answer(body=orjson.dumps(self._tokens(body["inputs"])))

    def _chat_tokenize(self, request: Request, body: dict[str, Any], abort: bool) -> Answer:  # noqa: ARG002  as above
        said = _said(body["messages"] if isinstance(body["messages"], list) else [])
        return Answer(body=orjson.dumps({"tokenize_response": self._tokens(said), "templated_text": said}))

    def _tokens(self, said: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        at = 0
        for piece in text.pieces(said):
            for token in self._vocabulary.encode(piece):
                found.append({"id": token, "text": piece, "start": at, "stop": at + len(piece)})
            at += len(piece)
        return found

    @staticmethod
    def _health() -> Answer:
        return Answer(content_type=None)

    def _info(self) -> Answer:
        return Answer(
            body=orjson.dumps(
                {
                    "model_id": self._settings.models[0],
                    "model_sha": None,
                    "model_pipeline_tag": None,
                    "max_concurrent_requests": 128,
                    "max_best_of": 2,
                    "max_stop_sequences": 4,
                    "max_input_tokens": self._settings.max_model_len - 1,
                    "max_total_tokens": self._settings.max_model_len,
                    "validation_workers": 2,
                    "max_client_batch_size": 4,
                    "router": "text-generation-router",
                    "version": VERSION,
                    "sha": None,
                    "docker_label": None,
                }
            )
        )

    def _models(self) -> Answer:
        data = [{"id": name, "object": "model", "created": 0, "owned_by": name} for name in self._settings.models]
        return Answer(body=orjson.dumps({"object": "list", "data": data}))

    def _metrics(self) -> Answer:
        gauges = self._gauges
        page = METRICS.format(running=gauges.running, requests=gauges.requests, generated=gauges.generated())
        return Answer(body=page.encode(), content_type=b"text/plain; charset=utf-8")

    def _model(self, body: dict[str, Any]) -> str:
        """TGI serves one model and answers with its name, whatever was asked for."""
        del body
        return self._settings.models[0]


def _required(path: str) -> tuple[str, ...]:
    if path in ("/v1/chat/completions", "/chat_tokenize"):
        return ("messages",)
    return ("prompt",) if path == "/v1/completions" else ("inputs",)


def _token(token_id: int, said: str) -> dict[str, Any]:
    return {"id": token_id, "text": said, "logprob": LOGPROB, "special": False}


def _native(finish: str) -> str:
    return {"stop": "eos_token"}.get(finish, finish)


def _said(messages: Sequence[object]) -> str:
    return "".join(text.content_text(m.get("content")) for m in messages if isinstance(m, dict))


def _usage(prompt_tokens: int, made: int) -> dict[str, int]:
    return {"prompt_tokens": prompt_tokens, "completion_tokens": made, "total_tokens": prompt_tokens + made}


def _words(status: int, sentence: str) -> Answer:
    """A rejection by the framework's JSON extractor: plain text."""
    return Answer(status, sentence.encode(), content_type=b"text/plain; charset=utf-8")


def _error(refusal: Refusal) -> Answer:
    return Answer(refusal.status, orjson.dumps(refusal.members()))


def _forced_call(body: dict[str, Any]) -> tuple[str, object] | None:
    """(name, schema of the arguments) of the tool that the request forces."""
    choice = body.get("tool_choice")
    tools = body.get("tools")
    listed = tools if isinstance(tools, list) else []
    functions = [t["function"] for t in listed if isinstance(t, dict) and isinstance(t.get("function"), dict)]
    if not functions:
        return None
    if choice == "required":
        return str(functions[0].get("name")), functions[0].get("parameters")
    if isinstance(choice, dict) and isinstance(choice.get("function"), dict):
        for function in functions:
            if function.get("name") == choice["function"].get("name"):
                return str(function.get("name")), function.get("parameters")
    return None
