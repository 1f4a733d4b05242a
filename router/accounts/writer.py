"""The ledger's door to the store, through which goes one piece of work at a time.

Work is done by a thread with a connection of its own. But to write into a file takes less time than to wake
that thread and to be woken by it: this is done at once, unless somebody else is writing there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from sqlalchemy import Connection

from router.accounts.store import Store, StoreBusy, StoreDown, translated

ANSWER_S = 3.0
"""Seconds after which work that has not ended counts as failed. Whether it reaches the store after all is not
known: it has to be such that doing it twice is doing it once."""

T = TypeVar("T")

Work = Callable[[Connection], Any]


class Door:
    """A connection that is made when it is needed."""

    def __init__(self, connect: Callable[[], Connection]) -> None:
        self._connect = connect
        self._connection: Connection | None = None

    def do(self, work: Work) -> Any:
        """What the work gives, once it is committed. Raises StoreDown."""
        try:
            with translated():
                if self._connection is None:
                    self._connection = self._connect()
                result = work(self._connection)
                self._connection.commit()
                return result
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """Close the connection, if there is one."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.invalidate()
            connection.close()


class Writer:
    """Does work on the store, each piece in a transaction of its own. To be made on a running event loop."""

    def __init__(self, store: Store) -> None:
        self._loop = asyncio.get_running_loop()
        self._here = Door(store.connect_at_once) if store.is_file else None
        self._there = Door(store.connect_ledger)
        self._asked: SimpleQueue[Task | None] = SimpleQueue()
        self._waiting = 0
        """Pieces of work that the thread has not ended."""
        self._stuck = False
        """Whether one of them was given up, and still holds the connection."""
        Thread(target=self._run, name="ledger", daemon=True).start()

    def start(self, work: Work) -> asyncio.Future[Any]:
        """Do the work, in its turn: what it gives, once it is committed, or StoreDown."""
        task = Task(work, self._loop.create_future())
        if self._stuck:
            task.done.set_exception(StoreDown())
        elif self._here is None or self._waiting or not _done_at_once(self._here, task):
            task.patience = self._loop.call_later(ANSWER_S, self._give_up, task)
            self._waiting += 1
            self._asked.put(task)
        return task.done

    async def do(self, work: Callable[[Connection], T]) -> T:
        """The same, awaited. Raises StoreDown."""
        result: T = await self.start(work)
        return result

    def close(self) -> None:
        """Leave the store after what has been asked for. Nothing that is stuck is waited for."""
        self._asked.put(None)
        if self._here is not None:
            self._here.leave()

    def _give_up(self, task: Task) -> None:
        self._stuck = True
        if not task.done.done():
            task.done.set_exception(StoreDown())

    def _end(self, task: Task, result: Any, error: BaseException | None) -> None:
        """Back on the loop."""
        self._stuck = False
        self._waiting -= 1
        if task.patience is not None:
            task.patience.cancel()
        if task.done.done():
            return  # it was given up, or nobody waits for it any more
        if error is None:
            task.done.set_result(result)
        else:
            task.done.set_exception(error)

    # In the thread.

    def _run(self) -> None:
        while (task := self._asked.get()) is not None:
            result, error = None, None
            try:
                result = self._there.do(task.work)
            except Exception as caught:  # noqa: BLE001 - it is raised where the work was asked for
                error = caught
            try:
                self._loop.call_soon_threadsafe(self._end, task, result, error)
            except RuntimeError:
                break  # the loop has ended, and with it everybody who could be told
        self._there.leave()


def _done_at_once(door: Door, task: Task) -> bool:
    """Do the work, whatever becomes of it, unless somebody else is writing."""
    try:
        task.done.set_result(door.do(task.work))
    except StoreBusy:
        return False
    except Exception as error:  # noqa: BLE001 - it is raised where the work was asked for
        task.done.set_exception(error)
    return True


class Task:
    """A piece of work, and who waits for it."""

    __slots__ = ("done", "patience", "work")

    def __init__(self, work: Work, done: asyncio.Future[Any]) -> None:
        self.work = work
        self.done = done
        self.patience: asyncio.TimerHandle | None = None
