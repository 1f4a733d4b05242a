"""Clients that leave, at every step of a request, and clients that do not read. After each test the harness
looks whether anything is left of any request.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from router.settings import ModelLimits, ModelTimeouts, Timeouts
from tests.harness import Deployment, HandEngine, deployed, echo_engine, request, served
from tests.waiting import until
from tests.wire import Wire

AT_ONCE_S = 5.0
"""Five times the second within which a client that leaves has to free the engine."""


async def ended(deployment: Deployment, outcome: str, count: int = 1) -> None:
    """Returns when so many requests have ended that way."""
    await until(
        lambda: deployment.metric("trunkline_requests_total", model="echo", outcome=outcome) == count,
        AT_ONCE_S,
    )


# ---- leaving ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_leaves_a_stream_frees_the_engine(n: int) -> None:
    """After the first chunk the client goes: the request is gone from batch and cache at once, and counts as
    cancelled, by the status for a client that left."""
    async with deployed(served(echo_engine(tokens_per_second=50))) as deployment:
        wire = await deployment.open("on and on", stream=True, max_tokens=8000, n=n)
        assert await wire.event()
        (replica,) = deployment.replicas["echo"]
        assert replica.engine.load().running == n
        wire.leave()
        await until(deployment.idle, AT_ONCE_S)
        await ended(deployment, "cancelled")
        assert deployment.metric("trunkline_requests_total", status="499") == 1


async def test_a_client_that_leaves_before_a_whole_answer_frees_the_engine() -> None:
    """So it is for a client that has been sent nothing yet."""
    async with deployed(served(echo_engine(tokens_per_second=50))) as deployment:
        wire = await deployment.open("on and on", max_tokens=8000)
        (replica,) = deployment.replicas["echo"]
        await until(lambda: replica.engine.load().running)
        wire.leave()
        await until(deployment.idle, AT_ONCE_S)
        await ended(deployment, "cancelled")
        assert deployment.metric("trunkline_generation_tokens_total") == 0


async def test_a_client_that_leaves_after_a_large_request_frees_the_engine() -> None:
    """A body that came in parts, and was more than is read ahead, hides nobody's leaving."""
    engine = HandEngine()
    async with deployed(served(engine)) as deployment:
        body = json.dumps(request("x" * 200_000)).encode()
        wire = await deployment.dial()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n"
        wire.send(head + b"content-length: %d\r\n\r\n" % len(body) + body[:1000])
        await until(lambda: deployment.tasks)
        wire.send(body[1000:])
        await until(lambda: engine.requests)
        wire.leave()
        await until(lambda: not engine.requests, AT_ONCE_S)
        await ended(deployment, "cancelled")


async def test_a_client_that_leaves_before_the_first_token_frees_the_engine() -> None:
    """A request that is in the engine and has produced nothing is cancelled there."""
    engine = HandEngine()
    async with deployed(served(engine)) as deployment:
        wire = await deployment.open("hi", stream=True)
        await until(lambda: engine.requests)
        wire.leave()
        await until(lambda: not engine.requests, AT_ONCE_S)
        await ended(deployment, "cancelled")


async def test_a_client_that_leaves_while_its_prompt_is_rendered_never_reaches_the_engine() -> None:
    """A request that has not come to the engine yet does not come to it any more."""
    engine = HandEngine()
    engine.rendering.clear()
    async with deployed(served(engine)) as deployment:
        wire = await deployment.open("hi", stream=True)
        (replica,) = deployment.replicas["echo"]
        await until(lambda: replica.streams == 1)
        wire.leave()
        await until(lambda: replica.streams == 0, AT_ONCE_S)
        engine.rendering.set()
        await ended(deployment, "cancelled")
        assert engine.seen == 0


async def test_a_client_that_leaves_the_queue_gives_its_place_to_the_next() -> None:
    """A client that waits for a place and goes is never generated for; whoever is behind it moves up."""
    engine = HandEngine()
    async with deployed(served(engine, limits=ModelLimits(in_flight=1))) as deployment:
        model = deployment.model()
        first = await deployment.open("hi", stream=True)
        await until(lambda: engine.requests)
        leaves = await deployment.open("hi", stream=True)
        await until(lambda: model.admission.waiting == 1)
        last = await deployment.open("hi", stream=True)
        await until(lambda: model.admission.waiting == 2)
        leaves.leave()
        await until(lambda: model.admission.waiting == 1, AT_ONCE_S)
        engine.say("first", "stop")
        assert (await first.answer()).text() == "first"
        await until(lambda: engine.requests)
        engine.say("last", "stop")
        assert (await last.answer()).text() == "last"
        assert engine.seen == 2


async def test_a_client_that_leaves_while_there_is_no_replica_is_forgotten() -> None:
    """A client that waits for a replica and goes is not generated for when one comes."""
    engine = HandEngine()
    async with deployed(served()) as deployment:
        wire = await deployment.open("hi", stream=True)
        await until(lambda: deployment.backend().waiting == 1)
        wire.leave()
        await until(lambda: deployment.backend().waiting == 0, AT_ONCE_S)
        await deployment.add(engine)
        await deployment.connected()
        await ended(deployment, "cancelled")
        assert engine.seen == 0


async def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_error() -> None:
    """Half a request ends with its connection."""
    async with deployed(served(echo_engine())) as deployment:
        wire = await deployment.dial()
        wire.send(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n"
            b'content-length: 1000\r\n\r\n{"model":'
        )
        await until(lambda: deployment.tasks)
        wire.leave()
        await until(lambda: not deployment.tasks, AT_ONCE_S)
        assert deployment.metric("trunkline_requests_total", status="499") == 1


async def test_many_clients_that_leave_at_every_moment_leave_nothing() -> None:
    """Of 60 clients every second one goes, each at another moment; the others get their whole answer."""
    engine = echo_engine(tokens_per_second=200, max_num_seqs=16)
    async with deployed(served(engine, limits=ModelLimits(in_flight=24))) as deployment:

        async def run(at: int) -> None:
            wire = await deployment.open("a b c", stream=at % 3 > 0, max_tokens=20)
            if at % 2:
                loop = asyncio.get_running_loop()
                moment = loop.time() + at / 300
                await until(lambda: loop.time() >= moment)
            elif at % 3 > 0:
                answer = await wire.answer()
                assert (answer.done, answer.text()) == (True, " ".join((["a", "b", "c"] * 7)[:20]))
            else:
                assert b'"completion_tokens":20' in await wire.body()
            wire.leave()

        await asyncio.gather(*map(run, range(60)))
        await until(deployment.idle, AT_ONCE_S)


# ---- not reading --------------------------------------------------------------------------------------

LIMITS = ModelLimits(stream_buffer_bytes=2**16)
SMALL = 2**14
"""Bytes that the kernel may hold for a client, at each end: its share is no part of what is tested."""


async def slow_client(deployment: Deployment, **parameters: Any) -> Wire:
    """A client that will not read before it is told to."""
    return await deployment.open(
        "word " * 20, stream=True, max_tokens=8000, receive_buffer=SMALL, **parameters
    )


async def test_a_slow_reader_slows_only_itself() -> None:
    """While one client does not read, others on the same trunk get their answers; its own request is
    cancelled in the engine once its buffer is full, and its place is free at once."""
    async with deployed(served(echo_engine(), limits=LIMITS), send_buffer=SMALL) as deployment:
        slow = await slow_client(deployment)
        assert await slow.event()
        answers = await asyncio.gather(*(deployment.stream("a b c", max_tokens=100) for _ in range(20)))
        assert all(answer.done and len(answer.text().split()) == 100 for answer in answers)
        await until(deployment.idle, AT_ONCE_S)


async def test_a_slow_reader_that_reads_on_learns_why() -> None:
    """What had been sent comes whole, then the error, and that is the end of the stream."""
    async with deployed(served(echo_engine(), limits=LIMITS), send_buffer=SMALL) as deployment:
        slow = await slow_client(deployment)
        assert await slow.event()
        (replica,) = deployment.replicas["echo"]
        await until(lambda: replica.engine.load().running)
        await until(deployment.idle)
        answer = await slow.answer()
        assert answer.error is not None
        assert answer.error["code"] == "slow_reader"
        assert "65536 bytes" in answer.error["message"]
        assert (answer.complete, answer.done) == (True, False)
        words = answer.text().split()
        assert set(words) == {"word"}
        assert deployment.metric("trunkline_generation_tokens_total") == len(words) + 1
        await ended(deployment, "failed")


async def test_a_reader_that_catches_up_loses_nothing() -> None:
    """A client that reads with long pauses, but in time, gets its whole answer in order."""
    async with deployed(served(echo_engine(tokens_per_second=2000)), send_buffer=SMALL) as deployment:
        text = " ".join(map(str, range(1000)))
        wire = await deployment.open(text, stream=True, max_tokens=1000, receive_buffer=SMALL)
        (replica,) = deployment.replicas["echo"]
        await until(lambda: replica.engine.load().running)
        await until(replica.idle)
        answer = await wire.answer()
        assert answer.done
        assert answer.text() == text


async def test_a_client_that_never_reads_again_is_dropped() -> None:
    """A client that does not even read the error holds neither its place nor its connection."""
    async with deployed(served(echo_engine(), limits=LIMITS), send_buffer=SMALL) as deployment:
        await slow_client(deployment)
        await ended(deployment, "failed")
        assert deployment.idle()
        await until(lambda: not deployment.tasks and not deployment.connections, AT_ONCE_S)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_never_reads_is_dropped_after_total_s(stream: bool) -> None:
    """When its time is over its place is free, however little waits for it; also where that is the answer to
    an earlier request. Its connection ends a little later."""
    model = served(engine := HandEngine(), timeouts=ModelTimeouts(total_s=1.0))
    async with deployed(model, timeouts=Timeouts(reader_s=2.0), send_buffer=SMALL) as deployment:
        wire = await deployment.open("hi", stream=stream, receive_buffer=SMALL)
        await until(lambda: engine.requests)
        if not stream:
            wire.post(request("hi"))
            engine.say("word " * 100_000, "stop")
            await until(lambda: engine.seen == 2)
        for _ in range(50):
            engine.say("word " * 2_000)
            await asyncio.sleep(0)
        await until(deployment.idle, AT_ONCE_S)
        await ended(deployment, "failed")
        await until(lambda: not deployment.tasks and not deployment.connections, AT_ONCE_S)


async def test_a_client_that_leaves_while_it_does_not_read_is_noticed() -> None:
    """A socket that closes with its buffers full frees what it held."""
    engine = echo_engine(tokens_per_second=2000, max_num_seqs=4)
    async with deployed(served(engine), send_buffer=SMALL) as deployment:
        wire = await slow_client(deployment, n=4)
        # By then it has been sent far more than the sockets hold, and not as much as may gather.
        await until(lambda: engine.load().kv_used > 800 / 8192)
        wire.leave()
        await until(deployment.idle, AT_ONCE_S)
        await ended(deployment, "cancelled")
