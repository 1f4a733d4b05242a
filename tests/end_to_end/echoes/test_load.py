from __future__ import annotations

import asyncio
import resource
from collections.abc import Iterator

import pytest

from tests.end_to_end.client import ask_all, chat
from tests.end_to_end.conftest import Report
from tests.end_to_end.echoes import ECHO, PAIR
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


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_memory_does_not_grow_with_requests(server: Server, report: Report) -> None:
    """Twenty thousand requests after the first ten thousand leave the routers no larger, and every token of
    theirs is counted."""
    counted = server.metrics().total("trunkline_generation_tokens_total", model=ECHO)
    await ask_many(server, 10_000)
    before = resident(server)
    await ask_many(server, 20_000)
    await asyncio.to_thread(until, lambda: small(server, before, 1.1), 30, f"memory near {before}")
    assert server.metrics().total("trunkline_generation_tokens_total", model=ECHO) == counted + 30_000 * 20
    after = resident(server)
    report(
        "each router's memory after 10,000 and 30,000 requests",
        ", ".join(f"{before[router]:.0f} {after[router]:.0f} MB" for router in before),
    )


async def ask_many(server: Server, requests: int, at_once: int = 200) -> None:
    """So many requests of 20 tokens, every other one streamed, some at a time."""
    bodies = [chat(ECHO, "a b c d", max_tokens=20, stream=stream) for stream in (True, False)]
    for _ in range(requests // at_once):
        answers = await ask_all(server, bodies * (at_once // 2))
        assert {answer.text() for answer in answers} == {" ".join(["a b c d"] * 5)}


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


def small(server: Server, before: dict[str, float], growth: float = 1.2) -> bool:
    """Whether each router is within that growth of where it was, 20% unless told."""
    now = resident(server)
    return all(now[router] <= growth * was for router, was in before.items())
