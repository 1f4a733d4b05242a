"""How fast work ends, so that who is turned away can be told when to come back."""

from __future__ import annotations

import math
from collections import deque
from time import monotonic

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
