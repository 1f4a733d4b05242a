"""The router's HTTP surface: every route, and how each error answers, on one screen."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client.registry import CollectorRegistry
from pydantic import SecretStr
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router import answers
from router.accounts.guard import check_token, guarded, models_of, refusal
from router.admission import Admission
from router.catalog import Catalog, Model
from router.completions import ENDPOINTS, Completions
from router.cors import with_cors
from router.docs import PAGE_HEADERS, Documentation
from router.errors import ApiError, InternalError, InvalidRequest, MethodNotAllowed, UnknownPath
from router.gate import OpenGate
from router.headers import request_id
from router.ids import new_id
from router.metrics import RouterMetrics
from router.replicas import Replicas
from router.settings import HostedModel, RouterSettings, UpstreamModel
from router.trunk import TrunkOptions
from router.upstream import Upstream
from serving.exposition import CONTENT_TYPE

if TYPE_CHECKING:  # where accounts are off, 40 MB of libraries need not be loaded
    from router.accounts.accounts import Accounts

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
        accounts: Accounts | None = None,
    ) -> None:
        """To be made on a running event loop. `identity` names this process to replicas and in logs. Without
        `accounts` whoever reaches the port may ask, and nothing is kept of it."""
        self.metrics = RouterMetrics(registry)
        self.hosted = {
            model.application: self._replicas(model, settings, identity, secret)
            for model in settings.models
            if isinstance(model, HostedModel)
        }
        """The replicas of each hosted model, by the Serve application that holds them."""
        self.catalog = Catalog(map(self._model, settings.models), settings.created)
        self.completions = Completions(self.catalog, settings, self.metrics, accounts or OpenGate())
        if accounts is not None:
            ledger = accounts.ledger
            self.metrics.watch_ledger(up=lambda: not ledger.down, spooled=lambda: ledger.spooled_bytes)
        api: ASGIApp = build_api(
            self.catalog, self.completions, scrape, accounts, settings.listen.metrics_token
        )
        if accounts is not None:
            api = guarded(api, accounts.callers)
        self._others = with_own_headers(with_cors(api, settings.accounts.cors_origins))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] in ENDPOINTS and scope["method"] == "POST":
            await self.completions(scope, receive, send)
        else:
            await self._others(scope, receive, send)

    async def close(self) -> None:
        """Leave every replica and every provider."""
        await asyncio.gather(*(model.backend.close() for model in self.catalog.models))

    def _replicas(
        self, model: HostedModel, settings: RouterSettings, identity: str, secret: bytes
    ) -> Replicas:
        options = TrunkOptions(
            router=identity,
            secret=secret,
            settings=settings.trunk,
            timeouts=model.timeouts,
            stream_buffer_bytes=model.limits.stream_buffer_bytes,
            traffic=self.metrics.for_model(model.name).trunk,
        )
        replicas = Replicas(model.name, options)
        self.metrics.for_model(model.name).watch_trunks(lambda: len(replicas.trunks))
        return replicas

    def _model(self, settings: HostedModel | UpstreamModel) -> Model:
        """One model with what answers for it, its queue and its metrics."""
        backend = (
            self.hosted[settings.application] if isinstance(settings, HostedModel) else Upstream(settings)
        )
        limits = settings.limits
        admission = Admission(settings.name, in_flight=limits.in_flight, queued=limits.queued)
        metrics = self.metrics.for_model(settings.name)
        metrics.watch(in_flight=lambda: admission.used, waiting=lambda: admission.waiting + backend.waiting)
        return Model(settings, backend, admission, metrics)


def build_api(
    catalog: Catalog,
    completions: Completions,
    scrape: Scrape,
    accounts: Accounts | None = None,
    token: SecretStr | None = None,
) -> FastAPI:
    """All routes but the streaming ones; those are named here so that other methods are refused as such.

    Every route is a coroutine: FastAPI runs others in threads, where the loop's state must not be read.
    """
    api = FastAPI(title="Trunkline", openapi_url=None, redirect_slashes=False)
    api.router.routes.extend(Route(path, completions, methods=["POST"]) for path in ENDPOINTS)

    @api.get("/v1/models", response_model_exclude_none=True)
    async def models(request: Request) -> answers.ModelList:
        return answers.ModelList(data=catalog.entries(models_of(request.state)))

    @api.get("/v1/models/{name:path}", response_model_exclude_none=True)
    async def model(request: Request, name: str) -> answers.Model:
        return catalog.entry(name, models_of(request.state))

    @api.get("/health")
    async def health() -> JSONResponse:
        status = "shutting down" if completions.draining else "ok"
        states = {model.settings.name: model.backend.state for model in catalog.models}
        return JSONResponse({"status": status, "models": states}, 503 if completions.draining else 200)

    @api.get("/-/healthz")
    async def healthz() -> PlainTextResponse:
        return PlainTextResponse("draining", 503) if completions.draining else PlainTextResponse("success")

    @api.get("/-/routes")
    async def routes() -> dict[str, str]:
        return {"/": "router"}

    add_metrics(api, scrape, token)
    documentation = Documentation([model.settings for model in catalog.models], accounts=accounts is not None)
    document(api, documentation)
    if accounts is not None:
        from router.accounts.api import add_api  # noqa: PLC0415 - see above
        from router.console.pages import add_console  # noqa: PLC0415

        add_api(api, accounts, catalog)
        add_console(api, accounts, catalog, documentation)
    for kind, answer in ERROR_ANSWERS.items():
        api.add_exception_handler(kind, answer)
    return api


def add_metrics(api: FastAPI, scrape: Scrape, token: SecretStr | None) -> None:
    """The route that Prometheus reads; `token` is what it has to send, if anything."""

    @api.get("/metrics")
    async def metrics(request: Request, scope: str = "deployment") -> Response:
        if token is not None:
            check_token(request.headers.raw, token)
        if scope not in {"deployment", "process"}:
            raise InvalidRequest(f'scope must be "deployment" or "process", not {scope!r}', param="scope")
        return Response(await scrape(scope == "process"), media_type=CONTENT_TYPE)


def document(api: FastAPI, documentation: Documentation) -> None:
    """The routes that say what all the others do."""

    @api.get("/openapi.json")
    async def openapi() -> Response:
        return Response(await documentation.openapi(), media_type="application/json")

    @api.get("/docs")
    async def docs() -> Response:
        return HTMLResponse(await documentation.page(), headers=PAGE_HEADERS)


_WHAT_IT_SAYS = ((b"x-content-type-options", b"nosniff"),)


async def _api_error(_: Request, error: Any) -> Response:
    return refusal(error)


async def _http_error(request: Request, error: Any) -> Response:
    if error.status_code == 405:
        allowed = error.headers["Allow"].split(", ")
        return refusal(MethodNotAllowed(request.method, request.url.path, allowed))
    return refusal(UnknownPath(request.url.path))


async def _invalid(_: Request, error: Any) -> Response:
    fault = error.errors()[0]
    field = str(fault["loc"][-1])
    return refusal(InvalidRequest(f"{field}: {fault['msg']}, not {fault['input']!r}", param=field))


async def _internal(_: Request, __: Exception) -> Response:
    return refusal(InternalError())


ERROR_ANSWERS: dict[type[Exception] | int, Callable[[Request, Any], Awaitable[Response]]] = {
    ApiError: _api_error,
    HTTPException: _http_error,
    RequestValidationError: _invalid,
    Exception: _internal,
}


def with_own_headers(app: ASGIApp) -> ASGIApp:
    """Put `x-request-id` on every answer of `app`, and that it is what it says it is."""

    async def labelled(scope: Scope, receive: Receive, send: Send) -> None:
        identifier = (request_id(scope["headers"]) or new_id()).encode()

        async def send_labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(b"x-request-id", identifier), *_WHAT_IT_SAYS]
                taken = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(line for line in own if line[0] not in taken)]
            await send(message)

        await app(scope, receive, send_labelled)

    return labelled
