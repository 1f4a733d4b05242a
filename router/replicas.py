"""The replicas of one hosted model: trunks to them, and the way a request finds one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from time import monotonic

import structlog

from router.backend import Job, Kind, State, Stream
from router.dispatch import pick
from router.errors import NoReplica, ReplicaLost
from router.trunk import Leaving, Lost, Trunk, TrunkOptions, TrunkStream
from serving.messages import Request

log = structlog.get_logger(__name__)

RECONNECT_S = (0.1, 2.0)
"""Seconds between tries to reach a listed replica: the first, and the longest."""

RETRY_AFTER_S = 5
"""What a client is told to wait where no replica lives: an engine takes from seconds to minutes to start."""

Address = tuple[str, int]


class Replicas:
    """The replicas of one model. Serve says which there are; only a trunk says which of them live."""

    kind: Kind = "hosted"

    def __init__(self, name: str, options: TrunkOptions) -> None:
        self.name = name
        self.trunks: set[Trunk] = set()
        self.context_length: int | None = None
        """Tokens; not known before the first replica was."""
        self.waiting = 0
        """Requests that wait for a replica to be there."""
        self.failed = False
        """Serve has given up starting it."""
        self._options = options
        self._listed: Mapping[str, Address] = {}
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()

    def __repr__(self) -> str:
        return f"<model {self.name}: {len(self.open)} of {len(self._listed)} replicas, {self.trunks}>"

    @property
    def open(self) -> Collection[Trunk]:
        """Trunks that take new streams."""
        return [trunk for trunk in self.trunks if not trunk.draining and not trunk.closed.done()]

    def listed(self, replicas: Mapping[str, Address]) -> None:
        """These replicas, by id, are the ones there are. One that is missing may still be draining: its
        trunk stays until it closes."""
        self._listed = replicas
        for replica in replicas:
            if replica not in self._keepers:
                keeper = asyncio.create_task(self._keep(replica), name=f"trunk to {replica}")
                self._keepers[replica] = keeper

    @property
    def state(self) -> State:
        if self.open:
            return "ready"
        return "failed" if self.failed else "loading"

    def check(self, job: Job) -> None:
        """What there is against a request its replica says."""

    async def generate(self, job: Job, timeout_s: float, tried: Callable[[Stream], None]) -> TrunkStream:
        """A stream from the replica with the least to do.

        A replica that is lost before the first byte is replaced by another once; the client notices nothing.
        """
        request = job.request
        deadline = monotonic() + timeout_s
        lost: Trunk | None = None
        while True:
            trunk = await self._available(request, deadline, besides=lost)
            stream = trunk.submit(request)
            tried(stream)
            try:
                await stream.started()
            except Leaving:
                trunk.draining = True
            except Lost:
                if lost is not None:
                    raise ReplicaLost from None
                # An engine that has died may end its requests before its replica ends the trunk.
                lost = trunk
                deadline = monotonic() + timeout_s
            except BaseException:
                stream.close()
                raise
            else:
                return stream

    async def close(self) -> None:
        """Leave every replica."""
        for keeper in self._keepers.values():
            keeper.cancel()
        await asyncio.gather(*self._keepers.values(), return_exceptions=True)

    async def _available(self, request: Request, deadline: float, besides: Trunk | None) -> Trunk:
        while (trunk := pick([trunk for trunk in self.open if trunk is not besides], request)) is None:
            self._changed.clear()
            self.waiting += 1
            try:
                async with asyncio.timeout(deadline - monotonic()):
                    await self._changed.wait()
            except TimeoutError:
                raise NoReplica(self.name, retry_after=RETRY_AFTER_S) from None
            finally:
                self.waiting -= 1
        return trunk

    async def _keep(self, replica: str) -> None:
        """Hold a trunk to the replica for as long as it is listed, and after that until it closes."""
        pause_s, longest_s = RECONNECT_S
        try:
            while replica in self._listed:
                host, port = self._listed[replica]
                try:
                    trunk = await Trunk.connect(host, port, self._options)
                except Exception as error:  # noqa: BLE001 - a listed replica is tried for as long as it is listed
                    log.warning("no trunk", model=self.name, replica=replica, error=repr(error))
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, longest_s)
                else:
                    pause_s = RECONNECT_S[0]
                    await self._hold(trunk)
        finally:
            del self._keepers[replica]

    async def _hold(self, trunk: Trunk) -> None:
        log.info("trunk open", model=self.name, replica=trunk.replica)
        self.context_length = trunk.context_length
        self.trunks.add(trunk)
        self._changed.set()
        try:
            await asyncio.shield(trunk.closed)
        finally:
            self.trunks.discard(trunk)
            trunk.abort()
            log.info("trunk closed", model=self.name, replica=trunk.replica)
