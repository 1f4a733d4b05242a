"""What a connection may cost, whatever its client sends or does not, and how that is answered."""

from __future__ import annotations

import asyncio
import json

import pytest

from router.answers import ErrorEnvelope
from router.settings import Limits, Timeouts
from tests.harness import HandEngine, deployed, echo_engine, request, served
from tests.waiting import soon, until
from tests.wire import Wire

HEALTH = b"GET /-/healthz HTTP/1.1\r\nhost: test\r\n"
CHUNKED = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
SMALL = 2**14
"""Bytes that the kernel may hold for a client, at each end."""

AT_ONCE_S = 5.0


async def refusal(wire: Wire) -> tuple[int, str | None]:
    """Status and code of an answer in the envelope after which the connection ends."""
    error = ErrorEnvelope.model_validate_json(await wire.body()).error
    assert wire.headers["connection"] == "close"
    assert wire.headers["x-request-id"]
    assert await wire.closed()
    return wire.status, error.code


async def healthy(wire: Wire) -> bool:
    """Whether the next answer is that of HEALTH."""
    content, wire.status = await wire.body(), 0
    return content == b"success"


# ---- what is no request -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        b"\x16\x03\x01\x02\x00\x01",
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET / HTTP/9\r\n",
    ],
    ids=["TLS", "no method", "no header", "no version"],
)
async def test_what_is_not_http_is_refused_in_the_envelope(said: bytes) -> None:
    """A client that speaks another protocol, or HTTP badly, is told so in the envelope, and is let go."""
    async with deployed() as deployment:
        wire = await deployment.dial()
        wire.send(said)
        assert await refusal(wire) == (400, "malformed_request")
        await until(lambda: not deployment.connections)


async def test_a_body_that_breaks_off_into_nonsense_is_refused() -> None:
    """Chunks that are none end the request that they belong to."""
    async with deployed(served(echo_engine())) as deployment:
        wire = await deployment.dial()
        wire.send(CHUNKED + b"2\r\n{}\r\n")
        await until(lambda: deployment.tasks)
        wire.send(b"nonsense\r\n")
        assert await refusal(wire) == (400, "malformed_request")
        await until(lambda: not deployment.tasks)


async def test_nonsense_after_a_request_does_not_cost_its_answer() -> None:
    """A stream that is being sent is sent to its end, unmixed, and is the connection's last."""
    engine = HandEngine()
    async with deployed(served(engine)) as deployment:
        wire = await deployment.open("hi", stream=True)
        await until(lambda: engine.requests)
        engine.say("one ")
        assert await wire.event()
        wire.send(b"nonsense\r\n\r\n")
        for _ in range(3):
            engine.say("more ")
            assert await wire.event()
        engine.say("end", "stop")
        answer = await wire.answer()
        assert (answer.done, answer.complete) == (True, True)
        assert await wire.closed()


# ---- its head -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "excess",
    [b"x: " + b"y" * 10_000, b"x: y\r\n" * 2000, b"x" * 10_000],
    ids=["one value", "many headers", "one name"],
)
async def test_a_head_may_be_as_long_as_the_limit(excess: bytes) -> None:
    """Past header_bytes a request is refused, though its end has not come and may never come."""
    async with deployed(limits=Limits(header_bytes=1024)) as deployment:
        wire = await deployment.dial()
        padding = 1024 - len(HEALTH) - len(b"x: \r\n\r\n")
        for _ in range(2):
            wire.send(HEALTH + b"x: " + b"y" * padding + b"\r\n\r\n")
            assert await healthy(wire)
        wire.send(HEALTH + excess)
        assert await refusal(wire) == (431, "headers_too_large")


async def test_what_follows_the_last_chunk_is_bounded_as_the_headers_are() -> None:
    """Trailers without end are refused."""
    async with deployed(served(echo_engine()), limits=Limits(header_bytes=1024)) as deployment:
        wire = await deployment.dial()
        wire.send(CHUNKED + b"2\r\n{}\r\n0\r\n" + b"x: y\r\n" * 2000)
        assert await refusal(wire) == (431, "headers_too_large")


@pytest.mark.parametrize("before", [b"", HEALTH + b"\r\n"], ids=["the first", "a later one"])
async def test_a_head_that_does_not_come_is_given_up(before: bytes) -> None:
    """After header_s a request that has begun is refused, the first of its connection or not, however
    steadily it comes."""
    async with deployed(timeouts=Timeouts(header_s=0.3)) as deployment:
        wire = await deployment.dial()
        wire.send(before)
        assert not before or await healthy(wire)
        wire.send(HEALTH)
        dripping = asyncio.create_task(drip(wire, b"x: y\r\n"))
        assert await refusal(wire) == (408, "request_timeout")
        dripping.cancel()
        await until(lambda: not deployment.connections)


async def drip(wire: Wire, data: bytes) -> None:
    """Send it again and again, until cancelled."""
    while True:
        wire.send(data)
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("before", [b"", HEALTH + b"\r\n"], ids=["at first", "later"])
async def test_a_connection_without_requests_is_closed(before: bytes) -> None:
    """Neither silence nor empty lines keep a connection open for longer than header_s."""
    async with deployed(timeouts=Timeouts(header_s=0.3)) as deployment:
        wire = await deployment.dial()
        wire.send(before)
        assert not before or await healthy(wire)
        dripping = asyncio.create_task(drip(wire, b"\r\n")) if before else None
        assert await wire.closed()
        if dripping is not None:
            dripping.cancel()


async def test_a_connection_that_waits_for_its_answer_is_not_closed() -> None:
    """header_s says nothing of how long an answer may take, or of a connection that has been used."""
    engine = HandEngine()
    async with deployed(served(engine), timeouts=Timeouts(header_s=0.1)) as deployment:
        wire = await deployment.open("hi")
        await until(lambda: engine.requests)
        await asyncio.sleep(0.3)  # three times header_s: that nothing happens takes time to be seen
        engine.say("hello", "stop")
        assert b"hello" in await wire.body()
        wire.status = 0
        await asyncio.sleep(0.3)
        wire.send(HEALTH + b"\r\n")
        assert await healthy(wire)


# ---- its body -----------------------------------------------------------------------------------------


async def test_a_body_without_end_is_not_swallowed_for_ever() -> None:
    """A client that goes on sending after its 413 is cut off header_s later."""
    limits, timeouts = Limits(body_bytes=1024), Timeouts(header_s=0.5)
    async with deployed(served(echo_engine()), limits=limits, timeouts=timeouts) as deployment:
        wire = await deployment.dial()
        wire.send(CHUNKED)
        dripping = asyncio.create_task(drip(wire, b"400\r\n" + b"x" * 1024 + b"\r\n"))
        assert json.loads(await wire.body())["error"]["code"] == "body_too_large"
        await until(lambda: not deployment.connections)
        dripping.cancel()


# ---- its reader ---------------------------------------------------------------------------------------


async def test_a_client_that_does_not_take_its_answer_is_dropped() -> None:
    """A whole answer that is not read is held for reader_s, and its connection with it."""
    timeouts = Timeouts(reader_s=0.3)
    async with deployed(served(echo_engine()), timeouts=timeouts, send_buffer=SMALL) as deployment:
        await deployment.open("word " * 20, max_tokens=8000, n=8, receive_buffer=SMALL)
        await until(lambda: deployment.metric("trunkline_requests_total", outcome="completed"))
        await until(lambda: not deployment.connections)


async def test_a_client_that_stops_in_a_stream_is_dropped() -> None:
    """A stream whose client takes nothing for reader_s is cancelled in the engine, however little of it
    waits."""
    timeouts = Timeouts(reader_s=0.3)
    engine = echo_engine(tokens_per_second=2000)
    async with deployed(served(engine), timeouts=timeouts, send_buffer=SMALL) as deployment:
        await deployment.open("word " * 20, stream=True, max_tokens=3000, receive_buffer=SMALL)
        await until(lambda: deployment.metric("trunkline_requests_total", outcome="cancelled"))
        await until(lambda: not deployment.connections)


async def test_a_client_that_takes_a_little_at_a_time_keeps_its_connection() -> None:
    """reader_s begins anew with all that is taken."""
    timeouts = Timeouts(reader_s=0.5)
    async with deployed(served(echo_engine()), timeouts=timeouts, send_buffer=SMALL) as deployment:
        wire = await deployment.open("word " * 20, max_tokens=8000, n=8, receive_buffer=SMALL)
        await until(lambda: deployment.metric("trunkline_requests_total", outcome="completed"))
        await wire.head()
        left = int(wire.headers["content-length"])
        while left:
            left -= len(await wire.some(min(left, 2**14)))
            await asyncio.sleep(0.05)
        wire.status = 0
        wire.send(HEALTH + b"\r\n")
        assert await healthy(wire)


# ---- requests that are sent ahead ---------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_behind_a_request_that_it_sent_ahead_is_noticed(
    stream: bool,
    ahead: int,
) -> None:
    """The request that is being answered is cancelled in the engine, and the others are not begun."""
    engine = HandEngine()
    async with deployed(served(engine)) as deployment:
        wire = await deployment.open("hi", stream=stream)
        await until(lambda: engine.requests)
        for _ in range(ahead):
            wire.post(request("more"))
        wire.leave()
        await until(lambda: not engine.requests, AT_ONCE_S)
        await until(lambda: not deployment.tasks and not deployment.connections)
        assert engine.seen == 1
        assert deployment.metric("trunkline_requests_total", outcome="cancelled") == 1


# ---- their number -------------------------------------------------------------------------------------


async def test_connections_are_counted() -> None:
    """One connection more than there may be is told so and closed; when another goes there is room again."""
    async with deployed(limits=Limits(connections=2)) as deployment:
        wires = [await deployment.dial() for _ in range(2)]
        for wire in wires:
            wire.send(HEALTH + b"\r\n")
            assert await healthy(wire)
        surplus = await deployment.dial()
        surplus.send(HEALTH + b"\r\n")
        assert await refusal(surplus) == (503, "too_many_connections")
        assert int(surplus.headers["retry-after"]) >= 1
        assert await (await deployment.dial()).closed()
        wires[0].send(HEALTH + b"\r\n")
        assert await healthy(wires[0])
        surplus.leave()
        wires[1].leave()
        await until(lambda: len(deployment.connections) == 1)
        again = await deployment.dial()
        again.send(HEALTH + b"\r\n")
        assert await soon(healthy(again))
