"""The replica as Ray Serve runs it: one engine, and a trunk server in front of it."""

from __future__ import annotations

import asyncio
import os
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import ray
import structlog
from prometheus_client import REGISTRY
from ray import serve

from serving import garbage, logs, orphans
from serving.engine import Engine, EngineDead
from serving.engines import build_engine
from serving.exposition import Exposition, render
from serving.metrics import ReplicaMetrics
from serving.settings import EngineSettings, Settings, TrunkSettings
from serving.simulation.metrics import SimulationMetrics
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

    _trunk: TrunkServer | None = None
    _engine: Engine | None = None
    _simulation: SimulationMetrics | None = None
    _watching: asyncio.Task[None] | None = None

    # Serve awaits it, which the type of a constructor has no words for.
    async def __init__(self, settings: ReplicaSettings, secret: bytes) -> None:  # type: ignore[misc]
        logs.configure(f"replica-{settings.model.replace('/', '_')}", settings.log_dir)
        self._settings = settings
        self._id = serve.get_replica_context().replica_id.unique_id
        ended = await asyncio.to_thread(orphans.end_orphans)
        orphans.mark()
        log.info("engine starts", model=settings.model, replica=self._id, orphans_ended=ended)
        with garbage.starting():
            engine = await self._start_engine(settings)
        metrics = ReplicaMetrics(REGISTRY, settings.model, engine.load)
        self._trunk = TrunkServer(
            engine, replica=self._id, secret=secret, settings=settings.trunk, traffic=metrics.trunk
        )
        host = "127.0.0.1" if settings.loopback else ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        self._address = await self._trunk.start(host)
        self._watching = asyncio.create_task(self._end_with(engine, self._trunk), name="engine watch")
        log.info("replica ready", model=settings.model, replica=self._id, trunk=self._address)

    def record_replica_metadata(self) -> dict[str, Any]:
        """Serve pushes this to the routers once the replica is ready."""
        return {TRUNK: list(self._address)}

    async def check_health(self) -> None:
        """Serve replaces a replica whose engine has died, should it not have ended by itself."""
        if self._watching is not None and self._watching.done():
            raise RuntimeError("the engine has died")

    async def metrics(self) -> tuple[str, Exposition]:
        """This process's samples, its engine's among them, and whose they are."""
        return self._id, await asyncio.to_thread(render, REGISTRY, self._id)

    async def __del__(self) -> None:
        """Serve awaits this before it ends the process, also where `__init__` failed: let the streams end,
        then free what there is."""
        if self._watching is not None:
            self._watching.cancel()
        if self._trunk is not None:
            await self._drain(self._trunk)
        if self._engine is not None:
            await self._engine.close()
        if self._simulation is not None:
            run = self._simulation.run()
            log.info("simulated accelerator ends", **asdict(run), host_bound=run.host_bound)
        log.info("replica ends", replica=self._id)

    async def _start_engine(self, settings: ReplicaSettings) -> Engine:
        began = perf_counter()
        engine = settings.engine
        if engine.simulation is not None:
            self._simulation = SimulationMetrics(settings.model, REGISTRY)
            engine = self._simulation.reporting(engine)
        self._engine = build_engine(engine)
        built = perf_counter()
        await self._engine.start()
        import_s, start_s = built - began, perf_counter() - built
        log.info("engine ready", replica=self._id, import_s=round(import_s, 3), start_s=round(start_s, 3))
        return self._engine

    async def _drain(self, trunk: TrunkServer) -> None:
        log.info("replica drains", replica=self._id)
        try:
            async with asyncio.timeout(self._settings.drain_s):
                await trunk.drain()
        except TimeoutError:
            log.warning("streams are cut off", replica=self._id, drain_s=self._settings.drain_s)
        await trunk.close()

    async def _end_with(self, engine: Engine, trunk: TrunkServer) -> None:
        """A replica without its engine is worth nothing: end at once, so that Serve starts another."""
        error: EngineDead = await engine.died()
        log.error("engine died", replica=self._id, error=str(error))
        try:
            await trunk.close()
            orphans.end_children()
        finally:
            os._exit(1)
