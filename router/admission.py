"""Bounded in-flight work: a request holds one slot for each choice, or waits its turn, or is told when to
come back."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from contextlib import suppress
from time import monotonic

from router.errors import InvalidRequest, Overloaded

DRAIN_WINDOW_S = 30.0
"""Seconds of the past from which the rate of freed slots is measured."""

LONGEST_RETRY_S = 60
"""The most that a Retry-After asks for: further ahead the measured rate says little."""


class DrainRate:
    """How many slots are freed per second, over the last DRAIN_WINDOW_S."""

    def __init__(self) -> None:
        self._started = monotonic()
        self._freed: deque[tuple[float, int]] = deque()
        self._total = 0

    def freed(self, slots: int) -> None:
        """Count `slots` freed now."""
        self._freed.append((monotonic(), slots))
        self._total += slots
        self._forget()

    def seconds_for(self, slots: int) -> int:
        """Whole seconds in which `slots` will have been freed at this rate, from 1 to LONGEST_RETRY_S."""
        self._forget()
        if not self._total:
            return LONGEST_RETRY_S
        window = min(DRAIN_WINDOW_S, max(1.0, monotonic() - self._started))
        return max(1, min(LONGEST_RETRY_S, math.ceil(slots * window / self._total)))

    def _forget(self) -> None:
        horizon = monotonic() - DRAIN_WINDOW_S
        while self._freed and self._freed[0][0] < horizon:
            self._total -= self._freed.popleft()[1]


class Slot:
    """A request's share of the in-flight work. `close` gives it back, once, whoever calls it."""

    __slots__ = ("_admission", "_size")

    def __init__(self, admission: Admission, size: int) -> None:
        self._admission = admission
        self._size = size

    def close(self) -> None:
        size, self._size = self._size, 0
        if size:
            self._admission.free(size)


class Admission:
    """The slots of one model in one router, handed out first come, first served."""

    def __init__(self, model: str, *, in_flight: int, queued: int) -> None:
        self.capacity = in_flight
        self.used = 0
        self._model = model
        self._queue_capacity = queued
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._drain = DrainRate()

    def __repr__(self) -> str:
        return f"<admission: {self.used} of {self.capacity} slots used, {self.waiting} requests waiting>"

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        return len(self._queue)

    async def admit(self, size: int, timeout_s: float) -> Slot:
        """A slot of `size`, as soon as it is this request's turn.

        Raises InvalidRequest where it could never be, Overloaded where the queue is full or the turn did
        not come within `timeout_s` seconds.
        """
        if size > self.capacity:
            raise InvalidRequest(
                f"n: {size} choices were asked for, and this model works on at most {self.capacity} at once",
                param="n",
            )
        if not self._queue and self.used + size <= self.capacity:
            self.used += size
            return Slot(self, size)
        if self.waiting >= self._queue_capacity:
            raise self._overloaded(size)
        await self._turn(size, timeout_s)
        return Slot(self, size)

    def free(self, size: int) -> None:
        """Give `size` slots to whoever is next."""
        self.used -= size
        self._drain.freed(size)
        self._advance()

    async def _turn(self, size: int, timeout_s: float) -> None:
        turn = asyncio.get_running_loop().create_future()
        entry = (size, turn)
        self._queue.append(entry)
        try:
            async with asyncio.timeout(timeout_s):
                await turn
        except BaseException as error:
            self._abandon(entry)
            if isinstance(error, TimeoutError):
                raise self._overloaded(size) from None
            raise

    def _abandon(self, entry: tuple[int, asyncio.Future[None]]) -> None:
        size, turn = entry
        if turn.done() and not turn.cancelled():
            # The turn came in the same moment as what ended the wait.
            self.free(size)
            return
        with suppress(ValueError):
            # It is gone where a slot came free between the cancelling and now.
            self._queue.remove(entry)
        self._advance()

    def _advance(self) -> None:
        while self._queue and self.used + self._queue[0][0] <= self.capacity:
            size, turn = self._queue.popleft()
            if not turn.cancelled():
                self.used += size
                turn.set_result(None)

    def _overloaded(self, size: int) -> Overloaded:
        ahead = self.used + sum(waiting for waiting, _ in self._queue) + size - self.capacity
        return Overloaded(self._model, retry_after=self._drain.seconds_for(ahead))
