from __future__ import annotations

import asyncio
import resource
from collections.abc import Iterator

import pytest

from tests.end_to_end.client import ask_all, chat
from tests.end_to_end.conftest import Report
from tests.end_to_end.echoes import PAIR
from tests.end_to_end.server import Server, until

STREAMS = 1000
TOKENS = 200
WORDS = 40


@pytest.fixture(autouse=True)
def open_files() -> Iterator[None]:
    """Lets this process have a connection for each stream."""
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, most))


async def test_a_thousand_streams_end_complete(server: Server, report: Report) -> None:
    """A thousand streams at once of 200 tokens each end complete, each with its own words in order, and when
    they have, the routers hold little more memory than before."""
    await stream_all(server, 50)
    before = resident(server)
    running = asyncio.create_task(stream_all(server, STREAMS))
    await asyncio.to_thread(until, lambda: in_flight(server) == STREAMS, 60, "all streams in flight")
    at_once = resident(server)
    seconds = await running
    await asyncio.to_thread(until, lambda: in_flight(server) == 0, 10, "no stream in flight")
    await asyncio.to_thread(
        until, lambda: small(server, before), 30, f"memory near {before}, of {resident(server)} at the end"
    )
    after = resident(server)
    report(
        f"{STREAMS} streams of {TOKENS} tokens", f"{seconds:.1f} s, {STREAMS * TOKENS / seconds:.0f} tokens/s"
    )
    report(
        "each router's memory before, during, after",
        ", ".join(f"{before[router]:.0f} {at_once[router]:.0f} {after[router]:.0f} MB" for router in before),
    )


async def stream_all(server: Server, streams: int) -> float:
    """Hold so many streams at once, each with words of its own; the seconds of the longest."""
    prompts = [[f"{stream}.{word}" for word in range(WORDS)] for stream in range(streams)]
    requests = [chat(PAIR, " ".join(words), max_tokens=TOKENS, stream=True) for words in prompts]
    answers = await ask_all(server, requests)
    for words, answer in zip(prompts, answers, strict=True):
        assert answer.done
        assert answer.finish_reason() == "length"
        assert answer.text() == " ".join(words * (TOKENS // WORDS))
    return max(answer.seconds for answer in answers)


def in_flight(server: Server) -> float:
    """Streams that the engines are generating."""
    return server.metrics().total("trunkline_replica_running", model=PAIR)


def resident(server: Server) -> dict[str, float]:
    """The resident memory of each router in MB."""
    return {router: process.memory_info().rss / 1e6 for router, process in server.routers().items()}


def small(server: Server, before: dict[str, float]) -> bool:
    """Whether each router is within 20% of where it was."""
    now = resident(server)
    return all(now[router] <= 1.2 * was for router, was in before.items())
