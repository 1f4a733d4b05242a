"""The router as Ray Serve runs it: the application under uvicorn, on a socket of its own."""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path
from typing import Any

import structlog
from prometheus_client import REGISTRY
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from router.app import Application
from router.discovery import watch
from router.http import uvicorn_server
from router.settings import Listen, RouterSettings
from serving import garbage, logs
from serving.exposition import Exposition, merge, render

log = structlog.get_logger(__name__)

SCRAPE_S = 5.0
"""Seconds that a process gets to render its metrics before a scrape goes without it."""

STATUS_S = 5.0
"""Seconds between two looks at what Serve says of models that are not ready."""

LAST_WORDS_S = 2.0
"""Seconds that clients get to take the error that ends their answers when the drain is over."""

ACCEPTS = 8
"""Connections that are taken at once, at most: between two takings every stream gets its tokens."""


class RouterServer:
    """What the router deployment consists of. Clients reach its socket directly, not through Serve."""

    # Serve awaits it, which the type of a constructor has no words for.
    async def __init__(self, settings: RouterSettings, secret: bytes, log_dir: Path | None) -> None:  # type: ignore[misc]
        logs.configure("router", log_dir)
        context = serve.get_replica_context()
        self._id = context.replica_id.unique_id
        self._settings = settings
        self._accounts = None
        if settings.accounts.enabled:
            # Where they are off, 40 MB of libraries need not be loaded.
            from router.accounts.accounts import Accounts  # noqa: PLC0415

            self._accounts = await Accounts.opened(settings.accounts, self._id)
        with garbage.starting():
            self._application = Application(
                settings,
                identity=self._id,
                secret=secret,
                registry=REGISTRY,
                scrape=self.scrape,
                accounts=self._accounts,
            )
            self._own = serve.get_deployment_handle(context.deployment, context.app_name)
            self._handles = [
                watch(application, replicas.listed)
                for application, replicas in self._application.hosted.items()
            ]
            self._server = uvicorn_server(self._application, settings.limits, settings.timeouts)
            self._serving = asyncio.create_task(self._server.serve(listeners(settings.listen)))
            self._tasks = [asyncio.create_task(self._tick()), asyncio.create_task(self._watch_states())]
        log.info("router ready", router=self._id, listen=f"{settings.listen.host}:{settings.listen.port}")

    async def check_health(self) -> None:
        """Serve replaces a router whose HTTP server has ended."""
        if self._serving.done():
            raise RuntimeError("the HTTP server has ended")

    async def metrics(self) -> tuple[str, Exposition]:
        """This process's samples, and whose they are."""
        return self._id, await asyncio.to_thread(render, REGISTRY, self._id)

    async def scrape(self, process_only: bool) -> bytes:  # noqa: FBT001 - the route's own question
        """The metrics of this process, or of every process of the deployment, as text."""
        replica, own = await self.metrics()
        if process_only:
            return merge([own])
        answers = await asyncio.gather(*(_ask(handle) for handle in (self._own, *self._handles)))
        everyone = {name: exposition for answer in answers for name, exposition in answer}
        return merge((everyone | {replica: own}).values())

    async def __del__(self) -> None:
        """Serve awaits this before it ends the process: take nothing new, let the answers end, and tell those
        clients whose answers take too long."""
        log.info("router drains", router=self._id)
        self._application.completions.draining = True
        self._server.leave()
        await asyncio.wait([self._serving], timeout=self._settings.drain_s)
        # Without its trunk a stream ends with an error event.
        await self._application.close()
        await asyncio.wait([self._serving], timeout=LAST_WORDS_S)
        if self._accounts is not None:
            await self._accounts.close()
        for task in self._tasks:
            task.cancel()
        log.info("router ends", router=self._id)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            self._application.metrics.tick(time.perf_counter())

    async def _watch_states(self) -> None:
        """Learn from Serve which of the models that are not ready never will be."""
        while True:
            await asyncio.sleep(STATUS_S)
            hosted = self._application.hosted
            waiting = {name: replicas for name, replicas in hosted.items() if replicas.state != "ready"}
            try:
                applications = (await asyncio.to_thread(serve.status)).applications if waiting else {}
            except Exception as error:  # noqa: BLE001 - Serve's controller may be on its way back
                log.warning("no status from Serve", error=repr(error))
                continue
            for name, replicas in waiting.items():
                overview = applications.get(name)
                replicas.failed = overview is not None and overview.status == ApplicationStatus.DEPLOY_FAILED


async def _ask(handle: DeploymentHandle[Any]) -> list[tuple[str, Exposition]]:
    """What the replicas of a deployment answer. Where one of them does not in time, none does: Serve gives
    the answers of a broadcast together, so its metrics are missing until it is well or replaced.

    A call to each replica: at hundreds of them each is better scraped alone.
    """
    try:
        answers = await handle.broadcast("metrics").results_async(timeout_s=SCRAPE_S, return_exceptions=True)
    except Exception as error:  # noqa: BLE001 - Serve raises errors of many kinds where no replica runs
        log.warning("not scraped", deployment=handle.deployment_id.app_name, error=repr(error))
        return []
    return [answer for answer in answers if not isinstance(answer, BaseException)]


def listeners(listen: Listen) -> list[socket.socket]:
    """The router's socket, as often as it may take a connection in one turn of the loop: uvloop's listener
    takes one."""
    first = listening_socket(listen)
    return [first, *(first.dup() for _ in range(ACCEPTS - 1))]


def listening_socket(listen: Listen) -> socket.socket:
    """A bound socket whose port other routers of this node may share.

    It cannot tell a sibling from a stranger: that the port is free is made sure of before the first router.
    """
    return bound_socket(listen, socket.SO_REUSEADDR, socket.SO_REUSEPORT)


def bound_socket(listen: Listen, *options: int) -> socket.socket:
    """A TCP socket bound to the first address that the host's name has. Raises OSError."""
    family, *_, address = socket.getaddrinfo(listen.host, listen.port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        for option in options:
            bound.setsockopt(socket.SOL_SOCKET, option, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound
