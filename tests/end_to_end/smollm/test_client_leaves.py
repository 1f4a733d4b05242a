from __future__ import annotations

import asyncio
import time

import pytest

from tests.end_to_end.client import asking, chat
from tests.end_to_end.conftest import Report
from tests.end_to_end.server import Server, until
from tests.end_to_end.smollm import SMOLLM

HOLDING: tuple[tuple[str, dict[str, str]], ...] = (
    ("trunkline_replica_running", {"model": SMOLLM}),
    ("trunkline_kv_cache_usage_ratio", {"model": SMOLLM}),
    ("trunkline_in_flight", {"model": SMOLLM}),
    ("vllm:num_requests_running", {}),
)
"""The gauges that say that a request holds something."""


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_a_client_that_leaves_frees_the_engine(server: Server, stream: bool, report: Report) -> None:
    """When the client of a long answer leaves, its request and its KV blocks are gone from the engine within
    seconds, whether a chunk had gone out or nothing had."""
    body = chat(SMOLLM, "Tell me a long story.", max_tokens=3000, ignore_eos=True, stream=stream)
    name = f"left-{'stream' if stream else 'whole'}"
    async with asking(server, body, {"x-request-id": name}) as exchange:
        if stream:
            await exchange.first()
        await asyncio.to_thread(until, lambda: all(holding(server)), 20, "generation")
    left_at = time.perf_counter()
    await asyncio.to_thread(until, lambda: not any(holding(server)), 5, "an idle engine")
    took = time.perf_counter() - left_at
    report(f"{name}: engine free after", f"{took:.2f} s (promised: 1)")
    line = server.request(name)
    assert (line["outcome"], line["status"]) == ("cancelled", 499)


def holding(server: Server) -> list[float]:
    """What the engine and the router hold for requests."""
    metrics = server.metrics()
    return [metrics.total(name, **labels) for name, labels in HOLDING]
