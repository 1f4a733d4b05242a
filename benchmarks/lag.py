"""How late the load generator itself is: with a timer that its event loop is to serve, and because its thread
has to wait for a core."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

INTERVAL_S = 0.01
"""Seconds between two moments at which the loop is to do something."""

_SCHEDSTAT = Path("/proc/thread-self/schedstat")


class Lag:
    """How late an event loop was, and how long its thread waited."""

    def __init__(self) -> None:
        self.late: list[float] = []
        """Seconds, for each moment at which the loop was to do something. They lie evenly over time: one long
        delay counts for every moment that passed in it."""
        self.waited_s: float | None = None
        """Seconds for which the thread could have run and had no core; None where the system does not say."""
        self._loop = asyncio.get_running_loop()
        self._due = perf_counter() + INTERVAL_S
        self._wait()

    def end(self) -> None:
        """Look no further."""
        self._timer.cancel()
        self._note(perf_counter())

    def _wait(self) -> None:
        self._timer = self._loop.call_later(self._due - perf_counter(), self._fire)

    def _fire(self) -> None:
        # uvloop's clock has milliseconds: it may come one too early, and is on time then.
        self._note(max(self._due, perf_counter()))
        self._wait()

    def _note(self, now: float) -> None:
        while self._due <= now:
            self.late.append(now - self._due)
            self._due += INTERVAL_S


@contextmanager
def lagging() -> Iterator[Lag]:
    """The lag of the running loop and of this thread, complete when the block has ended."""
    lag, waited = Lag(), _waited_s()
    try:
        yield lag
    finally:
        lag.end()
        now = _waited_s()
        lag.waited_s = None if waited is None or now is None else now - waited


def _waited_s() -> float | None:
    """What the kernel has counted so far of this thread's waiting for a core."""
    try:
        return int(_SCHEDSTAT.read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return None
