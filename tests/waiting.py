"""Waiting in tests: for what has to happen, never for a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

PATIENCE_S = 20.0
"""Seconds within which everything that a test waits for has to happen, however busy the machine is."""


async def until(condition: Callable[[], object], within_s: float = PATIENCE_S) -> None:
    """Returns once the condition holds; it is asked again and again while the loop turns."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within_s
    while not condition():
        assert loop.time() < deadline, f"not so within {within_s} s"
        await asyncio.sleep(0.001)


T = TypeVar("T")


async def soon(awaitable: Awaitable[T]) -> T:
    """The result, which must not take longer than PATIENCE_S."""
    return await asyncio.wait_for(awaitable, PATIENCE_S)
