"""The replica's end of the trunk, spoken to by bare peers."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from serving import messages
from serving.engine import EngineDead, Refusal
from serving.handshake import nonce, prove
from serving.messages import Accepted, Cancel, Chat, Chunk, Ended, Frame, Message, Refused, Sampling, Submit
from serving.settings import TrunkSettings
from serving.trunk import FRAME_DATA, GATHERED_LIMIT
from tests.harness import HandEngine, Replica, echo_engine, replica
from tests.peers import SECRET, BareRouter
from tests.serving.recorder import chat, completion
from tests.waiting import soon, until


@pytest.fixture
def engine() -> HandEngine:
    """An engine in the test's hands."""
    return HandEngine()


@pytest_asyncio.fixture
async def hand(engine: HandEngine) -> AsyncIterator[Replica]:
    """A replica whose engine is in the test's hands."""
    async with replica(engine) as one:
        yield one


def submit(stream: int, text: str = "to be or not to be", max_tokens: int = 10) -> Submit:
    """A streamed request on a stream of this number."""
    sampling = Sampling(max_tokens=max_tokens)
    return Submit(stream, Chat(f"chat-{stream}", "m", 1, (Message("user", text),), sampling, stream=True))


async def frames_until(router: BareRouter, ended: set[int]) -> list[Frame]:
    """Every frame up to the one with which the last of these streams ended; the router pings meanwhile."""
    frames: list[Frame] = []
    left = set(ended)
    while left:
        message = await router.receive()
        assert message is not None, f"closed with {left} unfinished"
        router.send(messages.Ping())
        if isinstance(message, Frame):
            frames.append(message)
            left -= {event.stream for event in message.events if isinstance(event, Ended | Refused)}
    return frames


def chunks(frames: list[Frame]) -> list[list[Chunk]]:
    """The chunks of each frame that has some with bytes."""
    each = [[event for event in frame.events if isinstance(event, Chunk) and event.data] for frame in frames]
    return [chunks for chunks in each if chunks]


# ---- the handshake ------------------------------------------------------------------------------------


async def test_a_router_with_another_secret_is_not_welcome(hand: Replica) -> None:
    """A proof made with another secret closes the connection, and no proof is given in return."""
    router = await hand.dial()
    challenge = await router.receive()
    assert isinstance(challenge, messages.Challenge)
    ours = nonce()
    router.send(messages.Hello("stranger", prove(b"another", "router", challenge.nonce, ours), ours))
    assert await router.all() == []


async def test_a_proof_that_was_overheard_is_worth_nothing_on_another_connection(hand: Replica) -> None:
    """A Hello that opened one trunk does not open a second."""
    honest = await hand.dial()
    challenge = await honest.receive()
    assert isinstance(challenge, messages.Challenge)
    ours = nonce()
    hello = messages.Hello("honest", prove(SECRET, "router", challenge.nonce, ours), ours)
    honest.send(hello)
    assert isinstance(await honest.receive(), messages.Welcome)

    thief = await hand.dial()
    assert isinstance(await thief.receive(), messages.Challenge)
    thief.send(hello)
    assert await thief.all() == []
    assert len(hand.server.connections) == 1


async def test_the_replica_never_sends_its_secret(hand: Replica) -> None:
    """Nothing that a replica says in a handshake and after it holds the secret."""
    router = await hand.router()
    router.send(submit(1))
    await router.receive()
    assert SECRET not in router.bytes
    assert len(router.bytes) > 100


@pytest.mark.parametrize(
    "early", [submit(1), Cancel(1), messages.Ping()], ids=lambda message: type(message).__name__
)
async def test_nothing_is_taken_from_a_router_that_has_not_proven_itself(
    hand: Replica, engine: HandEngine, early: messages.ToReplica
) -> None:
    """Whatever comes before the welcome closes the connection and reaches no engine."""
    router = await hand.dial()
    assert isinstance(await router.receive(), messages.Challenge)
    router.send(early)
    assert await router.all() == []
    assert engine.seen == 0


async def test_a_router_cannot_introduce_itself_twice(hand: Replica) -> None:
    """A second Hello on a trunk closes it."""
    router = await hand.router()
    router.send(messages.Hello("again", b"", nonce()))
    await router.all()
    await until(lambda: not hand.server.connections)


async def test_a_stranger_cannot_make_the_replica_buffer(hand: Replica) -> None:
    """Before the handshake a frame longer than a handshake needs is refused with its length, unread."""
    router = await hand.dial()
    assert isinstance(await router.receive(), messages.Challenge)
    router.writer.write(struct.pack(">I", messages.HANDSHAKE_LIMIT + 1))
    assert await router.all() == []


async def test_a_frame_over_the_limit_closes_a_trunk_with_its_length(hand: Replica) -> None:
    """A router that announces more than a frame may have is dropped before it sends it."""
    router = await hand.router()
    router.writer.write(struct.pack(">I", messages.MAX_FRAME + 1))
    await router.all()
    await until(lambda: not hand.server.connections)


async def test_who_says_nothing_is_dropped() -> None:
    """A connection whose handshake does not come within connect_s is closed."""
    async with replica(HandEngine(), TrunkSettings(heartbeat_s=1.0, silence_s=60.0, connect_s=0.2)) as one:
        silent = await one.dial()
        welcomed = await one.router()
        assert isinstance(await silent.receive(), messages.Challenge)
        assert await silent.all() == []
        welcomed.send(submit(1))
        assert isinstance(await welcomed.receive(), Frame)


# ---- what strangers and broken peers send -------------------------------------------------------------

nested = st.integers(1, 200_000).map(lambda depth: b"\x92\x0c" + b"\x91" * depth)
payloads = st.binary(max_size=200) | nested
framed = payloads.map(lambda payload: struct.pack(">I", len(payload)) + payload)
known: st.SearchStrategy[messages.ToReplica] = st.sampled_from(
    [submit(7), Cancel(7), messages.Ping(), messages.Hello("r", b"", b"")]
)
garbage = st.lists(st.one_of(st.binary(max_size=200), framed, known.map(messages.encode)), max_size=5)


@settings(max_examples=60)
@given(sent=garbage, welcomed=st.booleans())
async def test_garbage_ends_at_most_the_connection_that_it_came_over(
    hand: Replica, engine: HandEngine, sent: list[bytes], *, welcomed: bool
) -> None:
    """Any bytes, before the handshake or after it, leave the replica and every other trunk as they were."""
    honest = await hand.router()
    honest.send(submit(1))
    await until(lambda: "chat-1" in engine.requests)

    rude = await (hand.router() if welcomed else hand.dial())
    rude.writer.writelines(sent)
    rude.writer.write_eof()
    await rude.all()

    engine.say("still here", "stop")
    (event,) = (e for f in await frames_until(honest, {1}) for e in f.events if isinstance(e, Ended))
    assert b"still here" in event.data
    honest.leave()
    await until(lambda: not hand.server.connections and not engine.requests)


@settings(max_examples=40)
@given(cuts=st.lists(st.integers(1, 400), max_size=6))
async def test_requests_arrive_however_they_are_torn(
    hand: Replica, engine: HandEngine, cuts: list[int]
) -> None:
    """Requests that come in pieces, each in a packet of its own, are all taken."""
    router = await hand.router()
    sent = b"".join(messages.encode(submit(stream)) for stream in (1, 2, 3))
    for cut in cuts:
        router.writer.write(sent[:cut])
        sent = sent[cut:]
        await asyncio.sleep(0)
    router.writer.write(sent)
    await until(lambda: set(engine.requests) == {"chat-1", "chat-2", "chat-3"})
    router.leave()
    await until(lambda: not engine.requests)


# ---- frames -------------------------------------------------------------------------------------------


async def test_what_one_step_makes_for_one_router_is_one_frame(hand: Replica, engine: HandEngine) -> None:
    """A step that gives a token to each of 64 streams of two routers is one frame to each of the two."""
    routers = [await hand.router() for _ in range(2)]
    for at, router in enumerate(routers):
        router.send(*(submit(2 * stream + at) for stream in range(32)))
    await until(lambda: len(engine.requests) == 64)
    for step in range(10):
        engine.say(f"token-{step}", "length" if step == 9 else None)
        await asyncio.sleep(0)
    for at, router in enumerate(routers):
        frames = await frames_until(router, {2 * stream + at for stream in range(32)})
        each = [[event for event in frame.events if isinstance(event, Chunk | Ended)] for frame in frames]
        spoken = [events for events in each if events]
        assert len(spoken) == 10
        for step, events in enumerate(spoken):
            assert [event.stream for event in events] == [2 * stream + at for stream in range(32)]
            assert all(b"token-%d" % step in event.data for event in events)


async def test_a_trunk_carries_requests_of_both_kinds() -> None:
    """A chat and a text completion of several prompts share a trunk, and each gets the bytes of its kind."""
    async with replica(echo_engine()) as one:
        router = await one.router()
        router.send(Submit(1, chat("a b", max_tokens=2)), Submit(2, completion("c", "d", max_tokens=1)))
        frames = await frames_until(router, {1, 2})
    events = [event for frame in frames for event in frame.events]
    accepted = {event.stream: event.prompt_tokens for event in events if isinstance(event, Accepted)}
    ended = {event.stream: event for event in events if isinstance(event, Ended)}
    assert accepted == {1: 2, 2: 2}
    assert b'"object":"chat.completion"' in ended[1].data
    assert b'"object":"text_completion"' in ended[2].data
    assert ended[1].usage.completion_tokens == ended[2].usage.completion_tokens == 2


async def test_an_engine_that_steps_at_a_pace_sends_as_many_frames_as_steps() -> None:
    """At a pace that leaves time between two steps, 50 streams of 20 tokens are 20 frames."""
    async with replica(echo_engine(tokens_per_second=40)) as one:
        router = await one.router()
        router.send(*(submit(stream, max_tokens=20) for stream in range(50)))
        frames = await frames_until(router, set(range(50)))
        assert (
            sum(len(each) for each in chunks(frames)) == 50 * 19
        )  # the last token of each rides with its end
        assert len(chunks(frames)) <= 19 + 2  # requests that came in two packets begin in two steps


async def test_output_that_gathers_leaves_in_fewer_larger_frames(hand: Replica, engine: HandEngine) -> None:
    """What a router does not read gathers, and leaves whole and in order in fewer frames than steps, none
    far above FRAME_DATA."""
    router = await hand.router()
    router.send(submit(1))
    await until(lambda: engine.requests)
    steps = 20_000
    for step in range(steps):
        engine.say(f"{step} {'-' * 1000}")
        await asyncio.sleep(0)
    engine.say("", "stop")
    frames = chunks(await frames_until(router, {1}))
    texts = [chunk.data.split(b'"content":"')[1].split(b" ")[0] for chunks in frames for chunk in chunks]
    assert [int(text) for text in texts] == list(range(steps))
    assert len(frames) < steps / 2
    sizes = [sum(len(chunk.data) for chunk in chunks) for chunks in frames]
    assert FRAME_DATA / 2 < max(sizes) < FRAME_DATA + 4096


async def test_a_router_that_never_reads_is_given_up(hand: Replica, engine: HandEngine) -> None:
    """Past GATHERED_LIMIT the trunk is closed and its requests are cancelled in the engine; a router that
    reads notices nothing."""
    deaf, honest = await hand.router(), await hand.router()
    deaf.send(submit(1))
    await until(lambda: "chat-1" in engine.requests)
    text = "-" * 2**21
    for _ in range(2 * GATHERED_LIMIT // len(text)):
        engine.say(text)
        await asyncio.sleep(0)
        if not engine.requests:
            break
    assert not engine.requests
    honest.send(submit(2))
    await until(lambda: "chat-2" in engine.requests)
    engine.say("fine", "stop")
    await frames_until(honest, {2})


async def test_a_step_larger_than_the_limit_gives_nobody_up(hand: Replica, engine: HandEngine) -> None:
    """A router that reads may be sent more than GATHERED_LIMIT in one step."""
    router = await hand.router()
    streams = set(range(GATHERED_LIMIT // 2**20 + 8))
    router.send(*(submit(stream) for stream in streams))
    await until(lambda: len(engine.requests) == len(streams))
    engine.say("-" * 2**20, "stop")
    frames = await frames_until(router, streams)
    assert sum(len(e.data) for f in frames for e in f.events if isinstance(e, Ended)) > GATHERED_LIMIT


async def test_load_is_told_only_where_it_has_changed(hand: Replica, engine: HandEngine) -> None:
    """Each change of load reaches every router once, within a heartbeat; while nothing changes there are
    pings alone."""
    router, other = await hand.router(), await hand.router()
    assert await router.receive() == Frame([], messages.Load())
    assert [await router.receive() for _ in range(3)] == [messages.Ping()] * 3
    other.send(submit(1))
    while (message := await router.receive()) == messages.Ping():
        pass
    assert message == Frame([], messages.Load(1))
    assert [await router.receive() for _ in range(3)] == [messages.Ping()] * 3


# ---- streams ------------------------------------------------------------------------------------------


async def test_a_stream_ends_once_with_all_that_it_used(hand: Replica, engine: HandEngine) -> None:
    """A stream is accepted with its prompt's tokens and ended with its usage, and nothing follows."""
    router = await hand.router()
    router.send(submit(1, "one two three"))
    await until(lambda: engine.requests)
    engine.say("a")
    engine.say(" b", "stop")
    accepted, first, ended = (event for frame in await frames_until(router, {1}) for event in frame.events)
    assert accepted == Accepted(1, 3)
    assert isinstance(first, Chunk)
    assert isinstance(ended, Ended)
    assert ended.usage == messages.Usage(3, 2)
    assert (first.tokens, ended.tokens, ended.failed) == (1, 1, False)
    assert hand.idle()


async def test_a_cancelled_stream_is_cancelled_in_the_engine(hand: Replica, engine: HandEngine) -> None:
    """Cancel frees what the request holds and nothing more is said of it; an unknown stream is no matter."""
    router = await hand.router()
    router.send(submit(1), submit(2), Cancel(1), Cancel(99))
    await until(lambda: engine.seen and list(engine.requests) == ["chat-2"])
    router.send(Cancel(1))
    engine.say("only one", "stop")
    frames = await frames_until(router, {2})
    assert [e.stream for f in frames for e in f.events if isinstance(e, Chunk | Ended)] == [2]


async def test_a_stream_cancelled_before_it_reached_the_engine_never_does(
    hand: Replica, engine: HandEngine
) -> None:
    """A request that is cancelled while its prompt is rendered is not generated."""
    engine.rendering.clear()
    router = await hand.router()
    router.send(submit(1))
    await until(lambda: hand.streams)
    router.send(Cancel(1), submit(2))
    await until(lambda: {s for c in hand.server.connections for s in c.streams} == {2})
    engine.rendering.set()
    await until(lambda: engine.requests)
    assert list(engine.requests) == ["chat-2"]
    assert engine.seen == 1


async def test_a_trunk_that_closes_takes_its_streams_along(hand: Replica, engine: HandEngine) -> None:
    """Every request of a router that is gone is cancelled in the engine, and no other."""
    gone, stays = await hand.router(), await hand.router()
    gone.send(*(submit(stream) for stream in range(10)))
    stays.send(submit(10))
    await until(lambda: len(engine.requests) == 11)
    gone.leave()
    await until(lambda: list(engine.requests) == ["chat-10"])


async def test_a_stream_number_names_one_stream(hand: Replica) -> None:
    """A number that is in use closes the trunk; one that has been used may be used again."""
    router = await hand.router()
    router.send(submit(1), Cancel(1), submit(1))
    await until(lambda: hand.streams == 1)
    router.send(submit(1))
    await router.all()
    await until(hand.idle)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (Refusal("no", status=422, param="p", code="c"), Refused(1, 422, "no", "p", "c")),
        (Refusal("later", status=429, retry_after=7), Refused(1, 429, "later", retry_after=7)),
        (OSError("/a/path of ours"), Refused(1, 500, "internal error", None, "internal_error")),
        (EngineDead("gone"), Ended(1, b"", 0, messages.Usage(0, 0), failed=True)),
    ],
    ids=["refusal", "full", "fault", "death"],
)
async def test_a_request_that_the_engine_does_not_take_ends(
    hand: Replica, engine: HandEngine, error: Exception, told: Refused | Ended
) -> None:
    """A refusal is passed on in its own words, a fault as an internal error without any, and a dead engine
    fails the stream, so that the router may try another replica."""
    engine.refusal = error
    router = await hand.router()
    router.send(submit(1))
    (event,) = (event for frame in await frames_until(router, {1}) for event in frame.events)
    assert event == told
    assert hand.idle()


async def test_an_engine_that_gives_up_fails_its_streams(hand: Replica, engine: HandEngine) -> None:
    """A request that the engine fails ends as failed, without bytes, its usage told."""
    router = await hand.router()
    router.send(submit(1), submit(2))
    await until(lambda: len(engine.requests) == 2)
    engine.say("half")
    engine.fail(EngineDead("gone"))
    frames = await frames_until(router, {1, 2})
    ended = [e for f in frames for e in f.events if isinstance(e, Ended)]
    assert ended == [Ended(i, b"", 0, messages.Usage(6, 1), failed=True) for i in (1, 2)]


async def test_a_request_that_fails_alone_is_not_taken_for_a_lost_engine(
    hand: Replica, engine: HandEngine
) -> None:
    """Where the engine gives up on a request and lives, the router is not told to try another replica."""
    router = await hand.router()
    router.send(submit(1))
    await until(lambda: len(engine.requests) == 1)
    engine.fail(RuntimeError("a fault of ours"))
    events = [event for frame in await frames_until(router, {1}) for event in frame.events]
    assert events[-1] == Refused(1, 500, "internal error", None, "internal_error")


async def test_progress_that_nobody_can_read_yet_is_told_once_a_heartbeat(
    hand: Replica, engine: HandEngine
) -> None:
    """While a whole answer grows the router hears so, in empty chunks no oftener than the heartbeat; while it
    does not grow the router hears nothing of it."""
    router = await hand.router()
    chat = Chat("whole", "m", 1, (Message("user", "hi"),), Sampling(max_tokens=10))
    router.send(Submit(1, chat))
    await until(lambda: engine.requests)
    for _ in range(3):
        for _ in range(100):
            engine.say("token")
        while (
            not isinstance(message := await router.receive(), Frame) or Chunk(1, b"", 0) not in message.events
        ):
            assert message is not None
    assert [await router.receive() for _ in range(3)] == [messages.Ping()] * 3
    engine.say("", "stop")
    (frame,) = await frames_until(router, {1})
    assert isinstance(frame.events[-1], Ended)
    assert frame.events[-1].usage.completion_tokens == 301


# ---- the heartbeat ------------------------------------------------------------------------------------

RESTLESS = TrunkSettings(heartbeat_s=0.05, silence_s=0.25, connect_s=5.0)


async def test_a_silent_router_is_lost() -> None:
    """A router whose socket stays open but says nothing is dropped about silence_s later, and its requests
    with it; one that pings stays."""
    engine = HandEngine()
    async with replica(engine, RESTLESS) as one:
        silent, alive = await one.router(), await one.router()
        silent.send(submit(1))
        alive.send(submit(2))
        await until(lambda: len(engine.requests) == 2)
        began = asyncio.get_running_loop().time()
        while len(one.server.connections) == 2:
            alive.send(messages.Ping())
            await alive.receive()
        assert asyncio.get_running_loop().time() - began >= RESTLESS.silence_s - RESTLESS.heartbeat_s
        assert list(engine.requests) == ["chat-2"]


async def test_a_replica_with_nothing_to_say_pings() -> None:
    """An idle trunk carries a ping for about every heartbeat, long past silence_s."""
    async with replica(HandEngine(), RESTLESS) as one:
        router = await one.router()
        await router.receive()
        for _ in range(15):
            assert await router.receive() == messages.Ping()
            router.send(messages.Ping())


# ---- draining -----------------------------------------------------------------------------------------


async def test_a_draining_replica_ends_what_it_has_and_begins_nothing(
    hand: Replica, engine: HandEngine
) -> None:
    """Draining is told at once, new requests are refused with 503, running ones come to their end, and only
    then is the drain over."""
    router = await hand.router()
    router.send(submit(1))
    await until(lambda: engine.requests)
    draining = asyncio.create_task(hand.server.drain())
    while await router.receive() != messages.Draining():
        pass
    router.send(submit(2))
    (refused,) = (event for frame in await frames_until(router, {2}) for event in frame.events)
    assert refused == Refused(2, 503, "the replica is shutting down", None, messages.DRAINING)
    assert engine.seen == 1
    assert not draining.done()

    engine.say("the end", "stop")
    await soon(draining)
    closing = asyncio.create_task(hand.server.close())
    (frame,) = await frames_until(router, {1})
    assert b"the end" in frame.events[-1].data  # type: ignore[union-attr]
    assert await router.all() == []
    await soon(closing)


async def test_a_router_that_comes_during_a_drain_is_told(hand: Replica, engine: HandEngine) -> None:
    """A trunk opened to a draining replica says so before anything is sent over it."""
    router = await hand.router()
    router.send(submit(1))
    await until(lambda: engine.requests)
    draining = asyncio.create_task(hand.server.drain())
    late = await hand.router()
    while await late.receive() != messages.Draining():
        pass
    router.send(Cancel(1))
    await soon(draining)


async def test_closing_waits_for_a_router_that_reads_and_for_no_other() -> None:
    """What a router has not read yet is sent before its trunk closes; one that does not read is left after
    silence_s."""
    engine = HandEngine()
    async with replica(engine, TrunkSettings(heartbeat_s=0.2, silence_s=1.0, connect_s=5.0)) as one:
        reads, deaf = await one.router(), await one.router()
        reads.send(submit(1))
        deaf.send(submit(2))
        await until(lambda: len(engine.requests) == 2)
        engine.requests["chat-1"].sink.put(0, "-" * 2**20, (0,), "stop")
        engine.requests["chat-2"].sink.put(0, "-" * 2**24, (0,), "stop")
        closing = asyncio.create_task(one.server.close())
        (ended,) = (e for f in await frames_until(reads, {1}) for e in f.events if isinstance(e, Ended))
        assert len(ended.data) > 2**20
        await soon(closing)
        await until(lambda: not one.server.connections)
