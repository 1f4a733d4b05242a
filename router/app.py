"""The router's HTTP surface: every route, and how each error answers, on one screen."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client.registry import CollectorRegistry
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router import protocol
from router.admission import Admission
from router.call import request_id
from router.catalog import Catalog, Model
from router.chat import ChatCompletions
from router.errors import ApiError, InternalError, InvalidRequest, MethodNotAllowed, UnknownPath
from router.metrics import RouterMetrics
from router.replicas import Replicas
from router.settings import HostedModel, RouterSettings
from router.trunk import TrunkOptions
from serving.exposition import CONTENT_TYPE

CHAT_COMPLETIONS = "/v1/chat/completions"

Scrape = Callable[[bool], Awaitable[bytes]]
"""The metrics as text: of the whole deployment, or (true) of this process."""


class Application:
    """A whole router but for its socket. Chat completions go straight to their endpoint; everything else goes
    through FastAPI."""

    def __init__(
        self,
        settings: RouterSettings,
        *,
        identity: str,
        secret: bytes,
        registry: CollectorRegistry,
        scrape: Scrape,
    ) -> None:
        """`identity` names this process to replicas and in logs."""
        self.metrics = RouterMetrics(registry)
        self.catalog = Catalog(
            (build_model(model, settings, identity, secret, self.metrics) for model in settings.models),
            settings.created,
        )
        self.chat = ChatCompletions(self.catalog, settings, self.metrics)
        self._others = with_request_id(build_api(self.catalog, self.chat, scrape))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == CHAT_COMPLETIONS and scope["method"] == "POST":
            await self.chat(scope, receive, send)
        else:
            await self._others(scope, receive, send)

    async def close(self) -> None:
        """Leave every replica."""
        await asyncio.gather(*(model.replicas.close() for model in self.catalog.models))


def build_model(
    settings: HostedModel, router: RouterSettings, identity: str, secret: bytes, metrics: RouterMetrics
) -> Model:
    """One model with its queue, its trunks and its metrics."""
    measured = metrics.for_model(settings.name)
    limits = settings.limits
    replicas = Replicas(
        settings.name,
        TrunkOptions(
            router=identity,
            secret=secret,
            settings=router.trunk,
            timeouts=settings.timeouts,
            stream_buffer_bytes=limits.stream_buffer_bytes,
            traffic=measured.trunk,
        ),
    )
    admission = Admission(settings.name, in_flight=limits.in_flight, queued=limits.queued)
    measured.watch(
        in_flight=lambda: admission.used,
        waiting=lambda: admission.waiting + replicas.waiting,
        trunks=lambda: len(replicas.trunks),
    )
    return Model(settings, replicas, admission, measured)


def build_api(catalog: Catalog, chat: ChatCompletions, scrape: Scrape) -> FastAPI:
    """All routes but the streaming one; that one is named here so that other methods are refused as such.

    Every route is a coroutine: FastAPI runs others in threads, where the loop's state must not be read.
    """
    api = FastAPI(title="Trunkline", openapi_url=None, redirect_slashes=False)
    api.router.routes.append(Route(CHAT_COMPLETIONS, chat, methods=["POST"]))

    @api.get("/v1/models", response_model_exclude_none=True)
    async def models() -> protocol.ModelList:
        return protocol.ModelList(data=catalog.entries())

    @api.get("/v1/models/{name:path}", response_model_exclude_none=True)
    async def model(name: str) -> protocol.Model:
        return catalog.entry(name)

    @api.get("/metrics")
    async def metrics(scope: str = "deployment") -> Response:
        if scope not in {"deployment", "process"}:
            raise InvalidRequest(f'scope must be "deployment" or "process", not {scope!r}', param="scope")
        return Response(await scrape(scope == "process"), media_type=CONTENT_TYPE)

    @api.get("/health")
    async def health() -> JSONResponse:
        status = "shutting down" if chat.draining else "ok"
        states = {model.settings.name: model.state for model in catalog.models}
        return JSONResponse({"status": status, "models": states}, 503 if chat.draining else 200)

    @api.get("/-/healthz")
    async def healthz() -> PlainTextResponse:
        return PlainTextResponse("draining", 503) if chat.draining else PlainTextResponse("success")

    @api.get("/-/routes")
    async def routes() -> dict[str, str]:
        return {"/": "router"}

    for kind, answer in ERROR_ANSWERS.items():
        api.add_exception_handler(kind, answer)
    return api


def answer(error: ApiError) -> Response:
    """The error as a response."""
    return Response(error.body(), error.status, dict(error.headers), "application/json")


async def _api_error(_: Request, error: Any) -> Response:
    return answer(error)


async def _http_error(request: Request, error: Any) -> Response:
    if error.status_code == 405:
        allowed = error.headers["Allow"].split(", ")
        return answer(MethodNotAllowed(request.method, request.url.path, allowed))
    return answer(UnknownPath(request.url.path))


async def _invalid(_: Request, error: Any) -> Response:
    fault = error.errors()[0]
    field = str(fault["loc"][-1])
    return answer(InvalidRequest(f"{field}: {fault['msg']}, not {fault['input']!r}", param=field))


async def _internal(_: Request, __: Exception) -> Response:
    return answer(InternalError())


ERROR_ANSWERS: dict[type[Exception] | int, Callable[[Request, Any], Awaitable[Response]]] = {
    ApiError: _api_error,
    HTTPException: _http_error,
    RequestValidationError: _invalid,
    Exception: _internal,
}


def with_request_id(app: ASGIApp) -> ASGIApp:
    """Put `x-request-id` on every answer of `app`."""

    async def labelled(scope: Scope, receive: Receive, send: Send) -> None:
        identifier = request_id(scope).encode()

        async def send_labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", identifier)]
            await send(message)

        await app(scope, receive, send_labelled)

    return labelled
