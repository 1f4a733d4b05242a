"""What every request used, kept so that nothing which a client saw complete is missing.

A row is written when its request is let in, and again before its answer's last bytes go out. What a commit
costs hardly depends on how many rows are in it, and nothing here costs more. So an idle router commits at
once, and a busy one lets rows gather for some milliseconds: for so many that commits take a SHARE of a core.

Where the store does not take them, rows go into a spool, and from there into the store when it is back, all
before anything newer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from contextlib import closing
from copy import copy
from functools import partial
from typing import Any

import structlog

from router.accounts import living
from router.accounts.row import Row, Statements, values, write
from router.accounts.spool import Spool, left_behind
from router.accounts.store import Store, StoreDown
from router.accounts.writer import Writer

log = structlog.get_logger(__name__)

SHARE = 0.01
"""Of a core, for what commits cost in the ledger's thread, over some time."""

LONGEST_PAUSE_S = 0.020
"""Seconds that rows gather at most, whatever commits cost."""

BURST_S = 0.1
"""Seconds' worth of pauses that a router which was idle may leave out: so many requests find it as if it
still were."""

AGAIN_S = 0.5
"""Seconds between two attempts to reach a store that is down."""

REPLAYED = 500
"""Rows of a spool that go into one commit."""


class Group:
    """Rows that are committed together."""

    __slots__ = ("rows", "written")

    def __init__(self) -> None:
        self.rows: dict[str, Row] = {}
        self.written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when they are safe from the death of any process."""


class Ledger:
    """The rows of one router on their way into the store. To be made on a running event loop."""

    def __init__(self, store: Store, router: living.Router, spool: Spool) -> None:
        self.down = False
        """Whether the store does not take rows now."""
        self._router = router
        self._spool = spool
        self._writer = Writer(store)
        self._write = partial(write, Statements(store.dialect))
        self._loop = asyncio.get_running_loop()
        self._next = Group()
        self._pause = 0.0
        """Seconds for which the last commit is paid for."""
        self._due = 0.0
        """When the next one may begin, by the loop's clock."""
        self._committing: Group | None = None
        """The rows that are on their way, or will be in a moment."""
        self._singly: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<ledger: store {'down' if self.down else 'up'}, {len(self._next.rows)} rows gathered>"

    @property
    def spooled_bytes(self) -> int:
        """Bytes of rows that wait for the store to come back."""
        return self._spool.waiting_bytes

    @property
    def full(self) -> bool:
        """Whether there is no place for the rows of more requests."""
        return self._spool.full

    async def start(self) -> None:
        """Tell the store of this router, before any row of it."""
        try:
            await self._writer.do(self._router.beat)
            await self._adopt()  # what was spent is asked of the store: it has to know
        except StoreDown:
            self._lose()
        self._begin(self._live())

    def put(self, row: Row) -> asyncio.Future[None]:
        """Write the row as it is when its turn comes. Done when it is safe; not to be cancelled."""
        group = self._next
        if self.down:
            self._keep([row])
            group = Group()
            group.written.set_result(None)
            return group.written
        group.rows[row.id] = row
        if self._committing is None:
            self._committing = group
            self._loop.call_at(self._due, self._commit)
        return group.written

    async def close(self) -> None:
        """Write what has gathered, say goodbye, and leave the store. Rows that come afterwards wait in a
        spool for another router."""
        await self._end_tasks()
        while self._committing is not None:
            await asyncio.shield(self._committing.written)
            await asyncio.sleep(0)  # one that was lost before its turn came is written already
        if not self.down:
            try:
                await self._writer.do(self._router.leave)
            except StoreDown:
                log.warning("the store did not hear that this router ends")
        self.down = True
        await self._end_tasks()  # the store may have been lost in these last moments
        self._spool.close()
        self._writer.close()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _end_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---- the store takes rows ----------------------------------------------------------------------------

    def _commit(self) -> None:
        group = self._committing = self._next
        self._next = Group()
        self._due = max(self._due, self._loop.time() - BURST_S) + self._pause
        # As they are now: they may change while the thread is at it.
        rows = [copy(row) for row in group.rows.values()]
        written = self._writer.start(partial(self._write, rows))
        written.add_done_callback(partial(self._committed, group, rows))

    def _committed(self, group: Group, rows: Sequence[Row], done: asyncio.Future[float]) -> None:
        error = done.exception()
        if error is None:
            self._pause = min(LONGEST_PAUSE_S, done.result() / SHARE)
        if isinstance(error, StoreDown):
            # Also what came meanwhile, in its order.
            self._keep(rows)
            self._lose()
        elif error is not None:
            # Not to be cancelled with the others: the rows have no other way.
            self._singly = self._loop.create_task(self._write_singly(group, rows))
            return
        self._end(group)

    def _end(self, group: Group) -> None:
        """The group is safe, and the next one has its turn."""
        group.written.set_result(None)
        self._committing = None
        if self._next.rows:
            self._committing = self._next
            self._loop.call_at(self._due, self._commit)

    async def _write_singly(self, group: Group, rows: Sequence[Row]) -> None:
        try:
            await self._store(rows)
        except StoreDown:
            self._keep(rows)
            self._lose()
        self._end(group)

    async def _store(self, rows: Sequence[Row]) -> None:
        """Write rows. One that the store will not have, being there, does not keep the others out: it stands
        in the log, for a person. Raises StoreDown."""
        try:
            await self._writer.do(partial(self._write, rows))
        except StoreDown:
            raise
        except Exception:
            if len(rows) == 1:
                log.exception("a row was not written", row=values(rows[0]))
                return
            for row in rows:
                await self._store([row])

    # ---- it does not -------------------------------------------------------------------------------------

    def _keep(self, rows: Iterable[Row]) -> None:
        for row in rows:
            try:
                self._spool.put(row)
            except Exception as error:  # noqa: BLE001 - whoever waits for the others must not wait for ever
                # Nothing is left to keep it in but the log.
                log.error("a row has no place", error=repr(error), row=values(row))  # noqa: TRY400

    def _lose(self) -> None:
        """The store is down: what has gathered goes to the spool, and so does what comes."""
        if self.down:
            return
        self.down = True
        log.warning("the store is down")
        group, self._next = self._next, Group()
        self._keep(group.rows.values())
        group.written.set_result(None)
        self._begin(self._recover())

    async def _recover(self) -> None:
        while self.down:
            await asyncio.sleep(AGAIN_S)
            try:
                # It may have been declared dead meanwhile.
                await self._writer.do(self._router.beat)
                await self._adopt()
                await self._replay(self._spool)
            except StoreDown:
                continue
            except Exception:
                log.exception("the spool was not emptied")
                continue
            # Nothing has been put since the spool was found empty.
            self.down = False
            log.info("the store is back")

    async def _replay(self, spool: Spool) -> None:
        while not spool.empty:
            if rows := spool.first(REPLAYED):
                await self._store(rows)
                await self._writer.do(self._router.beat)  # a long one must not look like a death
            spool.forget()
            await asyncio.sleep(0)  # others want the loop too

    # ---- this router, and others -------------------------------------------------------------------------

    async def _live(self) -> None:
        """Tell the store that this router lives, and close what dead ones have left open."""
        while True:
            try:
                if not self.down:
                    await self._adopt()
                    closed = await self._writer.do(self._router.live)
                    if closed:
                        log.warning("requests of dead routers", interrupted=closed)
            except StoreDown:
                self._lose()
            except Exception:
                log.exception("looking after dead routers failed")
            await asyncio.sleep(living.BEAT_S)

    async def _adopt(self) -> None:
        for spool in left_behind(self._spool.folder):
            try:
                with closing(spool):
                    await self._replay(spool)
            except StoreDown:
                raise
            except Exception:
                log.exception("what a dead router has left was not read")
