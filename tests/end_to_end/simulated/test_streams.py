"""Hundreds of streams at once through all there is: HTTP, router, trunk, the replica's shorter ways, vLLM."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from tests.end_to_end.client import Exchange, asking, chat
from tests.end_to_end.conftest import Report
from tests.end_to_end.server import Server, until
from tests.end_to_end.simulated import SIMULATED, STREAMS

Prose = Callable[[int, int], str]

SHORTEST = 448
"""Tokens of the shortest answer: two seconds and more, in which the last of them has long begun."""

HOLDING: tuple[tuple[str, dict[str, str]], ...] = (
    ("trunkline_in_flight", {"model": SIMULATED}),
    ("trunkline_replica_running", {"model": SIMULATED}),
    ("trunkline_replica_waiting", {"model": SIMULATED}),
    ("trunkline_kv_cache_usage_ratio", {"model": SIMULATED}),
    ("vllm:num_requests_running", {}),
)
"""The gauges that say that a request holds something."""

ALIKE: tuple[tuple[str, dict[str, str]], ...] = (
    ("trunkline_generation_tokens_total", {"model": SIMULATED}),
    ("vllm:generation_tokens_total", {}),
)
"""The router's count of an answer's tokens, and the engine's."""


async def test_every_stream_has_its_own_words_and_every_token_is_counted(
    server: Server, prose: Prose, report: Report
) -> None:
    """Of hundreds of streams at once each is complete, has exactly the text of its seed in its order, and the
    usage of its length; what the usages say together is what the router counts, and what the engine does."""
    before = counted(server)
    async with streaming(server) as streams:
        await asyncio.to_thread(until, lambda: running(server) == STREAMS, 60, "all of them at once")
        await asyncio.gather(*(stream.end() for stream in streams))
    for number, stream in enumerate(streams):
        assert stream.done
        assert stream.finish_reason() == "length"
        assert stream.text() == prose(number, length(number))
        assert stream.usage["completion_tokens"] == length(number)
    tokens = sum(stream.usage["completion_tokens"] for stream in streams)
    await asyncio.to_thread(until, lambda: growth(server, before) == [tokens] * 2, 10, "every token counted")
    took = max(stream.seconds for stream in streams)
    report(f"simulated: {STREAMS} streams at once", f"{took:.1f} s, {tokens / took:.0f} tokens/s")


async def test_those_who_leave_disturb_nobody(server: Server, prose: Prose, report: Report) -> None:
    """When every tenth client leaves in mid-stream, the others' streams are what they would have been, and
    the engine is free once the last has ended."""
    async with streaming(server) as streams:
        await speaking(streams)
        await asyncio.gather(*(stream.leave() for stream in streams[::10]))
        stayed = {number: stream for number, stream in enumerate(streams) if number % 10}
        await asyncio.gather(*(stream.end() for stream in stayed.values()))
    for number, stream in stayed.items():
        assert stream.done
        assert stream.text() == prose(number, length(number))
        assert stream.usage["completion_tokens"] == length(number)
    assert not any(stream.done for stream in streams[::10]), "they had left before their ends"
    took = await asyncio.to_thread(until, lambda: not any(holding(server)), 5, "a free engine")
    report("simulated: engine free after the last stream", f"{took:.2f} s")


async def test_a_lost_replica_ends_every_stream(server: Server, prose: Prose, report: Report) -> None:
    """When the replica is killed amid the streams, each of them ends with an error event within seconds, and
    what it had said until then is the beginning of its text."""
    (replica,) = server.replicas(SIMULATED).values()
    async with streaming(server) as streams:
        await speaking(streams)
        replica.kill()
        killed_at = time.perf_counter()
        await asyncio.gather(*(stream.end() for stream in streams))
    ended = {number: stream for number, stream in enumerate(streams) if not stream.done}
    assert len(ended) > STREAMS // 2, "most were in mid-stream"
    for number, stream in ended.items():
        assert stream.error["code"] == "replica_lost"
        assert stream.finish_reason() is None
        assert stream.text()
        assert prose(number, length(number)).startswith(stream.text())
        assert stream.ended_at - killed_at < 10
    took = max(stream.ended_at for stream in ended.values()) - killed_at
    report(f"simulated: killed amid {len(ended)} streams, they ended after", f"{took:.2f} s (promised: 2)")


@asynccontextmanager
async def streaming(server: Server) -> AsyncIterator[list[Exchange]]:
    """Every stream, just asked for; who is still there leaves with the block."""
    async with AsyncExitStack() as stack:
        exchanges = (asking(server, asked(number)) for number in range(STREAMS))
        yield await asyncio.gather(*map(stack.enter_async_context, exchanges))


async def speaking(streams: list[Exchange]) -> None:
    """Return when each of them has begun and gone on."""
    await asyncio.gather(*(stream.first() for stream in streams))
    await asyncio.gather(*(stream.more() for stream in streams))


def asked(number: int) -> dict[str, Any]:
    """The body of a stream's request: its seed is its number, and none has another's prompt."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    return chat(SIMULATED, f"{number}: go on", seed=number, max_tokens=length(number), **options)


def length(number: int) -> int:
    """Tokens of a stream's answer, so that streams end at different steps."""
    return SHORTEST + number % 64


def running(server: Server) -> float:
    """Sequences in the engine's batch."""
    return server.metrics().total("trunkline_replica_running", model=SIMULATED)


def counted(server: Server) -> list[float]:
    """Tokens so far, by the router and by the engine."""
    metrics = server.metrics()
    return [metrics.total(name, **labels) for name, labels in ALIKE]


def growth(server: Server, before: list[float]) -> list[float]:
    """What they have counted since."""
    return [now - then for now, then in zip(counted(server), before, strict=True)]


def holding(server: Server) -> list[float]:
    """What the engine and the router hold for requests."""
    metrics = server.metrics()
    return [metrics.total(name, **labels) for name, labels in HOLDING]
