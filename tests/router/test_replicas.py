"""How a request finds a replica, with real replicas on real trunks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from uuid import uuid4

import pytest
import pytest_asyncio

from router.backend import Job, Piece
from router.errors import ApiError, NoReplica, ReplicaLost
from router.reading import read_chat
from router.replicas import RETRY_AFTER_S, Replicas
from router.settings import ModelSettings
from router.trunk import Lost, TrunkStream
from serving.engine import EngineDead, Refusal
from serving.messages import Accepted, Ended, Frame, Submit, Usage
from tests.harness import OPTIONS, QUICK, HandEngine, Replica, nothing_escapes
from tests.peers import BareReplica, bare_replica, welcome
from tests.waiting import PATIENCE_S, soon, until


def job(text: str = "hi") -> Job:
    """A streamed request with an id of its own."""
    data = {"model": "m", "messages": [{"role": "user", "content": text}], "stream": True}
    key = uuid4().hex
    return Job(key, read_chat(data, ModelSettings(name="m"), key, "m", 0), data)


class Model:
    """The replicas of a model, as a router knows them and as they are."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self.router = Replicas("m", OPTIONS)
        self.replicas: list[Replica] = []
        self._stack = stack

    async def start(self) -> tuple[Replica, HandEngine]:
        """One more replica, which is not listed yet."""
        engine = HandEngine()
        one = Replica(f"replica-{len(self.replicas)}", engine, QUICK)
        await one.start()
        self._stack.push_async_callback(one.kill)
        self.replicas.append(one)
        return one, engine

    def announce(self, *replicas: Replica) -> None:
        """These are the replicas there are, says Serve."""
        self.router.listed({one.name: one.address for one in replicas})

    async def open(self, count: int) -> None:
        """Returns when so many replicas take requests."""
        await until(lambda: len(self.router.open) == count)

    async def two(self) -> tuple[HandEngine, HandEngine]:
        """The engines of two replicas that take requests."""
        (one, first), (two, second) = await self.start(), await self.start()
        self.announce(one, two)
        await self.open(2)
        return first, second

    def ask(self, timeout_s: float = PATIENCE_S) -> asyncio.Task[TrunkStream]:
        """A request on its way."""
        return asyncio.create_task(self.router.generate(job(), timeout_s, lambda _: None))


@pytest_asyncio.fixture
async def model() -> AsyncIterator[Model]:
    """A model without replicas."""
    async with nothing_escapes(), AsyncExitStack() as stack:
        one = Model(stack)
        yield one
        await soon(one.router.close())


async def end(asked: asyncio.Task[TrunkStream], text: bytes) -> None:
    """The request is answered with this text, and over."""
    stream = await soon(asked)
    piece = await soon(stream.read())
    assert text in piece.data
    assert piece.last
    stream.close()


async def chosen(*engines: HandEngine) -> HandEngine:
    """The engine that has the only request."""
    await until(lambda: sum(len(engine.requests) for engine in engines) == 1)
    return next(engine for engine in engines if engine.requests)


# ---- while there are replicas -------------------------------------------------------------------------


async def test_requests_go_to_the_replica_with_the_least_to_do(model: Model) -> None:
    """One request after the other, each still running, is shared out evenly."""
    engines = await model.two()
    asked = [model.ask() for _ in range(20)]
    await until(lambda: sum(len(engine.requests) for engine in engines) == 20)
    assert [len(engine.requests) for engine in engines] == [10, 10]
    for engine in engines:
        engine.say("done", "stop")
    for one in asked:
        await end(one, b"done")


async def test_what_a_replica_knows_is_known_of_the_model(model: Model) -> None:
    """The context length is unknown until the first replica is, and stays known when there is none."""
    known = [model.router.context_length]
    one, _ = await model.start()
    model.announce(one)
    for replicas in (1, 0):
        await model.open(replicas)
        known.append(model.router.context_length)
        await one.kill()
    assert known == [None, HandEngine.context_length, HandEngine.context_length]


async def test_a_request_that_a_draining_replica_does_not_take_goes_elsewhere(model: Model) -> None:
    """A request that meets a drain on its way is answered by another replica, as often as that happens."""
    engines = await model.two()
    running = [model.ask(), model.ask()]
    await until(lambda: all(engine.requests for engine in engines))
    third, last = await model.start()
    model.announce(*model.replicas)
    # Refused before the router has heard of the drain: the frame that says so is still to be sent.
    for one in model.replicas[:2]:
        one.server.draining = True
    asked = model.ask()
    await model.open(1)
    await chosen(last)
    last.say("elsewhere", "stop")
    await end(asked, b"elsewhere")
    for engine in engines:
        engine.say("here", "stop")
    for one_running in running:
        await end(one_running, b"here")
    assert third.idle()


async def test_a_refusal_is_final(model: Model) -> None:
    """A request that a replica refuses is not tried on another."""
    engines = await model.two()
    for engine in engines:
        engine.refusal = Refusal("no such token", param="logit_bias")
    with pytest.raises(ApiError, match="no such token"):
        await soon(model.ask())
    assert not any(trunk.streams for trunk in model.router.trunks)


async def test_a_caller_that_leaves_takes_its_request_along(model: Model) -> None:
    """A request that is given up before its first byte is cancelled in the engine."""
    engines = await model.two()
    asked = model.ask()
    engine = await chosen(*engines)
    asked.cancel()
    await until(lambda: not engine.requests)


# ---- when they are lost -------------------------------------------------------------------------------


async def killed(model: Model, engine: HandEngine) -> None:
    """The replica's process is gone."""
    await next(one for one in model.replicas if one.engine is engine).kill()


async def failing(model: Model, engine: HandEngine) -> None:
    """The replica's engine has died, and its process lives on for a moment."""
    engine.refusal = EngineDead("gone")
    engine.fail(engine.refusal)


@pytest.mark.parametrize("lose", [killed, failing])
async def test_a_request_that_had_no_byte_is_retried_unseen(
    model: Model, lose: Callable[[Model, HandEngine], Awaitable[None]]
) -> None:
    """A replica that is lost before the first byte is replaced by another, never by itself; what was sent to
    it is counted there no more."""
    engines = await model.two()
    asked = model.ask()
    first = await chosen(*engines)
    (second,) = {*engines} - {first}
    await lose(model, first)
    assert await chosen(second) is second
    second.say("retried", "stop")
    await end(asked, b"retried")
    assert (first.seen, second.seen) == (1, 1)


async def test_a_request_is_retried_once(model: Model) -> None:
    """A request whose second replica is lost as well is over, though there is a third."""
    await model.two()
    await model.start()
    model.announce(*model.replicas)
    await model.open(3)
    engines = [one.engine for one in model.replicas]
    asked = model.ask()
    for _ in range(2):
        await failing(model, await chosen(*engines))  # type: ignore[arg-type]
    with pytest.raises(ReplicaLost):
        await soon(asked)


async def test_a_request_that_was_lost_waits_for_another_replica(model: Model) -> None:
    """Where there is none to retry on, the request waits for one, and is answered by the first that comes."""
    one, engine = await model.start()
    model.announce(one)
    asked = model.ask()
    await chosen(engine)
    await one.kill()
    await until(lambda: model.router.waiting == 1)
    next_one, successor = await model.start()
    model.announce(next_one)
    await chosen(successor)
    assert model.router.waiting == 0
    successor.say("late", "stop")
    await end(asked, b"late")


async def test_a_request_that_was_lost_does_not_wait_for_ever(model: Model) -> None:
    """After timeout_s without another replica the client is told to come back, and when."""
    one, engine = await model.start()
    model.announce(one)
    asked = model.ask(timeout_s=0.2)
    await chosen(engine)
    await failing(model, engine)
    with pytest.raises(NoReplica) as error:
        await soon(asked)
    assert error.value.headers == {"retry-after": str(RETRY_AFTER_S)}
    assert model.router.waiting == 0


async def test_every_stream_of_a_lost_trunk_is_over(model: Model) -> None:
    """Streams that have begun are not retried: they end, all of them, when their replica is lost."""
    engines = await model.two()
    asked = [model.ask() for _ in range(10)]
    await until(lambda: sum(len(engine.requests) for engine in engines) == 10)
    for engine in engines:
        engine.say("half")
    streams = [await soon(one) for one in asked]
    for one in model.replicas:
        await one.kill()
    for stream in streams:
        assert not (await soon(stream.read())).last
        with pytest.raises(Lost):
            await soon(stream.read())
    assert sum(engine.seen for engine in engines) == 10


# ---- while there is none ------------------------------------------------------------------------------


async def test_requests_wait_for_the_first_replica(model: Model) -> None:
    """Before there is a replica, requests wait for one and are all served by it."""
    asked = [model.ask() for _ in range(5)]
    await until(lambda: model.router.waiting == 5)
    one, engine = await model.start()
    model.announce(one)
    await until(lambda: len(engine.requests) == 5)
    assert model.router.waiting == 0
    engine.say("at last", "stop")
    for each in asked:
        await end(each, b"at last")


async def test_whoever_stops_waiting_leaves_no_trace(model: Model) -> None:
    """A request that is given up or timed out while it waits is not sent to the replica that comes."""
    with pytest.raises(NoReplica, match='"m" is not ready'):
        await soon(model.ask(timeout_s=0.01))
    left = model.ask()
    await until(lambda: model.router.waiting == 1)
    left.cancel()
    await asyncio.wait([left])
    assert model.router.waiting == 0
    one, engine = await model.start()
    model.announce(one)
    await model.open(1)
    assert engine.seen == 0


# ---- trunks -------------------------------------------------------------------------------------------


async def test_a_listed_replica_is_tried_until_it_is_there(model: Model) -> None:
    """A replica that is announced before it listens, or under an address that has changed since, is reached
    in the end."""
    one, _ = await model.start()
    async with bare_replica() as (nobody, _accepted):
        pass
    model.router.listed({one.name: nobody})
    await until(lambda: "trunk to replica-0" in {task.get_name() for task in asyncio.all_tasks()})
    model.announce(one)
    await model.open(1)


@asynccontextmanager
async def announced(model: Model) -> AsyncIterator[asyncio.Queue[BareReplica]]:
    """A bare replica that the router knows of, and the connections that it opens."""
    async with bare_replica() as (address, accepted):
        model.router.listed({"bare": address})
        yield accepted
        model.router.listed({})


async def test_a_replica_that_talks_nonsense_is_tried_again(model: Model) -> None:
    """A handshake that fails, for whatever reason, is not the last."""
    async with announced(model) as accepted:
        for nonsense in (b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\0\0\0\1\xc1", b""):
            replica = await soon(accepted.get())
            replica.writer.write(nonsense)
            replica.writer.write_eof()
        await welcome(await soon(accepted.get()))
        await model.open(1)


async def test_a_trunk_that_breaks_is_opened_again(model: Model) -> None:
    """While a replica is listed, a broken trunk to it is replaced by a new one."""
    async with announced(model) as accepted:
        for _ in range(3):
            replica = await soon(accepted.get())
            await welcome(replica)
            await model.open(1)
            replica.leave()
            await model.open(0)


async def test_a_replica_that_is_not_listed_any_more_keeps_its_trunk(model: Model) -> None:
    """Serve forgets a replica that drains; its streams come to their end all the same, and only then is the
    trunk gone for good."""
    async with announced(model) as accepted:
        replica = await soon(accepted.get())
        await welcome(replica)
        await model.open(1)
        asked = model.ask()
        while not isinstance(submit := await replica.receive(), Submit):
            pass
        model.router.listed({})
        replica.send(Frame([Accepted(submit.stream, 1)]))
        replica.send(Frame([Ended(submit.stream, b"the end", 1, Usage(1, 1))]))
        stream = await soon(asked)
        assert await stream.read() == Piece(b"the end", 1, last=True)
        assert len(model.router.open) == 1
        replica.leave()
        await model.open(0)
        await until(lambda: "trunk to bare" not in {task.get_name() for task in asyncio.all_tasks()})
        assert accepted.empty()


async def test_a_router_that_ends_leaves_every_replica(model: Model) -> None:
    """After close there is no trunk, at either end, and no attempt at one."""
    await model.two()
    async with announced(model):
        await soon(model.router.close())
        assert not model.router.trunks
        await until(lambda: not any(one.server.connections for one in model.replicas))
        assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("trunk to")]
