from __future__ import annotations

import asyncio
import time

import openai
import pytest

from tests.end_to_end.client import Exchange, ask, asking, chat
from tests.end_to_end.conftest import Report
from tests.end_to_end.echoes import ECHO, LONE, PAIR
from tests.end_to_end.server import Server, until

TEXT = " ".join(["a b c d"] * 5)


async def test_a_request_without_a_byte_is_retried(server: Server) -> None:
    """When one of two replicas is killed, its requests of which no byte had gone out, whole or streamed, are
    answered by the other, and the clients see nothing of it."""
    victim, survivor = server.replicas(PAIR)
    bodies = [chat(PAIR, f"{number} a b c", max_tokens=20, stream=number % 2 == 0) for number in range(16)]
    ids = [f"retried-{number}" for number in range(len(bodies))]
    async with asyncio.TaskGroup() as tasks:
        answers = [
            tasks.create_task(ask(server, body, {"x-request-id": name}))
            for body, name in zip(bodies, ids, strict=True)
        ]
        await asyncio.to_thread(until, lambda: in_flight(server) == 16 and busy(server), 4.5, "all of them")
        server.replicas(PAIR)[victim].kill()
    for number, answer in enumerate(answers):
        assert answer.result().status == 200
        assert answer.result().text() == " ".join([f"{number} a b c"] * 5)
        assert server.request(ids[number])["replica"] == survivor


async def test_a_stream_that_has_begun_ends_with_an_error(server: Server, report: Report) -> None:
    """When one of two replicas is killed, its streams that have begun end with an error event, the other's
    run on to their ends, and new requests are answered meanwhile."""
    await asyncio.to_thread(until, lambda: trunks(server) == {2}, 60, "both replicas")
    (victim, process), _ = server.replicas(PAIR).items()
    body = chat(PAIR, "a b c d", max_tokens=200, stream=True)
    async with asyncio.TaskGroup() as tasks, asyncio.timeout(60):
        begun = [asyncio.Event() for _ in range(8)]
        streams = [tasks.create_task(read(server, body, event)) for event in begun]
        await asyncio.gather(*(event.wait() for event in begun))
        lost = running(server)[victim]
        process.kill()
        killed_at = time.perf_counter()
        meanwhile = await ask(server, chat(PAIR, "a b c d", max_tokens=20))
    assert meanwhile.text() == TEXT
    ended = [stream.result() for stream in streams]
    broken = [stream for stream in ended if not stream.done]
    assert len(broken) == lost > 0
    for stream in broken:
        assert stream.error["code"] == "replica_lost"
        assert stream.finish_reason() is None
        assert stream.ended_at - killed_at < 10
    for stream in ended:
        assert stream.done == (stream.text() == " ".join(["a b c d"] * 50))
    took = max(stream.ended_at for stream in broken) - killed_at
    report("echo killed: its streams ended after", f"{took:.2f} s (promised: 2)")


async def test_a_request_waits_for_a_replica(server: Server, report: Report) -> None:
    """While a model's only replica is replaced, its requests wait and are then answered; others are answered
    at once."""
    (process,) = server.replicas(LONE).values()
    process.kill()
    killed_at = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        waiting = [
            tasks.create_task(ask(server, chat(LONE, "a b c d", max_tokens=20, stream=stream)))
            for stream in (False, True)
        ]
        other = await ask(server, chat(ECHO, "a b c d", max_tokens=20))
        assert not any(task.done() for task in waiting)
    assert other.text() == TEXT
    for task in waiting:
        assert task.result().status == 200
        assert task.result().text() == TEXT
    took = max(task.result().ended_at for task in waiting) - killed_at
    report("echo killed: waiting requests answered after", f"{took:.1f} s")


async def test_the_sdk_raises_where_a_stream_breaks(server: Server) -> None:
    """The openai SDK raises its own error, with our code, for a stream that ends before its time."""
    (process,) = server.replicas(LONE).values()
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        stream = await client.chat.completions.create(
            model=LONE, messages=[{"role": "user", "content": "a b c d"}], max_tokens=1000, stream=True
        )
        assert (await anext(stream)).choices[0].delta.content == "a"
        process.kill()
        with pytest.raises(openai.APIError) as broken:
            async for _ in stream:
                pass
    assert broken.value.code == "replica_lost"
    again = await ask(server, chat(LONE, "a b c d", max_tokens=20))
    assert again.text() == TEXT


async def read(server: Server, body: dict[str, object], begun: asyncio.Event) -> Exchange:
    """A stream, read to its end; `begun` is set when it has begun."""
    async with asking(server, body) as exchange:
        await exchange.first()
        begun.set()
        return await exchange.end()


def running(server: Server) -> dict[str, float]:
    """How many sequences each replica of the pair has in its batch."""
    return server.metrics().by("replica", "trunkline_replica_running", model=PAIR)


def busy(server: Server) -> bool:
    """Whether each replica of the pair has something in its batch."""
    return all(running(server).values())


def in_flight(server: Server) -> float:
    """The pair's requests in both routers."""
    return server.metrics().total("trunkline_in_flight", model=PAIR)


def trunks(server: Server) -> set[float]:
    """How many replicas of the pair the routers reach, each."""
    return set(server.metrics().by("replica", "trunkline_trunks", model=PAIR).values())
