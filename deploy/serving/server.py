"""The HTTP server: OpenAI's completions and chat completions over the engine, metrics, and a chat page.

`make_app` returns an ASGI application. Everything that a client sends is checked before the engine sees it,
and every error has OpenAI's shape: {"error": {"message", "type", "param", "code"}}.
"""

import asyncio
import hmac
import ipaddress
import json
import math
import re
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from data import chat_template
from data.chat_template import ChatTemplate
from deploy.serving.engine import Engine, Output
from deploy.serving.experts import Experts
from deploy.serving.metrics import Metrics
from deploy.serving.protocol import ChatRequest, CompletionRequest, Refused, TokenizeRequest
from deploy.serving.sampling import SamplingParams
from deploy.serving.worker import EngineFailed, Full, Open, Stopping, Worker
from lab.errors import UserError

PAGE = Path(__file__).with_name("chat.html")
OPEN_PATHS = ("/", "/health")  # need no API key
LOWEST_LOGPROB = -9999.0  # JSON has no -inf; OpenAI sends this number
RETRY_AFTER = "1"  # seconds
SECONDS_FOR_THE_BODY = 30
MOST_TO_DISCARD = 2**26  # bytes of a body that is too large


@dataclass
class Limits:
    """What a client may ask of the server."""

    max_requests: int = 64
    """Open requests; further ones get status 429."""
    max_texts: int = 16
    """Texts of one request: prompts times n (or best_of)."""
    max_body: int = 2**20
    """Bytes of a request's body."""


@dataclass
class Served:
    """A model and what the server needs to know about it."""

    name: str
    """The model's name in the API."""
    engine: Engine
    template: ChatTemplate | UserError
    """UserError: why there is none."""
    context: int
    """The most tokens of a prompt and its answer."""
    created: int = 0
    """When the model was made, in seconds since 1970."""

    @property
    def tokenizer(self):
        return self.engine.tokenizer


def make_app(
    served: Served, limits: Limits | None = None, api_key: str | None = None, only_local: bool = False
) -> FastAPI:
    """The application. only_local: refuses requests whose Host header is not this machine's own name.

    app.state.worker is the Worker; it starts and stops with the application.
    """
    limits = limits or Limits()
    metrics = Metrics(served.engine.stats())
    worker = Worker(served.engine, metrics, limits.max_requests)
    experts = Experts.of(served.engine.model)

    @asynccontextmanager
    async def lifespan(app):
        worker.start(asyncio.get_running_loop())
        yield
        await worker.stop()

    # FastAPI's own pages of documentation load scripts from elsewhere.
    app = FastAPI(title="eight small diffs", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.worker = worker
    app.add_middleware(Guard, limits=limits, api_key=api_key, only_local=only_local, metrics=metrics)
    add_error_handlers(app, metrics)

    @app.get("/", include_in_schema=False)
    async def page():
        return FileResponse(PAGE, media_type="text/html; charset=utf-8", headers=PAGE_HEADERS)

    @app.get("/health")
    async def health():
        """200, or 503 if no request can be answered."""
        if worker.failed or worker.stopping:
            return error_response(503, "the engine has failed" if worker.failed else "the server is stopping")
        return Json({"status": "ok"})

    @app.get("/metrics")
    async def prometheus():
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    model = {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "eight-small-diffs",
        "max_model_len": served.context,
        "chat_template": isinstance(served.template, ChatTemplate),
    }

    @app.get("/v1/models")
    async def models():
        return Json({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str):
        check_model(served, name)
        return Json(model)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request):
        worker.check_room(1)  # before work on the prompt: a full server answers at once
        check_model(served, body.model)
        prompts = await asyncio.to_thread(prompts_of, served, body.prompt)
        answer = Answer(served, worker, body, prompts, limits, Completions(served, body))
        return await answer.respond(request)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request):
        worker.check_room(1)
        check_model(served, body.model)
        messages = [message.plain() for message in body.messages]
        prompt = await asyncio.to_thread(conversation, served, messages)
        answer = Answer(served, worker, body, [prompt], limits, ChatCompletions(served, body))
        return await answer.respond(request)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest):
        """The tokens of a text, or of a conversation in the chat template."""
        if body.model is not None:
            check_model(served, body.model)
        if body.messages is not None:
            messages = [message.plain() for message in body.messages]
            tokens = await asyncio.to_thread(conversation, served, messages)
        else:
            tokens = (await asyncio.to_thread(encode, served, body.prompt)) if body.prompt else []
        return Json({"tokens": tokens, "count": len(tokens), "max_model_len": served.context})

    @app.get("/debug/blocks", include_in_schema=False)
    async def blocks(id: str):
        """For the chat page: the blocks that a request holds, the engine's counts, and its chosen experts."""

        def look():  # in the engine's thread
            held = [table for each in worker.open if each.startswith(f"{id}-") for table in tables(each)]
            return {
                "block_size": served.engine.pool.block_size,
                "tables": held,
                "stats": served.engine.stats(),
                "experts": experts and experts.counts(),
            }

        def tables(request_id):
            return [
                [{"number": number, "references": references} for number, references in table]
                for table in served.engine.blocks_of(request_id)
            ]

        return Json(await worker.call(look))

    return app


PAGE_HEADERS = {
    # The page is one file: whatever else it is made to load does not come from us.
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",
}


class Json(Response):
    """A JSON response. Unpaired surrogates, which a character vocabulary may have, become escapes."""

    media_type = "application/json"

    def render(self, content) -> bytes:
        return to_json(content).encode()


def to_json(content) -> str:
    return json.dumps(content, allow_nan=False, separators=(",", ":"))


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict:
    """An error in OpenAI's shape."""
    kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(status)
    kind = kind or ("server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(status: int, message: str, param=None, code=None, headers=None) -> Json:
    return Json(error_body(status, message, param, code), status, headers)


def add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    """Turns exceptions into responses in OpenAI's shape."""

    def handler(respond):
        async def handle(request, error):
            response = respond(error)
            metrics.refused.labels(response.status_code).inc()
            return response

        return handle

    async def http_error(request: Request, error: HTTPException):
        metrics.refused.labels(error.status_code).inc()
        message = {404: no_address, 405: other_method}.get(error.status_code, lambda *_: str(error.detail))
        return error_response(error.status_code, message(request, error), headers=error.headers)

    def unavailable(error):
        return error_response(503, str(error), headers={"Retry-After": RETRY_AFTER})

    def full(error):
        message = f"{error}: try again later"
        return error_response(429, message, code="too_many_requests", headers={"Retry-After": RETRY_AFTER})

    app.add_exception_handler(RequestValidationError, handler(invalid))
    app.add_exception_handler(Refused, handler(refusal))
    app.add_exception_handler(UserError, handler(lambda error: error_response(400, one_line(error))))
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Full, handler(full))
    app.add_exception_handler(Stopping, handler(unavailable))
    app.add_exception_handler(EngineFailed, handler(lambda error: error_response(500, str(error))))
    app.add_exception_handler(
        Exception, handler(lambda _: error_response(500, "an error in the server: see its log"))
    )


def no_address(request: Request, error: HTTPException) -> str:
    path = request.scope["path"]
    if f"/v1{path}" in {route.path for route in request.app.routes}:
        return f"there is no {path}: use /v1{path} (the base_url of the openai client ends with /v1)"
    return f"there is no {shorten(path)}: /openapi.json lists the addresses of this server"


def other_method(request: Request, error: HTTPException) -> str:
    allowed = (error.headers or {}).get("Allow")
    return f"{request.method} is not for {shorten(request.scope['path'])}: use {allowed}"


def refusal(error: Refused) -> Json:
    return error_response(error.status, str(error), error.param, error.code)


def one_line(error: Exception) -> str:
    return "; ".join(str(error).splitlines())


def invalid(error: RequestValidationError) -> Json:
    """The first of the faults that pydantic found, with the name of the field."""
    errors = error.errors()
    # Of the alternatives of a union, the one that fits best fails deepest.
    first = max((each for each in errors if each["loc"][:2] == errors[0]["loc"][:2]), key=place_depth)
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, Refused):
        return refusal(cause)
    if first["type"] == "json_invalid":
        return error_response(400, f"the body is not JSON: {cause or first['msg']}")
    place = [str(part) for part in first["loc"] if part != "body"]
    # In a union, the place also has the names of types.
    place = [part for part in place if part.isdecimal() or (part.isidentifier() and part not in TYPES)]
    name = ".".join(place)
    if first["type"] == "extra_forbidden":
        return error_response(400, f"unknown field {name!r}", name)
    if not place:
        return error_response(400, "the body must be a JSON object, with Content-Type: application/json")
    found = "" if first["type"] == "missing" else f", not {shorten(first.get('input'))}"
    message = first["msg"].partition(" after validation")[0]
    return error_response(400, f"{name}: {message[0].lower()}{message[1:]}{found}", place[0])


def place_depth(error: dict) -> int:
    return len(error["loc"])


TYPES = ("str", "int", "bool", "float", "constrained")


def shorten(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


class Guard:
    """Middleware that sees a request first: its Host header, the API key, and the size of its body.

    The body is read whole before the application gets it, so that a client that sends it slowly, or never
    ends it, holds nothing but its connection.
    """

    def __init__(self, app, limits: Limits, api_key: str | None, only_local: bool, metrics: Metrics):
        self.app, self.limits, self.metrics = app, limits, metrics
        self.key = f"Bearer {api_key}".encode() if api_key else None
        self.only_local = only_local

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        response, body = self.refusal(scope["path"], headers), b""
        try:
            # A client that is refused sends its body first: it may not read an answer before that.
            body = await asyncio.wait_for(self.read(receive, keep=response is None), SECONDS_FOR_THE_BODY)
        except TooLarge:
            limit = f"{self.limits.max_body:,} bytes"
            response = response or error_response(
                413, f"the body is larger than {limit}, this server's limit"
            )
        except asyncio.TimeoutError:
            response = error_response(408, f"the body did not arrive in {SECONDS_FOR_THE_BODY} seconds")
        if body is None:  # the client has gone
            return None
        if response is not None:
            self.metrics.refused.labels(response.status_code).inc()
            return await response(scope, receive, send)
        replayed = False

        async def receive_again():
            nonlocal replayed
            if replayed:
                return await receive()  # http.disconnect, once the client goes away
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, receive_again, send)

    def refusal(self, path: str, headers: dict[bytes, bytes]) -> Response | None:
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self.only_local and not is_local(host):
            # A web page may have made its own name resolve to 127.0.0.1, to get around the browser's rules.
            return error_response(
                403, f"the host {host[:60]!r} is not this machine: start the server with --host to allow it"
            )
        given = headers.get(b"authorization", b"")
        if self.key and path not in OPEN_PATHS and not hmac.compare_digest(given, self.key):
            message = "the API key is missing" if not given else "the API key is wrong"
            return error_response(
                401,
                f"{message}: send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return None

    async def read(self, receive, keep: bool) -> bytes | None:
        """The body; None if the client has gone. Raises TooLarge once there is no more, or far too much."""
        parts, size, more = [], 0, True
        while more and size < MOST_TO_DISCARD:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            more = message.get("more_body", False)
            if keep and size <= self.limits.max_body:
                parts.append(part)
        if size > self.limits.max_body:
            raise TooLarge
        return b"".join(parts)


def is_local(host: str) -> bool:
    """Whether a Host header, with or without a port, names this machine for itself."""
    name = re.sub(r":\d*$", "", host)
    try:
        return name == "localhost" or ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


class TooLarge(Exception):
    """A body is larger than the limit."""


def check_model(served: Served, name: str) -> None:
    if name != served.name:
        message = f"the model {shorten(name)} does not exist: this server has {served.name!r}"
        raise Refused(message, "model", "model_not_found", 404)


def encode(served: Served, text: str) -> list[int]:
    try:
        return served.tokenizer.encode(text).tolist()
    except UserError as error:  # such as a character that the vocabulary does not have
        raise Refused(one_line(error), "prompt") from None


def prompts_of(served: Served, prompt: str | list) -> list[list[int]]:
    """The tokens of each prompt of a request."""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        prompt = [prompt]
    found = []
    for each in prompt:
        tokens = encode(served, each) if isinstance(each, str) else each
        if not tokens:
            raise Refused("the prompt is empty: it has no tokens", "prompt")
        unknown = [token for token in tokens if not 0 <= token < served.tokenizer.vocab_size]
        if unknown:
            known = f"the model has the tokens 0 to {served.tokenizer.vocab_size - 1}"
            raise Refused(f"the prompt has the token {shorten(unknown[0])}: {known}", "prompt")
        found.append(tokens)
    return found


def conversation(served: Served, messages: list[dict]) -> list[int]:
    """The tokens of a conversation, up to where the answer begins."""
    if isinstance(served.template, UserError):
        reason = one_line(served.template).removesuffix(", or leave out --chat")
        raise Refused(f"{reason}; or use /v1/completions, which needs no chat template", "messages")
    try:
        text = served.template.render(messages)
        tokens = chat_template.encode(served.tokenizer, text).tolist()
    except UserError as error:
        raise Refused(one_line(error), "messages") from None
    if not tokens:
        raise Refused("the conversation is empty: it has no tokens", "messages")
    return tokens


def token_text(served: Served, token: int) -> str:
    """The text of one token. Bytes that are only a part of a character are shown as escapes."""
    return token_bytes(served, token).decode("utf-8", "backslashreplace")


def token_bytes(served: Served, token: int) -> bytes:
    if hasattr(served.tokenizer, "decode_bytes"):
        return served.tokenizer.decode_bytes([token])
    return served.tokenizer.decode([token]).encode("utf-8", "surrogatepass")


def finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB) if not math.isnan(logprob) else LOWEST_LOGPROB


class Completions:
    """The responses of /v1/completions."""

    object = chunk_object = "text_completion"
    prefix = "cmpl"
    default_max_tokens = 16  # OpenAI's

    def __init__(self, served: Served, body: CompletionRequest):
        self.served, self.n_logprobs = served, body.logprobs
        self.max_tokens = body.max_tokens
        self.offsets: dict[int, int] = {}  # characters so far of each choice's tokens

    def first(self, index: int) -> dict | None:
        return None

    def chunk(self, index: int, text: str, logprobs: dict | None, finish_reason: str | None) -> dict:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    choice = chunk

    def logprobs(self, index: int, output: Output) -> dict | None:
        if self.n_logprobs is None:
            return None
        found = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, entry in zip(output.token_ids, output.logprobs, strict=True):
            text = token_text(self.served, token)
            top = {}
            for each, logprob in entry.top[: self.n_logprobs]:
                top.setdefault(token_text(self.served, each), finite(logprob))
            top.setdefault(text, finite(entry.logprob))  # OpenAI lists the token itself too
            found["tokens"].append(text)
            found["token_logprobs"].append(finite(entry.logprob))
            found["top_logprobs"].append(top)
            found["text_offset"].append(self.offsets.get(index, 0))
            self.offsets[index] = self.offsets.get(index, 0) + len(text)
        return found

    def joined(self, parts: list[dict]) -> dict | None:
        """The log-probabilities of several outputs in one."""
        if self.n_logprobs is None:
            return None
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        return {name: [value for part in parts for value in part[name]] for name in names}


class ChatCompletions:
    """The responses of /v1/chat/completions."""

    object, chunk_object = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"
    default_max_tokens = None  # what fits

    def __init__(self, served: Served, body: ChatRequest):
        self.served = served
        self.n_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        self.max_tokens = body.max_completion_tokens or body.max_tokens

    def first(self, index: int) -> dict | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def chunk(self, index: int, text: str, logprobs: dict | None, finish_reason: str | None) -> dict:
        delta = {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def choice(self, index: int, text: str, logprobs: dict | None, finish_reason: str | None) -> dict:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}

    def logprobs(self, index: int, output: Output) -> dict | None:
        if self.n_logprobs is None:
            return None
        content = [
            self.entry(token, entry.logprob)
            | {"top_logprobs": [self.entry(*each) for each in entry.top[: self.n_logprobs]]}
            for token, entry in zip(output.token_ids, output.logprobs, strict=True)
        ]
        return {"content": content, "refusal": None}

    def entry(self, token: int, logprob: float) -> dict:
        text, found = token_text(self.served, token), token_bytes(self.served, token)
        return {"token": text, "logprob": finite(logprob), "bytes": list(found)}

    def joined(self, parts: list[dict]) -> dict | None:
        if self.n_logprobs is None:
            return None
        return {"content": [entry for part in parts for entry in part["content"]], "refusal": None}


class Answer:
    """One HTTP request's answer: its prompts, each of which is a request to the engine."""

    def __init__(
        self,
        served: Served,
        worker: Worker,
        body: CompletionRequest | ChatRequest,
        prompts: list[list[int]],
        limits: Limits,
        style: Completions | ChatCompletions,
    ):
        self.worker, self.body, self.prompts, self.style = worker, body, prompts, style
        self.id = f"{style.prefix}-{uuid.uuid4().hex}"
        self.base = {"id": self.id, "created": int(time.time()), "model": served.name}
        self.n = body.n or 1
        texts = len(prompts) * body.texts
        if texts > limits.max_texts:
            which = "best_of" if body.best_of else "n"
            message = f"the request is for {texts} texts, and this server's limit is {limits.max_texts}"
            raise Refused(message, which if body.texts > 1 else "prompt")
        self.params = [self.sampling_params(len(prompt), served) for prompt in prompts]
        self.ids = [f"{self.id}-{i}" for i in range(len(prompts))]
        self.generated = 0

    def sampling_params(self, n_prompt: int, served: Served) -> SamplingParams:
        """What the engine needs to know. Raises Refused if the answer cannot fit."""
        body, room = self.body, served.context - n_prompt
        name = "messages" if isinstance(body, ChatRequest) else "prompt"
        prompt = "the prompt has 1 token" if n_prompt == 1 else f"the prompt has {n_prompt:,} tokens"
        if room < 1:
            raise Refused(
                f"{prompt}; it and the answer together can have {served.context:,}: shorten the prompt",
                name,
                "context_length_exceeded",
            )
        wanted = self.style.max_tokens
        if wanted is not None and wanted > room:
            raise Refused(
                f"{prompt} and max_tokens is {wanted:,}; together they can be {served.context:,}: "
                f"shorten the prompt, or lower max_tokens to {room:,}",
                name,
                "context_length_exceeded",
            )
        vocab_size = served.tokenizer.vocab_size
        given = {
            "max_tokens": wanted or min(room, self.style.default_max_tokens or room),
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "logprobs": self.style.n_logprobs,
            "stop": body.stops,
            "stop_token_ids": [
                check_token(t, vocab_size, "stop_token_ids") for t in body.stop_token_ids or ()
            ],
            "logit_bias": {
                check_token(t, vocab_size, "logit_bias"): v for t, v in (body.logit_bias or {}).items()
            },
        }
        same = ("top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
        for field in (*same, "seed", "ignore_eos", "n", "best_of", "length_penalty"):
            if getattr(body, field) is not None:
                given[field] = getattr(body, field)
        if body.use_beam_search:
            given |= {"beams": body.texts, "best_of": None}
        return SamplingParams(**given)

    async def respond(self, request: Request) -> Response:
        """The response, or the start of a stream. Raises what Worker.add raises."""
        self.worker.check_room(len(self.prompts))
        self.requests: list[Open] = []
        try:
            for request_id, prompt, params in zip(self.ids, self.prompts, self.params, strict=True):
                self.requests.append(await self.worker.add(request_id, prompt, params, self.n))
            if self.body.stream:
                return Stream(self.events(), self.abort)
            return await self.whole(request)
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Frees what is not finished."""
        for request_id in self.ids:
            self.worker.abort(request_id)

    async def outputs(self) -> AsyncIterator[tuple[int, Output]]:
        """The outputs of all prompts as they come, each with the index of its choice."""
        merged: asyncio.Queue = asyncio.Queue()

        async def forward(number: int, request: Open):
            try:
                async for output in self.worker.outputs(request):
                    merged.put_nowait((number * self.n + output.index, output))
                merged.put_nowait(None)
            except (Stopping, EngineFailed) as error:
                merged.put_nowait(error)

        tasks = [asyncio.create_task(forward(i, request)) for i, request in enumerate(self.requests)]
        try:
            for _ in tasks:
                while (item := await merged.get()) is not None:
                    if isinstance(item, Exception):
                        raise item
                    self.generated += len(item[1].token_ids)
                    yield item
        finally:
            for task in tasks:
                task.cancel()

    async def whole(self, request: Request) -> Response:
        """All of the answer at once. If the client goes away in the meantime, the answer ends."""
        answer = asyncio.create_task(self.collect())
        gone = asyncio.create_task(request.receive())  # after the body, the only message is http.disconnect
        try:
            await asyncio.wait([answer, gone], return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                self.abort()
                return Response(status_code=499)  # nobody reads it
            return Json(answer.result())
        finally:
            answer.cancel()
            gone.cancel()

    async def collect(self) -> dict:
        n_choices = len(self.prompts) * self.n
        texts, logprobs = [""] * n_choices, [[] for _ in range(n_choices)]
        reasons = [None] * n_choices
        async for index, output in self.outputs():
            texts[index] += output.text
            logprobs[index].append(self.style.logprobs(index, output))
            reasons[index] = output.finish_reason
        choices = [
            self.style.choice(i, texts[i], self.style.joined(logprobs[i]), reasons[i])
            for i in range(n_choices)
        ]
        return self.base | {"object": self.style.object, "choices": choices, "usage": self.usage()}

    async def events(self) -> AsyncIterator[str]:
        """The stream, as server-sent events."""
        options = self.body.stream_options
        with_usage = options is not None and options.include_usage
        base = self.base | {"object": self.style.chunk_object} | ({"usage": None} if with_usage else {})
        try:
            for index in range(len(self.prompts) * self.n):
                first = self.style.first(index)
                if first is not None:
                    yield event(base | {"choices": [first]})
            async for index, output in self.outputs():
                logprobs = self.style.logprobs(index, output)
                if output.text or logprobs or output.finish_reason:
                    choice = self.style.chunk(index, output.text, logprobs, output.finish_reason)
                    yield event(base | {"choices": [choice]})
            if with_usage:
                yield event(base | {"choices": [], "usage": self.usage()})
            yield "data: [DONE]\n\n"
        except Stopping as error:
            yield event(error_body(503, str(error)))
        except EngineFailed as error:
            yield event(error_body(500, str(error)))

    def usage(self) -> dict:
        n_prompt = sum(map(len, self.prompts))
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": self.generated,
            "total_tokens": n_prompt + self.generated,
        }


def check_token(token: int | str, vocab_size: int, field: str) -> int:
    """The token as a number. Raises Refused if there is no such token."""
    number = token if isinstance(token, int) else int(token) if token.isdecimal() and len(token) < 10 else -1
    if not 0 <= number < vocab_size:
        raise Refused(f"{field} has {shorten(token)}: the model has the tokens 0 to {vocab_size - 1}", field)
    return number


def event(content: dict) -> str:
    return f"data: {to_json(content)}\n\n"


class Stream(StreamingResponse):
    """A stream of server-sent events that calls `at_end` however it ends, even before its first event."""

    def __init__(self, events: AsyncIterator[str], at_end):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the latter is for nginx
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.at_end = at_end

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.at_end()
