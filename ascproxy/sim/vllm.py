"""vLLM 0.32's HTTP surface: routes, checks in vLLM's order, errors and headers as recorded.

One difference on purpose: a real vLLM serves generation or pooling, not both; the simulator's models serve every
operation. Not recorded, and written from the public source or protocol: rerank, detokenize, 429, the error event of
``/v1/messages``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import orjson

from ascproxy.sim import chat, embeddings, messages, responses, text
from ascproxy.sim.answer import Answer, Event, status_line
from ascproxy.sim.failure import Failure, Kind
from ascproxy.sim.refusal import (
    Refusal,
    check_integer,
    check_number,
    error,
    invalid,
    invalid_json,
    stream_options,
)
from ascproxy.sim.request import Request
from ascproxy.sim.settings import Settings
from ascproxy.sim.stats import Gauges

VERSION = b'{"version":"0.32.0"}'
EVENT_STREAM = b"text/event-stream; charset=utf-8"
COMPLETION_LIMIT = 16  # the API's default max_tokens of /v1/completions
BUSY = "The engine is currently busy and cannot accept new requests. Please try again later or on a different instance."
DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."

METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{labels} {running}.0
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{labels} 0.0
# HELP vllm:prompt_tokens_total Number of prefill tokens processed.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{labels} {prompt}.0
# HELP vllm:generation_tokens_total Number of generation tokens processed.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{labels} {generated}.0
"""


@dataclass(frozen=True, slots=True)
class Job:
    """One request on its way through an operation: the parsed body, and what to do to the answer."""

    request: Request
    body: dict[str, Any]
    model: str
    abort: bool

    @property
    def marker(self) -> str | None:
        """The text that the answer must contain: the body's ``user``."""
        user = self.body.get("user")
        return user if isinstance(user, str) else None


class VLLM:
    """The dialect. Stateless but for the vocabulary and the prompt token counter in ``gauges``."""

    idle_close_s: float | None = 5.0  # uvicorn's --timeout-keep-alive, seen on the wire

    def __init__(
        self,
        settings: Settings,
        gauges: Gauges,
        *,
        now: Callable[[], int],
        new_id: Callable[[], str],
    ) -> None:
        """``now`` gives Unix seconds, ``new_id`` 16 random hex digits."""
        self._settings = settings
        self._gauges = gauges
        self._now = now
        self._new_id = new_id
        self._vocabulary = text.Vocabulary()
        self._started = now()
        post: dict[str, Callable[[Job], Answer]] = {
            "/v1/chat/completions": self._chat,
            "/v1/completions": self._completions,
            "/v1/embeddings": self._embeddings,
            "/v1/rerank": self._rerank,
            "/v2/rerank": self._rerank,
            "/rerank": self._rerank,
            "/v1/responses": self._responses,
            "/v1/messages": self._messages,
            "/v1/messages/count_tokens": self._count_tokens,
            "/tokenize": self._tokenize,
            "/detokenize": self._detokenize,
        }
        get: dict[str, Callable[[], Answer]] = {
            "/v1/models": self._models,
            "/health": partial(Answer, content_type=None),
            "/ping": partial(Answer, content_type=None),
            "/version": partial(Answer, body=VERSION),
            "/load": self._load,
            "/metrics": self._metrics,
        }
        self._post, self._get = post, get

    # -- what the server calls

    def answer(self, request: Request, failure: Failure | None) -> Answer:
        """The answer to ``request``; ``failure`` matters here only where it changes what is generated."""
        path = request.path
        if self._settings.api_key is not None and path.startswith("/v1/") and not self._admits(request):
            return self.refusal(Failure(Kind.UNAUTHORIZED, 0), request)
        operation = self._post.get(path)
        if operation is None:
            probe = self._get.get(path)
            if probe is None:
                return Answer(404, b'{"detail":"Not Found"}')
            return probe() if request.method == "GET" else _not_allowed(b"GET")
        if request.method != "POST":
            return _not_allowed(b"POST")
        try:
            body = self._body(request)
            return operation(
                Job(request, body, self._model(body, path), failure is not None and failure.kind is Kind.ABORT)
            )
        except Refusal as refusal:
            return error(path, refusal)

    def refusal(self, failure: Failure, request: Request) -> Answer:
        """The answer of a server in the state that ``failure`` names, whatever the request."""
        match failure.kind:
            case Kind.UNAUTHORIZED:
                return Answer(401, b'{"error":"Unauthorized"}', bare=True)
            case Kind.BUSY:
                return error(request.path, Refusal(503, BUSY, "Service Unavailable", None))
            case Kind.RATE_LIMITED:
                answer = error(request.path, Refusal(429, "Too many requests.", "Too Many Requests", None))
                answer.extra = b"retry-after: %d\r\n" % failure.argument
                return answer
        return error(request.path, Refusal(500, DEAD, "InternalServerError", None))

    def error_events(self, request: Request) -> list[bytes]:
        """The events of a stream whose engine died. On the OpenAI routes with the terminator, as recorded."""
        error = {"message": DEAD, "type": "InternalServerError", "param": None, "code": 500}
        if request.path == "/v1/messages":
            return [messages.event("error", {"error": {"type": "InternalServerError", "message": DEAD}})]
        if request.path == "/v1/responses":
            plan = text.Plan((), "stop")
            broken = responses.Response(
                f"resp_{self._new_id()}", "", self._now(), self._settings.models[0], 0, plan, 1.0, 0
            )
            return [responses.failed(broken, {"code": "server_error", "message": DEAD})]
        # json.dumps with its spaces: this frame is not made by pydantic in vLLM, and looks different.
        return [b"data: %b\n\n" % json.dumps({"error": error}).encode(), chat.DONE]

    def head(self, answer: Answer, request: Request, date: bytes, *, close: bool) -> bytes:
        """The response head with its blank line, headers in uvicorn's order."""
        lines = [status_line(answer.status), b"date: %b\r\nserver: uvicorn\r\n" % date, answer.extra]
        if answer.body is not None:
            lines.append(b"content-length: %d\r\n" % len(answer.body))
        if answer.content_type is not None:
            lines.append(b"content-type: %b\r\n" % answer.content_type)
        if not answer.bare:
            lines.append(b"vary: Origin\r\n")
            if self._settings.request_ids:
                given = request.header("x-request-id")
                value = given.encode("latin-1") if given else (self._new_id() + self._new_id()).encode()
                lines.append(b"x-request-id: %b\r\n" % value)
        if close:
            lines.append(b"connection: close\r\n")
        if answer.body is None:
            lines.append(b"transfer-encoding: chunked\r\n")
        lines.append(b"\r\n")
        return b"".join(lines)

    # -- checks

    def _admits(self, request: Request) -> bool:
        scheme, _, token = (request.header("authorization") or "").partition(" ")
        return scheme.lower() == "bearer" and token == self._settings.api_key

    def _body(self, request: Request) -> dict[str, Any]:
        kind = (request.header("content-type") or "").partition(";")[0].strip().lower()
        if kind != "application/json":
            message = "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed"
            raise Refusal(400, message, "Bad Request", None)
        try:
            body = request.document()
        except orjson.JSONDecodeError:
            invalid_json(request.body)
        if not isinstance(body, dict):
            invalid("dict_type", "body", "Input should be a valid dictionary", str(body)[:40])
        return body

    def _model(self, body: dict[str, Any], path: str) -> str:
        required = {
            "/v1/chat/completions": ("messages",),
            "/v1/completions": ("prompt",),
            "/v1/embeddings": ("input",),
            "/v1/responses": ("input",),
            "/v1/messages": ("messages", "max_tokens"),
            "/v1/messages/count_tokens": ("messages",),
            "/detokenize": ("tokens",),
        }
        for name in required.get(path, ()):
            if name not in body:
                invalid("missing", f"body.{name}", "Field required", f"<dict of {len(body)} items>")
        for name in ("messages", "tools"):
            if name in body and not isinstance(body[name], list) and (name == "messages" or body[name] is not None):
                invalid("list_type", f"body.{name}", "Input should be a valid list", str(body[name])[:40])
        check_number(body, "temperature")
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            check_integer(body, name)
        check_integer(body, "n", 1, 128)
        check_integer(body, "top_logprobs", 0, 20)
        if path == "/v1/completions":  # a number there, a switch in chat
            check_integer(body, "logprobs", 0, 20)
        model = body.get("model")
        if model is None:
            return self._settings.models[0]
        name = str(model).partition("!")[0]
        if name in self._settings.models:
            return name
        if path == "/v1/embeddings":  # a pooling server lists no aliases
            raise Refusal(404, f"The model `{name}` does not exist.", "NotFoundError", None)
        aliases = ", ".join(self._settings.models)
        raise Refusal(404, f"The model `{name}` does not exist. Valid aliases: {aliases}.", "NotFoundError", "model")

    def _limit(self, job: Job, *names: str, default: int | None = None) -> int | None:
        for name in names:
            value = job.body.get(name)
            if value is None:
                continue
            longest = self._settings.max_model_len
            if value > longest:
                message = f"{name}={value} cannot be greater than max_model_len={longest}."
                advice = f"Please request fewer output tokens. (parameter={name}, value={value})"
                raise Refusal(400, f"{message} {advice}", "BadRequestError", name)
            if value < 1:
                message = f"{name} must be at least 1, got {value}. (parameter={name}, value={value})"
                raise Refusal(400, message, "BadRequestError", name)
            return int(value)
        return default

    def _fits(self, tokens: int) -> int:
        longest = self._settings.max_model_len
        if tokens > longest:
            message = (
                f"This model's maximum context length is {longest} tokens. However, your prompt contains at least "
                f"{longest + 1} input tokens, which exceeds this limit even without any output tokens. Please reduce "
                f"the length of the input prompt. (parameter=input_tokens, value={longest + 1})"
            )
            raise Refusal(400, message, "BadRequestError", "input_tokens")
        self._gauges.prompt_tokens += tokens
        return tokens

    def _speech(self, job: Job, limit: int | None, turn: int = 0) -> text.Plan:
        ignore = job.body.get("ignore_eos") is True
        plan = text.speech(self._settings.tokens, limit, marker=job.marker, ignore_eos=ignore, turn=turn)
        return text.aborted(plan) if job.abort else plan

    def _request_id(self, job: Job) -> str:
        given = job.request.header("x-request-id") if self._settings.request_ids else None
        return given or self._new_id()

    # -- operations

    def _chat(self, job: Job) -> Answer:
        body = job.body
        stream = body.get("stream") is True
        usage, continuous = stream_options(body, stream=stream)
        limit = self._limit(job, "max_completion_tokens", "max_tokens")
        prompt_tokens = self._fits(text.conversation_tokens(body["messages"]))
        tool, plan = self._called(job, limit, _chat_choice(body))
        plans = [plan] if plan is not None else [self._speech(job, limit, turn) for turn in range(body.get("n") or 1)]
        completion = chat.Completion(
            id=f"chatcmpl-{self._request_id(job)}",
            created=self._now(),
            model=job.model,
            prompt_tokens=prompt_tokens,
            plans=plans,
            vocabulary=self._vocabulary,
            tool=tool,
            logprobs=int(body.get("top_logprobs") or 0) if body.get("logprobs") is True else None,
            token_ids=body.get("return_token_ids") is True,
            prompt_ids=self._prompt_ids(body),
            include_usage=usage,
            continuous_usage=continuous,
        )
        if stream:
            return _stream(chain(chat.chat_frames(completion), [(0, chat.DONE)]))
        return Answer(body=chat.chat_body(completion), tokens=completion.tokens, generates=True)

    def _prompt_ids(self, body: dict[str, Any]) -> list[int]:
        if body.get("return_token_ids") is not True:
            return []
        said = (text.content_text(m.get("content")) for m in body["messages"] if isinstance(m, dict))
        return self._vocabulary.encode("".join(said))

    def _called(
        self, job: Job, limit: int | None, choice: tuple[str, object, str] | None
    ) -> tuple[chat.Tool | None, text.Plan | None]:
        """The tool call that the request forces, or the JSON text that it asks for, as a plan; else nothing."""
        if choice is not None:
            name, schema, finish = choice
            plan = text.recital(orjson.dumps(text.instance(schema, job.marker)).decode(), finish, limit)
            tool = chat.Tool(f"chatcmpl-tool-{self._new_id()}", name)
            return tool, text.aborted(plan) if job.abort else plan
        wanted = job.body.get("response_format")
        if isinstance(wanted, dict) and wanted.get("type") == "json_schema":
            described = wanted.get("json_schema")
            schema = described.get("schema") if isinstance(described, dict) else None
            plan = text.recital(orjson.dumps(text.instance(schema, job.marker)).decode(), "stop", limit)
            return None, text.aborted(plan) if job.abort else plan
        return None, None

    def _completions(self, job: Job) -> Answer:
        body = job.body
        stream = body.get("stream") is True
        usage, continuous = stream_options(body, stream=stream)
        limit = self._limit(job, "max_tokens", default=COMPLETION_LIMIT)
        prompts = self._inputs(body["prompt"])
        choices = range(len(prompts) * (body.get("n") or 1))
        echoes = [prompts[i * len(prompts) // len(choices)] if body.get("echo") is True else "" for i in choices]
        completion = chat.Completion(
            id=f"cmpl-{self._request_id(job)}",
            created=self._now(),
            model=job.model,
            prompt_tokens=self._fits(sum(map(text.count, prompts))),
            plans=[self._speech(job, limit, turn) for turn in choices],
            vocabulary=self._vocabulary,
            logprobs=body.get("logprobs"),
            token_ids=body.get("return_token_ids") is True,
            include_usage=usage,
            continuous_usage=continuous,
        )
        if stream:
            return _stream(chain(chat.text_frames(completion, echoes), [(0, chat.DONE)]))
        return Answer(body=chat.text_body(completion, echoes), tokens=completion.tokens, generates=True)

    def _inputs(self, given: object) -> list[str]:
        """The prompts or inputs of a request: one or several, each text or token ids."""
        if isinstance(given, str):
            return [given]
        if isinstance(given, list) and given:
            if all(isinstance(item, int) for item in given):
                return [self._vocabulary.decode(given)]
            if all(isinstance(item, str) for item in given):
                return list(given)
            if all(isinstance(item, list) and all(isinstance(t, int) for t in item) for item in given):
                return [self._vocabulary.decode(item) for item in given]
        raise Refusal(400, "Either prompt or prompt_embeds must be provided and non-empty.", "BadRequestError", None)

    def _embeddings(self, job: Job) -> Answer:
        inputs = self._inputs(job.body["input"])
        wanted = job.body.get("dimensions") or embeddings.DIMENSIONS
        if not isinstance(wanted, int) or isinstance(wanted, bool) or not 1 <= wanted <= 8192:
            invalid("int_type", "body.dimensions", "Input should be a valid integer", str(wanted)[:40])
        longest = max(map(text.count, inputs))
        tokens = sum(map(text.count, inputs))
        cut = job.body.get("truncate_prompt_tokens")
        if isinstance(cut, int) and cut > 0:
            tokens = sum(min(cut, text.count(one)) for one in inputs)
        else:
            self._fits(longest)
        as_text = job.body.get("encoding_format") == "base64"
        vectors = (embeddings.embed(one, wanted) for one in inputs)
        data = [
            {"index": i, "object": "embedding", "embedding": embeddings.packed(vector) if as_text else vector}
            for i, vector in enumerate(vectors)
        ]
        usage = {
            "prompt_tokens": tokens,
            "total_tokens": tokens,
            "completion_tokens": 0,
            "prompt_tokens_details": None,
            "completion_tokens_details": None,
        }
        head = {"id": f"embd-{self._request_id(job)}", "object": "list", "created": self._now(), "model": job.model}
        return Answer(body=orjson.dumps({**head, "data": data, "usage": usage}), generates=True)

    def _rerank(self, job: Job) -> Answer:
        query, documents = job.body.get("query"), job.body.get("documents")
        if not isinstance(query, str):
            invalid("missing", "body.query", "Field required", f"<dict of {len(job.body)} items>")
        if not isinstance(documents, list) or not all(isinstance(one, str) for one in documents):
            invalid("missing", "body.documents", "Field required", f"<dict of {len(job.body)} items>")
        tokens = self._fits(sum(text.count(query) + text.count(one) for one in documents))
        results = [
            {
                "index": i,
                "document": {"text": one, "multi_modal": None},
                "relevance_score": embeddings.score(query, one),
            }
            for i, one in enumerate(documents)
        ]
        results.sort(key=lambda result: -float(str(result["relevance_score"])))
        top = job.body.get("top_n")
        if isinstance(top, int) and top > 0:
            results = results[:top]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        head = {"id": f"rerank-{self._request_id(job)}", "model": job.model}
        return Answer(body=orjson.dumps({**head, "usage": usage, "results": results}), generates=True)

    def _responses(self, job: Job) -> Answer:
        given = job.body["input"]
        limit = self._limit(job, "max_output_tokens")
        if isinstance(given, list):
            tokens = text.conversation_tokens(given, job.body.get("instructions"))
        else:
            tokens = text.conversation_tokens([{"content": given}], job.body.get("instructions"))
        self._fits(tokens)
        temperature = job.body.get("temperature")
        response = responses.Response(
            id=f"resp_{self._request_id(job)}",
            message_id=f"msg_{self._new_id()}",
            created=self._now(),
            model=job.model,
            input_tokens=tokens,
            plan=self._speech(job, limit),
            temperature=float(temperature) if temperature is not None else 1.0,
            max_output_tokens=limit if limit is not None else self._settings.max_model_len - tokens,
        )
        if job.body.get("stream") is True:
            return _stream(responses.events(response))
        return Answer(body=responses.body(response), tokens=len(response.plan.tokens), generates=True)

    def _messages(self, job: Job) -> Answer:
        limit = self._limit(job, "max_tokens")
        tokens = self._fits(text.conversation_tokens(job.body["messages"], job.body.get("system")))
        # A tool call that is cut off would be no valid input; an aborted answer is text.
        tool, plan = self._called(job, None, None if job.abort else _messages_choice(job.body))
        message = messages.Message(
            id=f"chatcmpl-{self._request_id(job)}",
            model=job.model,
            input_tokens=tokens,
            plan=plan if plan is not None else self._speech(self._with_metadata_user(job), limit),
            tool=tool,
        )
        if job.body.get("stream") is True:
            return _stream(messages.events(message))
        return Answer(body=messages.body(message), tokens=len(message.plan.tokens), generates=True)

    @staticmethod
    def _with_metadata_user(job: Job) -> Job:
        """Anthropic's place for the user is ``metadata.user_id``: it marks the answer as ``user`` does elsewhere."""
        metadata = job.body.get("metadata")
        if "user" in job.body or not isinstance(metadata, dict) or "user_id" not in metadata:
            return job
        return Job(job.request, {**job.body, "user": metadata["user_id"]}, job.model, job.abort)

    def _count_tokens(self, job: Job) -> Answer:
        tokens = text.conversation_tokens(job.body["messages"], job.body.get("system"))
        return Answer(
            body=orjson.dumps({"input_tokens": tokens, "context_management": {"original_input_tokens": tokens}})
        )

    def _tokenize(self, job: Job) -> Answer:
        if isinstance(job.body.get("messages"), list):
            said = "".join(text.content_text(m.get("content")) for m in job.body["messages"] if isinstance(m, dict))
        elif isinstance(job.body.get("prompt"), str):
            said = job.body["prompt"]
        else:
            invalid("missing", "body.prompt", "Field required", f"<dict of {len(job.body)} items>")
        ids = self._vocabulary.encode(said)
        strings = text.pieces(said) if job.body.get("return_token_strs") is True else None
        facts = {"count": len(ids), "max_model_len": self._settings.max_model_len, "tokens": ids, "token_strs": strings}
        return Answer(body=orjson.dumps(facts))

    def _detokenize(self, job: Job) -> Answer:
        ids = job.body["tokens"]
        if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
            invalid("list_type", "body.tokens", "Input should be a valid list", str(ids)[:40])
        return Answer(body=orjson.dumps({"prompt": self._vocabulary.decode(ids)}))

    # -- probes

    def _models(self) -> Answer:
        return Answer(
            body=orjson.dumps({"object": "list", "data": [self._card(name) for name in self._settings.models]})
        )

    def _card(self, name: str) -> dict[str, Any]:
        created = self._now()
        permission = {
            "id": f"modelperm-{self._new_id()}",
            "object": "model_permission",
            "created": created,
            "allow_create_engine": False,
            "allow_sampling": True,
            "allow_logprobs": True,
            "allow_search_indices": False,
            "allow_view": True,
            "allow_fine_tuning": False,
            "organization": "*",
            "group": None,
            "is_blocking": False,
        }
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "vllm",
            "root": name,
            "parent": None,
            "max_model_len": self._settings.max_model_len,
            "permission": [permission],
        }

    def _load(self) -> Answer:
        return Answer(body=orjson.dumps({"server_load": self._gauges.running}))

    def _metrics(self) -> Answer:
        labels = f'{{engine="0",model_name="{self._settings.models[0]}"}}'
        values = {
            "{labels}": labels,
            "{running}": str(self._gauges.running),
            "{prompt}": str(self._gauges.prompt_tokens),
            "{generated}": str(self._gauges.generated()),
        }
        page = METRICS
        for place, value in values.items():
            page = page.replace(place, value)
        return Answer(body=page.encode(), content_type=b"text/plain; version=1.0.0; charset=utf-8")


def _stream(events: Iterator[Event]) -> Answer:
    return Answer(body=None, events=events, content_type=EVENT_STREAM, generates=True)


def _not_allowed(method: bytes) -> Answer:
    return Answer(405, b'{"detail":"Method Not Allowed"}', extra=b"allow: %b\r\n" % method)


def _chat_choice(body: dict[str, Any]) -> tuple[str, object, str] | None:
    """(tool name, schema of its arguments, finish reason) if the request forces a call; ``auto`` gets text.

    As recorded: vLLM ends a named call with "stop" and a required one with "tool_calls".
    """
    choice, tools = body.get("tool_choice"), body.get("tools")
    functions = [t["function"] for t in tools or () if isinstance(t, dict) and isinstance(t.get("function"), dict)]
    if choice == "required" and functions:
        return str(functions[0].get("name")), functions[0].get("parameters"), "tool_calls"
    if isinstance(choice, dict) and isinstance(choice.get("function"), dict):
        name = choice["function"].get("name")
        for function in functions:
            if function.get("name") == name:
                return str(name), function.get("parameters"), "stop"
        message = f"The tool specified in `tool_choice` does not match any of the specified `tools`: {name}"
        raise Refusal(400, message, "BadRequestError", "tool_choice")
    return None


def _messages_choice(body: dict[str, Any]) -> tuple[str, object, str] | None:
    choice, tools = body.get("tool_choice"), body.get("tools")
    if not isinstance(choice, dict) or not isinstance(tools, list):
        return None
    for tool in tools:
        if not isinstance(tool, dict):
            continue
        if choice.get("type") == "any" or (choice.get("type") == "tool" and choice.get("name") == tool.get("name")):
            return str(tool.get("name")), tool.get("input_schema"), "tool_calls"
    return None
