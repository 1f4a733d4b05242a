"""The replica as Ray Serve runs it: one engine, and a trunk server in front of it."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import ray
import structlog
from prometheus_client import REGISTRY
from ray import serve

from serving import logs, orphans
from serving.engine import Engine, EngineDead
from serving.engines import build_engine
from serving.exposition import Exposition, render
from serving.metrics import ReplicaMetrics
from serving.settings import EngineSettings, Settings, TrunkSettings
from serving.trunk import TrunkServer

log = structlog.get_logger(__name__)

DEPLOYMENT = "model"
"""The name of the one deployment in a model's Serve application."""

TRUNK = "trunk"
"""The key of a replica's metadata under which routers find its trunk's [host, port]."""


class ReplicaSettings(Settings):
    """Everything that a replica is told at its start."""

    model: str
    engine: EngineSettings
    trunk: TrunkSettings = TrunkSettings()
    loopback: bool
    """Whether all routers are on this machine: the trunk then listens on 127.0.0.1 only."""
    drain_s: float
    """Seconds that running streams may take to end when the replica is stopped."""
    log_dir: Path | None = None


class ModelServer:
    """What a model's Serve deployment consists of. No request comes through Serve: they come by trunk."""

    # Serve awaits it, which the type of a constructor has no words for.
    async def __init__(self, settings: ReplicaSettings, secret: bytes) -> None:  # type: ignore[misc]
        logs.configure(f"replica-{settings.model.replace('/', '_')}", settings.log_dir)
        self._drain_s = settings.drain_s
        self._id = serve.get_replica_context().replica_id.unique_id
        ended = await asyncio.to_thread(orphans.end_orphans)
        orphans.mark()
        log.info("engine starts", model=settings.model, replica=self._id, orphans_ended=ended)
        self._engine: Engine = build_engine(settings.engine)
        await self._engine.start()
        metrics = ReplicaMetrics(REGISTRY, settings.model, self._engine.load)
        self._trunk = TrunkServer(
            self._engine, replica=self._id, secret=secret, settings=settings.trunk, traffic=metrics.trunk
        )
        host = "127.0.0.1" if settings.loopback else ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        self._address = await self._trunk.start(host)
        self._watching = asyncio.create_task(self._end_with_engine(), name="engine watch")
        log.info("replica ready", model=settings.model, replica=self._id, trunk=self._address)

    def record_replica_metadata(self) -> dict[str, Any]:
        """Serve pushes this to the routers once the replica is ready."""
        return {TRUNK: list(self._address)}

    async def metrics(self) -> tuple[str, Exposition]:
        """This process's samples, its engine's among them, and whose they are."""
        return self._id, await asyncio.to_thread(render, REGISTRY, self._id)

    async def __del__(self) -> None:
        """Serve awaits this before it ends the process: let the streams end, then free the engine."""
        log.info("replica drains", replica=self._id)
        self._watching.cancel()
        try:
            async with asyncio.timeout(self._drain_s):
                await self._trunk.drain()
        except TimeoutError:
            log.warning("streams are cut off", replica=self._id, drain_s=self._drain_s)
        await self._trunk.close()
        await self._engine.close()
        log.info("replica ends", replica=self._id)

    async def _end_with_engine(self) -> None:
        """A replica without its engine is worth nothing: end at once, so that Serve starts another."""
        error: EngineDead = await self._engine.died()
        log.error("engine died", replica=self._id, error=str(error))
        await self._trunk.close()
        orphans.end_children()
        os._exit(1)
