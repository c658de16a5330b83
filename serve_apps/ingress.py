"""The HTTP ingress: Ray Serve LLM's OpenAI routes, behind a key, and the routes `/sere/` behind a token of their own.

The only place that touches Ray Serve LLM's internals: its routes, its FastAPI application and its model cards, as
`ray.llm._internal.serve.core.ingress.dev_ingress` does. `pyproject.toml` pins the release that they were tested with.
"""

import asyncio
import hmac
import json
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args

import ray
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from ray.serve.llm import LLMConfig
from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sere_dist.admin import ACTIVITY_PATH, ADMIN_PATH, CONTROL_PATH, SETTINGS_PATH, TRIAL_PATH
from sere_dist.config import CHANGEABLE, ReroutingConfig
from sere_dist.environment import ADMIN_TOKEN, API_KEY, EXACT_API_KEY, Secrets, fingerprint
from sere_dist.method.counters import COUNTERS
from sere_dist.vllm_plugin.rows import KEEP, OFF, OPT_OUT, keeps_experts, opts_out
from serve_apps.metrics import RequestMetrics
from serve_apps.server import EngineDied, EngineIsFull, EngineIsGone
from serve_apps.settings import Trial

try:
    from ray.llm._internal.common.dict_utils import maybe_apply_llm_deployment_config_defaults
    from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata
    from ray.llm._internal.serve.core.ingress.ingress import DEFAULT_ENDPOINTS, init
    from ray.serve._private.constants import (
        SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER,
        SERVE_HTTP_REQUEST_TIMEOUT_S_HEADER,
    )
except ImportError as error:
    raise ImportError(
        f"Ray {ray.__version__} lacks what the ingress builds on ({error}); it was tested with 2.60.0"
    ) from error

NOT_REROUTED = "The model is served without re-routing."
UNAVAILABLE = "service_unavailable"  # kind of an error
REPLICA_DIED = "The replica that worked on this request died. Send the request again."
ACTIVITY_SECONDS = 5  # that replicas may take to say what they run
AGAIN_SECONDS = 0.2  # before a request goes to another replica
RETRY_SECONDS = 1  # what clients are told to wait when no replica can take their request
QUOTED = 100  # characters of a model's name that errors quote
HEADER = "x-sere-rerouting"  # says as a request's `vllm_xargs` do whether it opts out; a gateway can set it
OptOutBy = Literal["header", "body"]  # what a request can opt out by, beside its key
OPT_OUT_BY: tuple[OptOutBy, ...] = get_args(OptOutBy)
PAGE_PATH, PAGE = "/", Path(__file__).with_name("page.html")
# What the page may do: nothing but run what is in it, and ask the server that it came from.
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# With these, Ray Serve's proxy lets a request turn its timeout off, and go on when its client has gone.
OPERATORS = (SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER, SERVE_HTTP_REQUEST_TIMEOUT_S_HEADER)

logger = logging.getLogger("ray.serve")


def error_body(status: int, message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """Returns an error in the shape of OpenAI's."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code or status}}


def error_response(status: int, message: str, kind: str = "invalid_request_error", code: str | None = None):
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": str(RETRY_SECONDS)}}.get(status)
    return JSONResponse(error_body(status, message, kind, code), status, headers)


def http_error(_request: Request, error: HTTPException) -> JSONResponse:
    """An unknown model or route, or a replica that died."""
    if error.status_code == 503:
        return error_response(503, str(error.detail), UNAVAILABLE)
    return error_response(error.status_code, str(error.detail))


def invalid_request(_request: Request, error: RequestValidationError) -> JSONResponse:
    """A body or parameter that does not fit. Unlike Ray's answer, which quotes the input, this one is always JSON."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    return error_response(400, f"{place}: {first['msg']}".removeprefix(": "), code="invalid_parameter")


def secret_of(headers: Iterable[tuple[bytes, bytes]], secrets: Iterable[str]) -> str | None:
    """Returns which of `secrets` a request's `Authorization: Bearer ...` is."""
    given = next((value for name, value in headers if name.lower() == b"authorization"), b"")
    scheme, _space, secret = given.partition(b" ")
    # All are compared, and each in constant time.
    matching = [each for each in secrets if hmac.compare_digest(secret.strip(), each.encode())]
    return matching[0] if matching and scheme.lower() == b"bearer" else None


def count_prompts(prompt: Any) -> int:
    """Returns how many prompts a completion has: a text or a list of token ids is one, a list of such are several."""
    return len(prompt) if isinstance(prompt, list) and not all(isinstance(each, int) for each in prompt) else 1


class Keys:
    """The API keys that open the door, and those of them whose requests are not re-routed."""

    def __init__(self):
        self.ordinary, self.exact = Secrets(API_KEY), Secrets(EXACT_API_KEY)

    def __call__(self) -> tuple[str, ...]:
        return self.ordinary() + self.exact()


async def read_or_cancel(answer: DeploymentResponseGenerator) -> AsyncIterator[Any]:
    """Yields a replica's answer. When nobody reads it any more, the replica and its engine stop as well.

    Ray Serve stops a call when the request that made it is cancelled. The router's own timeout does not cancel: it
    answers 408, and the engine would go on.
    """
    try:
        async for part in answer:
            yield part
    except (asyncio.CancelledError, GeneratorExit):
        answer.cancel()
        raise


class ReadOrCancel:
    """A deployment's handle, as the ingress uses it, whose answers are read by `read_or_cancel`."""

    def __init__(self, handle: DeploymentHandle):
        self.handle = handle

    def options(self, **options: Any) -> "ReadOrCancel":
        return ReadOrCancel(self.handle.options(**options))

    def __getattr__(self, method: str) -> SimpleNamespace:
        call = getattr(self.handle, method)
        return SimpleNamespace(remote=lambda *args, **kwargs: read_or_cancel(call.remote(*args, **kwargs)))


class Guard:
    """Outermost around the ingress: asks for a key, takes no body that is too large and no more requests at a time than
    it may, and lets no traceback out.

    `open_paths` need no API key. A request that is one too many is refused before anything is done for it: what the
    engines refuse has been parsed and sent to them, and under load the ingress would fall behind with that.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_body_bytes: int,
        max_requests: int | None = None,
        open_paths: frozenset[str] = frozenset(),
    ):
        self.app, self.max_body_bytes, self.max_requests = app, max_body_bytes, max_requests
        self.open_paths = open_paths
        self.keys = Keys()
        self.requests = 0  # that are worked on

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))  # of an application not at /
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})  # the API has no such route
        elif (keys := self.keys()) and not self._is_open(path) and not secret_of(scope["headers"], keys):
            message = "Incorrect or missing API key: send it as 'Authorization: Bearer KEY'."
            await error_response(401, message, code="invalid_api_key")(scope, receive, send)
        elif given := [name for name in OPERATORS if name.encode() in dict(scope["headers"])]:
            message = f"A request may not set {', '.join(given)}."
            await error_response(400, message, code="invalid_header")(scope, receive, send)
        elif scope["method"] != "POST" or path.startswith(ADMIN_PATH):
            await self._take(scope, receive, send)
        elif self.max_requests is not None and self.requests >= self.max_requests:
            message = f"The server works on {self.max_requests:,} requests, and takes no more. Send it again later."
            await error_response(503, message, UNAVAILABLE)(scope, receive, send)
        else:
            self.requests += 1
            try:
                await self._take(scope, receive, send)
            finally:
                self.requests -= 1

    def _is_open(self, path: str) -> bool:
        return path in self.open_paths or (path.startswith(ADMIN_PATH) and path != ACTIVITY_PATH)

    async def _take(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, unless its body is larger than it may be: declared to be, or as it comes."""
        message = f"The body is larger than {self.max_body_bytes:,} bytes (max_body_bytes)."
        too_large = error_response(413, message, code="body_too_large")
        declared = dict(scope["headers"]).get(b"content-length", b"")
        if declared.isdigit() and int(declared) > self.max_body_bytes:
            await too_large(scope, receive, send)
            return
        size, is_started = 0, False

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            return message if size <= self.max_body_bytes else {"type": "http.disconnect"}

        async def unless_too_large(message: Message) -> None:
            nonlocal is_started
            if size <= self.max_body_bytes:
                await send(message)
            elif not is_started:  # whatever was made of the part of it
                await too_large(scope, receive, send)
            is_started = True

        await self._answer(scope, counted, unless_too_large)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ray's answers to unexpected errors quote the exception, which has the worker's traceback in it."""
        request_id = dict(scope["headers"]).get(b"x-request-id", b"none").decode(errors="replace")
        text = f"Internal error; the server's log has it under request id {request_id}."
        internal_error = error_response(500, text, kind="internal_error")
        started = failed = False

        async def without_traceback(message: Message) -> None:
            nonlocal started, failed
            if message["type"] == "http.response.start" and message["status"] == 500:
                failed = True
                await internal_error(scope, receive, send)
            elif not failed:
                await send(message)
            started = True

        try:
            await self.app(scope, receive, without_traceback)
        except Exception:
            if started:  # too late for another answer: the connection breaks off
                raise
            logger.exception("request %s failed", request_id)
            await internal_error(scope, receive, send)


class SereIngress(OpenAiIngress):
    """Ray Serve LLM's ingress with the routes `/sere/settings`, `/sere/trial`, `/sere/control` and `/sere/activity`,
    and a page.

    `keeper` is the application's `SettingsKeeper`, if it has one. `replicas` are the servers of a model that is
    re-routed, and `shape` says how many experts it has. `bounds` has the most answers that a request may ask
    for (`n`), and the most prompts that it may bring. `cache_per_key`, `opt_out_by`: see `AppConfig`.

    Raises:
        ValueError: a key is required and the environment of this process has none, or what it has can't be used.
    """

    def __init__(
        self,
        *args: Any,
        keeper: DeploymentHandle | None = None,
        replicas: DeploymentHandle | None = None,
        shape: dict[str, int] | None = None,
        require_api_key: bool = False,
        cache_per_key: bool = False,
        opt_out_by: Sequence[OptOutBy] = OPT_OUT_BY,
        bounds: dict[str, int] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.bounds, self.cache_per_key, self.opt_out_by = bounds or {}, cache_per_key, opt_out_by
        self.keys = Keys()
        keys = self.keys()
        if require_api_key and not keys:
            raise ValueError(
                f"require_api_key is on, but this node's environment has neither {API_KEY} nor {API_KEY}_FILE: set one "
                "before Ray starts on the nodes that run the ingress"
            )
        self.keeper, self.replicas, self.shape = keeper, replicas, shape or {}
        self.requests = None if keeper is None else RequestMetrics(", ".join(self._model_cards))
        self.admin_tokens = Secrets(ADMIN_TOKEN)
        if set(keys) & set(self.admin_tokens()):
            raise ValueError(f"{ADMIN_TOKEN} is an API key as well: clients could change settings. Use another secret")

    async def _get_model_id(self, model: str | None) -> str:
        """Ray Serve LLM takes `NAME:ADAPTER` as well, and keeps a handle of every such name for ever. Nothing here has
        adapters."""
        if model is not None and model not in self._model_cards:
            raise HTTPException(404, f"There is no model {model[:QUOTED]!r}; there is {', '.join(self._model_cards)}.")
        return await super()._get_model_id(model)

    def _get_configured_serve_handle(self, model_id: str) -> Any:
        return ReadOrCancel(super()._get_configured_serve_handle(model_id))

    def _mark(self, body: Any, request: Request) -> None:
        """Lets the key and the header of a request decide what its body may leave open."""
        key = secret_of(request.scope["headers"], self.keys())
        if hasattr(body, "vllm_xargs"):
            by, asked = self._opted_out_by(body, request, is_exact=key in self.keys.exact())
            if by is not None:
                body.vllm_xargs = {**(body.vllm_xargs or {}), OPT_OUT: asked}
            if self.requests is not None:
                self.requests.count(by)
        if self.cache_per_key and key is not None and hasattr(body, "cache_salt"):
            body.cache_salt = hmac.new(key.encode(), (body.cache_salt or "").encode(), "sha256").hexdigest()

    def _opted_out_by(self, body: Any, request: Request, *, is_exact: bool) -> tuple[str | None, str]:
        """Returns what opts a request out of re-routing, and into what (`off` or `keep`).

        That is its `key`, its `header` or its `body`; None: nothing does.

        Raises:
            HTTPException: the header or the body would, and may not. Whoever asks for a model's own answer gets no
                other without being told.
        """
        claims = {"header": {OPT_OUT: request.headers.get(HEADER, "")}, "body": body.vllm_xargs}
        claimed = [by for by in OPT_OUT_BY if opts_out(claims[by]) or keeps_experts(claims[by])]
        if is_exact:
            return "key", KEEP if any(keeps_experts(claims[by]) for by in claimed) else OFF
        if allowed := [by for by in claimed if by in self.opt_out_by]:
            return allowed[0], KEEP if keeps_experts(claims[allowed[0]]) else OFF
        if claimed:
            what = {"header": f"the header {HEADER}", "body": f"vllm_xargs.{OPT_OUT}"}[claimed[0]]
            raise HTTPException(
                403,
                f"A request may not opt out of re-routing by {what} here: leave it out, or use a key that opts out.",
            )
        return None, OFF

    async def _get_response(
        self, *, body: Any, call_method: str, raw_request: Request | None = None
    ) -> AsyncGenerator[Any]:
        """Sends a request that no engine has seen to another replica. Not one that an engine has: it may be what killed
        it, and would kill the others."""
        asked = {"n": getattr(body, "n", None) or 1, "prompt": count_prompts(getattr(body, "prompt", None))}
        for name, most in self.bounds.items():
            if asked[name] > most:
                raise HTTPException(400, f"{name}: {asked[name]} are more than the {most} that a request may have.")
        if raw_request is not None:
            self._mark(body, raw_request)
        begun = False
        while True:
            try:
                async for response in super()._get_response(
                    body=body, call_method=call_method, raw_request=raw_request
                ):
                    yield response
                    begun = True
                return
            except EngineIsGone:
                await asyncio.sleep(AGAIN_SECONDS)
            except EngineIsFull as refusal:
                raise HTTPException(503, str(refusal.args[0])) from None
            except (EngineDied, RayActorError) as error:
                logger.warning("a request lost its replica: %s", type(error).__name__)
                if not begun:
                    raise HTTPException(503, REPLICA_DIED) from error
                yield f"data: {json.dumps(error_body(503, REPLICA_DIED, UNAVAILABLE))}\n\n"
                return

    async def page(self) -> HTMLResponse:
        """A page on which to ask the model with and without re-routing. It has no secrets, and asks for the keys."""
        return HTMLResponse(PAGE.read_text(), headers={"Content-Security-Policy": PAGE_POLICY})

    async def activity(self) -> JSONResponse:
        """What every layer has run so far, summed over the replicas: the counters of the reference, by layer."""
        if self.replicas is None:
            return error_response(404, NOT_REROUTED, code="not_rerouted")
        try:
            asked = self.replicas.broadcast("activity")
            answers = await asked.results_async(timeout_s=ACTIVITY_SECONDS, return_exceptions=True)
        except TimeoutError:
            return error_response(503, "The replicas are too busy to say what they run.", UNAVAILABLE)
        totals: dict[int, Counter[str]] = {}
        for layers in answers:
            if isinstance(layers, Exception):  # of a replica that starts, is busy or dies
                continue
            for layer, counters in layers.items():
                numbers = {name: counters[name] for name in COUNTERS}
                totals.setdefault(layer, Counter()).update(numbers)
        return JSONResponse({**self.shape, "layers": totals})

    async def get_settings(self, request: Request) -> JSONResponse:
        """The settings in force, the replicas that run them, the trial if there is one, and what was measured."""
        if refused := self._refused(request):
            return refused
        assert self.keeper is not None  # without, it is refused
        return JSONResponse(await self.keeper.state.remote())

    async def change_settings(self, request: Request) -> JSONResponse:
        """Changes settings on every replica, from the next step on. A trial is over then.

        202 instead of 200 says that some replicas, `pending`, have not confirmed yet; they are told until they do.
        """
        return await self._tell_keeper(request, "change", CHANGEABLE)

    async def start_trial(self, request: Request) -> JSONResponse:
        """Changes settings on some replicas or all, until a limit is exceeded. A trial that is there is over then.

        202 as for a change of settings.
        """
        return await self._tell_keeper(request, "try_out", tuple(Trial.model_fields))

    async def end_trial(self, request: Request) -> JSONResponse:
        """Ends the trial, if there is one: the settings in force hold on every replica.

        202 as for a change of settings.
        """
        return await self._tell_keeper(request, "try_out", None)

    async def pin_price(self, request: Request) -> JSONResponse:
        """Stops the controller at the price in force, or lets it go on.

        202 as for a change of settings.
        """
        return await self._tell_keeper(request, "pin", ("pinned",))

    async def _tell_keeper(self, request: Request, method: str, fields: tuple[str, ...] | None) -> JSONResponse:
        """Calls a method of the keeper with the body, an object of these fields; or with None, if it has no fields."""
        if refused := self._refused(request):
            return refused
        told = None
        if fields is not None:
            try:
                told = json.loads(await request.body())
            except (ValueError, RecursionError):
                return error_response(400, "The body is not JSON.")
            if not isinstance(told, dict):
                return error_response(400, f"The body must be an object with some of: {', '.join(fields)}.")
        token = secret_of(request.scope["headers"], self.admin_tokens()) or ""
        by = f"token {fingerprint(token)}, request {request.headers.get('x-request-id', 'none')}"
        assert self.keeper is not None  # without, it is refused
        state = await getattr(self.keeper, method).remote(told, by=by)
        if "error" in state:
            return error_response(400, state["error"])
        return JSONResponse(state, 202 if state["pending"] or not state["replicas"] else 200)

    def _refused(self, request: Request) -> JSONResponse | None:
        tokens = self.admin_tokens()
        if not tokens:
            return error_response(403, f"This route is closed: the server has no {ADMIN_TOKEN}.", code="closed")
        if not secret_of(request.scope["headers"], tokens):
            message = "Incorrect or missing admin token: send it as 'Authorization: Bearer TOKEN'."
            return error_response(401, message, code="invalid_admin_token")
        if self.keeper is None:
            return error_response(404, NOT_REROUTED, code="not_rerouted")
        return None


def _body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"content": {"application/json": {"schema": schema | {"additionalProperties": False}}}}}


def _settings_schema() -> dict[str, Any]:
    properties = ReroutingConfig.model_json_schema()["properties"]
    return {"type": "object", "properties": {name: properties[name] for name in CHANGEABLE}}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    meanings = {
        202: "Some replicas have not confirmed the change yet.",
        400: "A setting is unknown or out of range.",
        401: "The admin token is missing or wrong.",
        403: "The server has no admin token.",
        404: NOT_REROUTED,
        503: "The replicas are too busy to say it.",
    }
    return {status: {"description": meanings[status]} for status in statuses}


PIN_SCHEMA = {"type": "object", "properties": {"pinned": {"type": "boolean"}}, "required": ["pinned"]}
ENDPOINTS: dict[str, Callable[[FastAPI], Callable]] = {
    **DEFAULT_ENDPOINTS,
    "get_settings": lambda app: app.get(SETTINGS_PATH, responses=_errors(401, 403, 404)),
    "change_settings": lambda app: app.patch(
        SETTINGS_PATH, responses=_errors(202, 400, 401, 403, 404), openapi_extra=_body(_settings_schema())
    ),
    "start_trial": lambda app: app.put(
        TRIAL_PATH, responses=_errors(202, 400, 401, 403, 404), openapi_extra=_body(Trial.model_json_schema())
    ),
    "pin_price": lambda app: app.put(
        CONTROL_PATH, responses=_errors(202, 400, 401, 403, 404), openapi_extra=_body(PIN_SCHEMA)
    ),
    "end_trial": lambda app: app.delete(TRIAL_PATH, responses=_errors(202, 401, 403, 404)),
    "activity": lambda app: app.get(ACTIVITY_PATH, responses=_errors(404, 503)),
}
PAGE_ENDPOINT: dict[str, Callable[[FastAPI], Callable]] = {
    "page": lambda app: app.get(PAGE_PATH, include_in_schema=False),
}


def guard(
    app: FastAPI, allow_origins: list[str], max_body_bytes: int, max_requests: int | None, *, has_page: bool = False
) -> None:
    """Puts the guard around an application, and lets web pages of some origins use it, no others.

    Ray Serve LLM would let pages of all origins. What a browser asks first, whether it may ask, has no key.
    """
    app.user_middleware = [each for each in app.user_middleware if each.cls is not CORSMiddleware]
    open_paths = frozenset([PAGE_PATH] if has_page else [])
    app.add_middleware(Guard, max_body_bytes=max_body_bytes, max_requests=max_requests, open_paths=open_paths)
    if allow_origins:
        app.add_middleware(CORSMiddleware, allow_origins=allow_origins, allow_methods=["*"], allow_headers=["*"])


def build_ingress(
    llm_config: LLMConfig,
    servers: Application,
    options: dict[str, Any],
    keeper: Application | None = None,
    shape: dict[str, int] | None = None,
    *,
    has_page: bool,
    require_api_key: bool,
    cache_per_key: bool,
    opt_out_by: Sequence[OptOutBy],
    allow_origins: list[str],
    max_body_bytes: int,
    max_requests: int | None,
    bounds: dict[str, int],
) -> Application:
    """Returns the application: an ingress before `servers`, with Ray Serve's deployment options. Web pages of
    `allow_origins` may use it, and one of its own if it has that.

    As `ray.serve.llm.build_openai_app`, which takes another class for its ingress but no other route.
    """
    app: FastAPI = init()
    app.exception_handler(HTTPException)(http_error)
    app.exception_handler(RequestValidationError)(invalid_request)
    guard(app, allow_origins, max_body_bytes, max_requests, has_page=has_page)
    endpoints = ENDPOINTS | PAGE_ENDPOINT if has_page else ENDPOINTS
    ingress = make_fastapi_ingress(SereIngress, endpoint_map=endpoints, app=app)
    options = maybe_apply_llm_deployment_config_defaults(SereIngress.get_deployment_options([llm_config]), options)
    return serve.deployment(**options)(ingress).bind(
        llm_deployments={llm_config.model_id: servers},
        model_cards={llm_config.model_id: to_model_metadata(llm_config.model_id, llm_config)},
        keeper=keeper,
        replicas=None if keeper is None else servers,
        shape=shape,
        require_api_key=require_api_key,
        cache_per_key=cache_per_key,
        opt_out_by=opt_out_by,
        bounds=bounds,
    )
