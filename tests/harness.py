"""A whole data plane in one process, on one event loop: a router's application behind uvicorn, and replicas
of real engines behind real trunks.
"""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from uvicorn.server import ServerState

from router.accounts.accounts import Accounts
from router.accounts.settings import AccountsSettings
from router.app import Application
from router.catalog import Model
from router.http import uvicorn_server
from router.replicas import Replicas
from router.settings import (
    HostedModel,
    Limits,
    ModelLimits,
    ModelTimeouts,
    RouterSettings,
    Timeouts,
    UpstreamModel,
)
from router.trunk import TrunkOptions
from router.upstream import Upstream
from serving.echo import EchoArguments, EchoEngine
from serving.engine import Engine, EngineDead, FinishReason, Parser, Prompt, Sink
from serving.exposition import merge, render
from serving.messages import Chat, Load, Request
from serving.metrics import Counter, TrunkTraffic
from serving.settings import TrunkSettings
from serving.trunk import TrunkServer
from tests.peers import SECRET, BareRouter, dial, introduce
from tests.waiting import PATIENCE_S, soon, until
from tests.wire import Answer, Wire

QUICK = TrunkSettings(heartbeat_s=0.05, silence_s=2.0, connect_s=5.0)
"""Time-outs are looked after once a heartbeat, so a short one makes them exact."""

OPTIONS = TrunkOptions(
    router="router-0",
    secret=SECRET,
    settings=QUICK,
    timeouts=ModelTimeouts(),
    stream_buffer_bytes=1024,
    traffic=TrunkTraffic(Counter(), Counter()),
)
"""A router's end of a trunk, where there is no router."""


# ---- engines and replicas -----------------------------------------------------------------------------


@dataclass(eq=False)
class HandRequest:
    """One request in the hands of a test."""

    request: Request
    prompt: Prompt
    sink: Sink


class HandEngine:
    """An engine whose every token is put in by the test."""

    context_length = 1000

    def __init__(self) -> None:
        self.requests: dict[str, HandRequest] = {}
        self.seen = 0
        """Requests that were ever given to it."""
        self.refusal: Exception | None = None
        """What every request is answered with, where there is one."""
        self.rendering = asyncio.Event()
        """Cleared, it holds up whoever renders a prompt."""
        self.rendering.set()
        self.parser: Callable[[], Parser] | None = None
        """What reads its chats."""
        self.decoder: Callable[[], Callable[[int], str]] | None = None
        """What tells of their tokens what they say."""
        self._dead: asyncio.Future[EngineDead] | None = None

    async def start(self) -> None:
        self._dead = asyncio.get_running_loop().create_future()

    async def render(self, request: Request) -> list[Prompt]:
        await self.rendering.wait()
        if isinstance(request, Chat):
            words = " ".join(message.content or "" for message in request.messages).split()
            return [Prompt(len(words), None, parser=self.parser, decoder=self.decoder)]
        texts = map(str, request.prompts)
        return [Prompt(len(text.split()), None, text if request.echo else None) for text in texts]

    async def generate(self, request: Request, prompts: Sequence[Prompt], sink: Sink) -> None:
        if self.refusal is not None:
            raise self.refusal
        sink.accepted()
        self.seen += 1
        self.requests[request.id] = HandRequest(request, prompts[0], sink)

    def say(self, text: str, finish_reason: FinishReason | None = None) -> None:
        """One step: one token of this text for every choice of every request."""
        for request in list(self.requests.values()):
            self.give(request, text, finish_reason)

    def give(self, request: HandRequest, text: str, finish_reason: FinishReason | None = None) -> None:
        """One token of this text for every choice of one request."""
        for choice in range(request.request.sequences):
            request.sink.put(choice, text, (0,), finish_reason)
        if finish_reason is not None:
            self.requests.pop(request.request.id, None)

    def only(self, prompt_tokens: int) -> HandRequest:
        """The one request whose prompt has so many tokens."""
        (request,) = (each for each in self.requests.values() if each.prompt.length == prompt_tokens)
        return request

    def fail(self, error: Exception) -> None:
        """Give up on every request."""
        requests, self.requests = self.requests, {}
        for request in requests.values():
            request.sink.fail(error)

    def cancel(self, request_id: str) -> None:
        self.requests.pop(request_id, None)

    def load(self) -> Load:
        return Load(len(self.requests))

    async def died(self) -> EngineDead:
        assert self._dead is not None
        return await self._dead

    async def close(self) -> None:
        self.requests.clear()


class Replica:
    """One engine behind a trunk server, as a replica's process holds them."""

    def __init__(self, name: str, engine: Engine, settings: TrunkSettings, secret: bytes = SECRET) -> None:
        self.name = name
        self.engine = engine
        self.frames = Counter()
        """Frames sent to routers."""
        self.server = TrunkServer(
            engine,
            replica=name,
            secret=secret,
            settings=settings,
            traffic=TrunkTraffic(self.frames, Counter()),
        )
        self.address = ("", 0)
        self._peers: list[BareRouter] = []

    async def start(self) -> None:
        await self.engine.start()
        self.address = await self.server.start("127.0.0.1")

    async def dial(self) -> BareRouter:
        """A connection from a bare router, nothing said yet."""
        peer = await dial(self.address)
        self._peers.append(peer)
        return peer

    async def router(self) -> BareRouter:
        """A trunk from a bare router, welcomed."""
        peer = await self.dial()
        await introduce(peer)
        return peer

    async def stop(self) -> None:
        """As on a request to stop: the streams end first."""
        await soon(self.server.drain())
        await soon(self.server.close())
        await soon(self.engine.close())

    async def kill(self) -> None:
        """As on SIGKILL: no goodbye, and nobody listens any more."""
        for connection in list(self.server.connections):
            connection.abort()
        await soon(self.server.close())
        await soon(self.engine.close())
        for peer in self._peers:
            peer.leave()
            await peer.closed()

    @property
    def streams(self) -> int:
        """Streams that routers have open here."""
        return sum(len(connection.streams) for connection in self.server.connections)

    def idle(self) -> bool:
        """Whether nothing is left of any request."""
        load = self.engine.load()
        return not self.streams and (load.running, load.waiting, load.kv_used) == (0, 0, 0.0)


@asynccontextmanager
async def nothing_escapes() -> AsyncIterator[None]:
    """In the block no exception may reach the event loop, which would only log it."""
    loop = asyncio.get_running_loop()
    escaped: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: escaped.append(context))
    yield
    gc.collect(1)  # the old is not of this block
    assert not escaped


@asynccontextmanager
async def replica(engine: Engine, settings: TrunkSettings = QUICK) -> AsyncIterator[Replica]:
    """A running replica without a router."""
    one = Replica("replica-0", engine, settings)
    async with nothing_escapes():
        await one.start()
        try:
            yield one
        finally:
            await one.kill()


def echo_engine(**arguments: Any) -> EchoEngine:
    """An echo engine with these of its arguments."""
    return EchoEngine(EchoArguments(**arguments))


# ---- a deployment -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """A model and the engines of its replicas."""

    settings: HostedModel
    engines: Sequence[Engine]


def served(
    *engines: Engine,
    name: str = "echo",
    limits: ModelLimits | None = None,
    timeouts: ModelTimeouts | None = None,
    **settings: Any,
) -> Served:
    """A model with one replica for each engine."""
    hosted = HostedModel(
        name=name,
        application=f"model-{name}",
        limits=limits or ModelLimits(),
        timeouts=timeouts or ModelTimeouts(),
        **settings,
    )
    return Served(hosted, engines)


class Deployment:
    """A router on a loopback port, and the replicas that it knows."""

    def __init__(
        self,
        application: Application,
        registry: CollectorRegistry,
        replicas: dict[str, list[Replica]],
        trunk: TrunkSettings,
    ) -> None:
        self.application = application
        self.replicas = replicas
        """Those that live, by model."""
        self.port = 0
        self.tasks: set[asyncio.Task[None]] = set()
        """Requests that the HTTP server is working on."""
        self.connections: set[Any] = set()
        """Connections of clients that are open at the server."""
        self.wires: list[Wire] = []
        self.http = httpx.AsyncClient()
        self._registry = registry
        self._trunk = trunk

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def model(self, name: str = "echo") -> Model:
        """What the router holds of a model."""
        return self.application.catalog.find(name)[1]

    def backend(self, name: str = "echo") -> Replicas:
        """What the router holds of a model's replicas."""
        return self.application.hosted[f"model-{name}"]

    def announce(self, name: str = "echo") -> None:
        """Tell the router which replicas there are, as Serve does."""
        self.backend(name).listed({one.name: one.address for one in self.replicas[name]})

    async def connected(self, name: str = "echo") -> None:
        """Returns when the router has a trunk to every replica of the model and to no other."""
        replicas = self.replicas[name]
        await until(lambda: len(self.backend(name).open) == len(replicas))

    async def add(self, engine: Engine, name: str = "echo") -> Replica:
        """Start one more replica and let the router know."""
        taken = {one.name for one in self.replicas[name]}
        fresh = next(f"replica-{i}" for i in range(1000) if f"replica-{i}" not in taken)
        one = Replica(fresh, engine, self._trunk)
        await one.start()
        self.replicas[name].append(one)
        self.announce(name)
        return one

    def idle(self) -> bool:
        """Whether nothing is left of any request anywhere."""
        models = self.application.catalog.models
        return (
            all(one.idle() for replicas in self.replicas.values() for one in replicas)
            and all(
                model.admission.used == model.admission.waiting == model.backend.waiting == 0
                for model in models
            )
            and not any(
                trunk.streams for replicas in self.application.hosted.values() for trunk in replicas.trunks
            )
            and not any(
                model.backend.provider.open for model in models if isinstance(model.backend, Upstream)
            )
        )

    def metric(self, name: str, **labels: str) -> float:
        """The sum of this process's samples of that name which have these labels."""
        text = merge([render(self._registry, "router-0")]).decode()
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    async def post(self, body: dict[str, Any], **headers: str) -> httpx.Response:
        """The answer to a chat completion request, read to its end."""
        return await self.http.post("/v1/chat/completions", json=body, headers=headers)

    async def ask(self, text: str, **parameters: Any) -> dict[str, Any]:
        """The whole answer to one user message."""
        response = await self.post(request(text, **parameters))
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    async def dial(self, receive_buffer: int | None = None) -> Wire:
        """A connection of its own, nothing sent yet. `receive_buffer`: bytes that the kernel holds for it."""
        wire = await Wire.connect(self.port, receive_buffer)
        self.wires.append(wire)
        return wire

    async def open(self, text: str, *, receive_buffer: int | None = None, **parameters: Any) -> Wire:
        """The answer to one user message on a connection of its own, still to be read."""
        wire = await self.dial(receive_buffer)
        wire.post(request(text, **parameters))
        return wire

    async def stream(self, text: str, **parameters: Any) -> Answer:
        """The streamed answer to one user message, read to its end."""
        wire = await self.open(text, stream=True, **parameters)
        answer = await wire.answer()
        wire.leave()
        return answer


def request(text: str, **parameters: Any) -> dict[str, Any]:
    """A chat completion request with one user message."""
    return {"model": "echo", "messages": [{"role": "user", "content": text}], **parameters}


@asynccontextmanager
async def deployed(
    *models: Served | UpstreamModel,
    trunk: TrunkSettings = QUICK,
    limits: Limits | None = None,
    timeouts: Timeouts | None = None,
    send_buffer: int | None = None,
    accounts: Accounts | None = None,
) -> AsyncIterator[Deployment]:
    """A running deployment, every replica of it reached by the router. When the test is over nothing may be
    left of any request.

    `send_buffer`: bytes that the kernel holds for a client. Without `accounts` anyone may ask.
    """
    registry = CollectorRegistry()
    limits, timeouts = limits or Limits(), timeouts or Timeouts()

    async def scrape(process_only: bool) -> bytes:
        return merge([render(registry, "router-0")])

    application = Application(
        RouterSettings(
            models=tuple(model.settings if isinstance(model, Served) else model for model in models),
            trunk=trunk,
            limits=limits,
            timeouts=timeouts,
            accounts=accounts.settings if accounts is not None else AccountsSettings(enabled=False),
        ),
        identity="router-0",
        secret=SECRET,
        registry=registry,
        scrape=scrape,
        accounts=accounts,
    )
    replicas = {
        model.settings.name: [
            Replica(f"replica-{i}", engine, trunk) for i, engine in enumerate(model.engines)
        ]
        for model in models
        if isinstance(model, Served)
    }
    deployment = Deployment(application, registry, replicas, trunk)
    async with nothing_escapes(), _listening(deployment, limits, timeouts, send_buffer):
        for name, ones in replicas.items():
            for one in ones:
                await one.start()
            deployment.announce(name)
            await deployment.connected(name)
        try:
            yield deployment
            await until(deployment.idle)
        finally:
            await soon(application.close())
            for one in [one for ones in replicas.values() for one in ones]:
                await one.kill()


@asynccontextmanager
async def _listening(
    deployment: Deployment, limits: Limits, timeouts: Timeouts, send_buffer: int | None
) -> AsyncIterator[None]:
    """The protocol of uvicorn on a loopback port, without its server: that one would wait for signals."""
    config = uvicorn_server(deployment.application, limits, timeouts).config
    config.load()
    state = ServerState()
    deployment.tasks = state.tasks
    deployment.connections = state.connections
    listener = socket.socket()
    if send_buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    listener.bind(("127.0.0.1", 0))
    connection: Any = config.http_protocol_class
    protocol = partial(connection, config=config, server_state=state, app_state={})
    server = await asyncio.get_running_loop().create_server(protocol, sock=listener, backlog=1024)
    deployment.port = listener.getsockname()[1]
    timeout = httpx.Timeout(PATIENCE_S)
    try:
        async with httpx.AsyncClient(base_url=deployment.url, timeout=timeout, trust_env=False) as http:
            deployment.http = http
            yield
    finally:
        for wire in deployment.wires:
            wire.leave()
        server.close()
        for open_one in list(state.connections):
            open_one.transport.abort()
        await until(lambda: not state.connections and not state.tasks)
