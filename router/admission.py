"""Bounded in-flight work: a request holds one slot for each choice, or waits its turn, or is told when to
come back."""

from __future__ import annotations

import asyncio
from collections import Counter, deque

from router.errors import InvalidRequest, Overloaded
from serving.drain import DrainRate


class Slot:
    """A request's share of the in-flight work. `close` gives it back, once, whoever calls it."""

    __slots__ = ("_admission", "_caller", "_size")

    def __init__(self, admission: Admission, size: int, caller: str) -> None:
        self._admission = admission
        self._size = size
        self._caller = caller

    def close(self) -> None:
        size, self._size = self._size, 0
        if size:
            self._admission.free(size, self._caller)


class Turn:
    """A request that waits."""

    __slots__ = ("caller", "came", "size")

    def __init__(self, caller: str, size: int) -> None:
        self.caller = caller
        self.size = size
        self.came: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Admission:
    """The slots of one model in one router, and who waits for them.

    Callers are served fairly: next is whoever holds the fewest slots, and of its requests the oldest. Among
    callers who hold as many it is the one that was served longest ago. Where the queue is full, a caller that
    has fewer requests in it than another takes the place of the other's newest.
    """

    def __init__(self, model: str, *, in_flight: int, queued: int) -> None:
        self.capacity = in_flight
        self.used = 0
        self.waiting = 0
        """Requests that wait for their turn."""
        self._model = model
        self._queue_capacity = queued
        self._queues: dict[str, deque[Turn]] = {}
        """Whoever waits, the one that was served longest ago first."""
        self._held: Counter[str] = Counter()
        """The slots of each caller that has any."""
        self._drain = DrainRate()

    def __repr__(self) -> str:
        return f"<admission: {self.used} of {self.capacity} slots used, {self.waiting} requests waiting>"

    async def admit(self, size: int, timeout_s: float, caller: str = "") -> Slot:
        """A slot for a request of `size` choices, at once or within `timeout_s` seconds.

        Raises Overloaded, or InvalidRequest for more choices than there will ever be slots.
        """
        if size > self.capacity:
            raise InvalidRequest(
                f"n: {size} choices were asked for, and this model works on at most {self.capacity} at once",
                param="n",
            )
        if not self._queues and self.used + size <= self.capacity:
            self._take(caller, size)
            return Slot(self, size, caller)
        if self.waiting >= self._queue_capacity and not self._make_room(caller):
            raise self._overloaded(size)
        await self._turn(Turn(caller, size), timeout_s)
        return Slot(self, size, caller)

    def free(self, size: int, caller: str) -> None:
        """Give `size` slots to whoever is next."""
        self.used -= size
        self._held[caller] -= size
        if not self._held[caller]:
            del self._held[caller]
        self._drain.freed(size)
        self._advance()

    async def _turn(self, turn: Turn, timeout_s: float) -> None:
        self._queues.setdefault(turn.caller, deque()).append(turn)
        self.waiting += 1
        self._advance()  # whoever was next may need more than is free, and be so no more
        try:
            async with asyncio.timeout(timeout_s):
                await turn.came
        except BaseException as error:
            self._abandon(turn)
            if isinstance(error, TimeoutError):
                raise self._overloaded(turn.size) from None
            raise

    def _abandon(self, turn: Turn) -> None:
        if turn.came.done() and not turn.came.cancelled() and turn.came.exception() is None:
            # The turn came in the same moment as what ended the wait.
            self.free(turn.size, turn.caller)
        elif turn in self._queues.get(turn.caller, ()):
            self._remove(turn)
            self._advance()

    def _advance(self) -> None:
        while self._queues:
            turn = self._queues[min(self._queues, key=self._held.__getitem__)][0]
            if self.used + turn.size > self.capacity:
                return
            self._remove(turn)
            if not turn.came.cancelled():
                self._serve(turn)

    def _make_room(self, caller: str) -> bool:
        """Turn away the newest request of the caller with the most, if it has more than one more than this
        one would have."""
        if not self._queues:
            return False
        most = max(self._queues.values(), key=len)
        if len(most) <= len(self._queues.get(caller, ())) + 1:
            return False
        turn = most[-1]
        self._remove(turn)
        if not turn.came.cancelled():
            turn.came.set_exception(self._overloaded(turn.size))
        return True

    def _serve(self, turn: Turn) -> None:
        self._take(turn.caller, turn.size)
        if rest := self._queues.pop(turn.caller, None):
            self._queues[turn.caller] = rest  # behind all others
        turn.came.set_result(None)

    def _take(self, caller: str, size: int) -> None:
        self.used += size
        self._held[caller] += size

    def _remove(self, turn: Turn) -> None:
        """Take a request out of its caller's queue."""
        queue = self._queues[turn.caller]
        queue.remove(turn)
        if not queue:
            del self._queues[turn.caller]
        self.waiting -= 1

    def _overloaded(self, size: int) -> Overloaded:
        ahead = sum(turn.size for queue in self._queues.values() for turn in queue)
        needed = self.used + ahead + size - self.capacity
        return Overloaded(self._model, retry_after=self._drain.seconds_for(needed))
