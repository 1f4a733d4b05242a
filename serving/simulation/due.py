"""Results that are known before they are due."""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import TypeVar

_T = TypeVar("_T")


class Due(Future[_T]):
    """A value that whoever asks for it gets at a time."""

    def __init__(self, value: _T, at: float = 0.0) -> None:
        """`at` is of `time.monotonic`."""
        super().__init__()
        self._at = at
        self.set_result(value)

    def done(self) -> bool:
        """Whether the time has come."""
        return time.monotonic() >= self._at

    def result(self, timeout: float | None = None) -> _T:
        """The value, when its time has come."""
        wait = self._at - time.monotonic()
        if wait > 0:
            time.sleep(wait)
        return super().result()
