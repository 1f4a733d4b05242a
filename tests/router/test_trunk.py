"""The router's end of the trunk, spoken to by a bare replica."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from router.backend import Piece
from router.errors import ApiError, FirstTokenTimeout, SlowReader, Stalled
from router.settings import ModelTimeouts
from router.trunk import Leaving, Lost, Trunk, TrunkOptions, TrunkStream
from serving import messages
from serving.handshake import HandshakeFailed, nonce, prove
from serving.messages import (
    Accepted,
    Cancel,
    Chat,
    Chunk,
    Ended,
    Event,
    Frame,
    Load,
    Message,
    Refused,
    Sampling,
    Submit,
    Usage,
)
from serving.settings import TrunkSettings
from tests.harness import OPTIONS, nothing_escapes
from tests.peers import SECRET, BareReplica, bare_replica, welcome
from tests.waiting import soon, until


def chat(n: int = 1) -> Chat:
    """A streamed request."""
    return Chat("id", "m", 0, (Message("user", "hi"),), Sampling(max_tokens=9, n=n), stream=True)


@dataclass
class Line:
    """A trunk and the bare replica at its other end."""

    trunk: Trunk
    replica: BareReplica

    async def submit(self) -> tuple[TrunkStream, int]:
        """A stream that the replica has accepted, and its number."""
        stream = self.trunk.submit(chat())
        number = max(self.trunk.streams)
        while (await self.heard(Submit)).stream != number:
            pass
        self.send(Accepted(number, 3))
        return stream, number

    def send(self, *events: Event, load: Load | None = None) -> None:
        """One frame from the replica."""
        self.replica.send(Frame(list(events), load))

    async def heard(self, kind: type[Any]) -> Any:
        """The next message of a kind that the router sends."""
        while not isinstance(message := await self.replica.receive(), kind):
            assert message is not None, "the trunk was closed"
        return message

    async def lost(self) -> None:
        """Returns when the router has dropped the trunk."""
        await soon(asyncio.shield(self.trunk.closed))


@asynccontextmanager
async def connected(options: TrunkOptions = OPTIONS) -> AsyncIterator[Line]:
    """An open trunk."""
    async with nothing_escapes(), bare_replica() as (address, accepted):
        connecting = asyncio.create_task(Trunk.connect(*address, options))
        replica = await soon(accepted.get())
        await welcome(replica)
        trunk = await soon(connecting)
        try:
            yield Line(trunk, replica)
        finally:
            trunk.abort()
            await soon(trunk.closed)


@pytest_asyncio.fixture
async def line() -> AsyncIterator[Line]:
    """An open trunk with the options above."""
    async with connected() as one:
        yield one


# ---- the handshake ------------------------------------------------------------------------------------


@asynccontextmanager
async def connecting(
    options: TrunkOptions = OPTIONS,
) -> AsyncIterator[tuple[asyncio.Task[Trunk], BareReplica]]:
    """A trunk whose handshake is in the test's hands."""
    async with nothing_escapes(), bare_replica() as (address, accepted):
        attempt = asyncio.create_task(Trunk.connect(*address, options))
        yield attempt, await soon(accepted.get())
        await asyncio.wait([attempt])


async def test_a_replica_with_another_secret_is_refused() -> None:
    """A welcome whose proof was made with another secret opens no trunk."""
    async with connecting() as (attempt, replica):
        theirs = nonce()
        replica.send(messages.Challenge(messages.PROTOCOL, theirs))
        hello = await replica.receive()
        assert isinstance(hello, messages.Hello)
        proof = prove(b"another", "replica", hello.nonce, theirs)
        replica.send(messages.Welcome(proof, "stranger", 100))
        with pytest.raises(HandshakeFailed, match="the replica does not know this deployment's secret"):
            await soon(attempt)


async def test_a_welcome_that_was_overheard_opens_no_second_trunk() -> None:
    """The proof of an earlier connection, with its challenge, is worth nothing on another."""
    theirs = nonce()
    proofs = []
    for _ in range(2):
        async with connecting() as (attempt, replica):
            replica.send(messages.Challenge(messages.PROTOCOL, theirs))
            hello = await replica.receive()
            assert isinstance(hello, messages.Hello)
            proofs.append(prove(SECRET, "replica", hello.nonce, theirs))
            replica.send(messages.Welcome(proofs[0], "replica", 100))
            if len(proofs) == 1:
                (await soon(attempt)).abort()
            else:
                with pytest.raises(HandshakeFailed):
                    await soon(attempt)


async def test_the_router_never_sends_the_secret(line: Line) -> None:
    """Nothing that a router says in a handshake and after it holds the secret."""
    await line.submit()
    assert len(line.replica.bytes) > 100
    assert SECRET not in line.replica.bytes


async def test_ends_of_different_versions_refuse_each_other() -> None:
    """A replica that speaks another protocol is told nothing, and the error names both versions."""
    async with connecting() as (attempt, replica):
        replica.send(messages.Challenge(messages.PROTOCOL + 1, nonce()))
        with pytest.raises(
            HandshakeFailed, match=rf"protocol {messages.PROTOCOL + 1}, not {messages.PROTOCOL}"
        ):
            await soon(attempt)
        assert await replica.all() == []


@pytest.mark.parametrize(
    "early",
    [
        messages.encode(Frame([Chunk(1, b"x", 1)])),
        messages.encode(messages.Welcome(b"x" * 32, "early", 1)),
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        struct.pack(">I", messages.MAX_FRAME + 1),
        b"\0\0\0\1\xc1",
        struct.pack(">I", 100_002) + b"\x92\x0c" + b"\x91" * 100_000,
    ],
    ids=["frame", "welcome", "http", "too-long", "garbage", "too-deep"],
)
async def test_whatever_else_comes_first_opens_no_trunk(early: bytes) -> None:
    """Instead of a challenge, anything ends the attempt at once with a failed handshake."""
    async with connecting() as (attempt, replica):
        replica.writer.write(early)
        with pytest.raises(HandshakeFailed):
            await soon(attempt)


async def test_a_replica_that_says_nothing_is_given_connect_s() -> None:
    """A connection whose handshake does not come is given up in time, and one that is closed at once."""
    options = replace(OPTIONS, settings=TrunkSettings(heartbeat_s=1.0, silence_s=60.0, connect_s=0.2))
    async with connecting(options) as (attempt, replica):
        with pytest.raises(TimeoutError):
            await soon(attempt)
        assert await replica.all() == []
    async with connecting(options) as (attempt, replica):
        replica.leave()
        with pytest.raises(OSError, match=r"handshake|reset"):
            await soon(attempt)


async def test_a_router_says_nothing_before_it_is_asked() -> None:
    """A replica that takes its time with the challenge is not pinged meanwhile: it could not tell who is
    speaking."""
    options = replace(OPTIONS, settings=TrunkSettings(heartbeat_s=0.02, silence_s=10.0, connect_s=10.0))
    async with connecting(options) as (attempt, replica):
        silent = asyncio.create_task(replica.receive())
        await asyncio.wait([silent], timeout=0.2)
        assert not silent.done()
        theirs = nonce()
        replica.send(messages.Challenge(messages.PROTOCOL, theirs))
        hello = await silent
        assert isinstance(hello, messages.Hello)
        replica.send(messages.Welcome(prove(SECRET, "replica", hello.nonce, theirs), "slow", 100))
        (await soon(attempt)).abort()


# ---- streams ------------------------------------------------------------------------------------------


async def test_what_gathers_is_read_in_one_piece(line: Line) -> None:
    """A reader gets everything that has come since it last read, joined and in order, with its tokens."""
    stream, number = await line.submit()
    other, second = await line.submit()
    line.send(Chunk(number, b"a", 1), Chunk(second, b"x", 1), Chunk(number, b"b", 2))
    line.send(Chunk(number, b"", 0), Ended(number, b"c", 1, Usage(3, 4)))
    line.send(Ended(second, b"y", 0, Usage(3, 1)))
    await until(lambda: not line.trunk.streams)
    await soon(stream.started())
    assert await soon(stream.read()) == Piece(b"abc", 4, last=True)
    assert (stream.prompt_tokens, stream.usage) == (3, Usage(3, 4))
    assert await soon(other.read()) == Piece(b"xy", 1, last=True)


async def test_a_reader_that_keeps_up_gets_each_piece_as_it_comes(line: Line) -> None:
    """Nothing is held back: a chunk is read before the next is sent."""
    stream, number = await line.submit()
    for at in range(50):
        line.send(Chunk(number, b"%d" % at, 1))
        assert await soon(stream.read()) == Piece(b"%d" % at, 1, last=False)


async def directed(line: Line) -> tuple[int, list[tuple[bytes, int]], asyncio.Task[Piece]]:
    """A stream whose reader has taken the first piece and waits, while others may go a direct way: its
    number, what went that way, and the reading."""
    stream, number = await line.submit()
    line.send(Chunk(number, b"a", 1))
    assert (await soon(stream.read())).data == b"a"
    direct: list[tuple[bytes, int]] = []

    def take(data: bytes, tokens: int, _: float) -> bool:
        direct.append((data, tokens))
        return True

    stream.direct = take
    reading = asyncio.create_task(stream.read())
    await asyncio.sleep(0)
    return number, direct, reading


async def test_what_comes_while_the_reader_waits_need_not_wake_it(line: Line) -> None:
    """A stream with a direct way hands on what one read brings, as one piece and with its tokens, while its
    reader goes on waiting; the end is the reader's."""
    number, direct, reading = await directed(line)
    line.send(Chunk(number, b"b", 1), Chunk(number, b"", 0), Chunk(number, b"c", 2))
    await until(lambda: direct)
    line.send(Ended(number, b"d", 1, Usage(3, 5)))
    assert await soon(reading) == Piece(b"d", 1, last=True)
    assert direct == [(b"bc", 3)]


async def test_what_one_turn_reads_goes_on_as_one_piece(line: Line) -> None:
    """A transport that finds much in one turn of the loop reads several times. Nothing is handed on between,
    so that a router which has fallen behind writes once for all of it."""
    number, direct, reading = await directed(line)
    for data in (b"b", b"c", b"d"):
        line.trunk.data_received(bytes(messages.encode(Frame([Chunk(number, data, 1)], None))))
    assert not direct
    await until(lambda: direct)
    assert direct == [(b"bcd", 3)]
    line.send(Ended(number, b"e", 1, Usage(3, 5)))
    assert await soon(reading) == Piece(b"e", 1, last=True)


@settings(max_examples=40)
@given(steps=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12))
async def test_nothing_overtakes_what_came_before_it(line: Line, steps: list[tuple[bool, bool]]) -> None:
    """Whether or not there is room for a piece when it comes, and whenever the reader gets to write what it
    has read, all is written once and in order."""
    stream, number = await line.submit()
    written: list[bytes] = []
    client = asyncio.Event()

    async def read() -> None:
        last = False
        while not last:
            data, _, last = await stream.read()
            await client.wait()
            written.append(data)

    reading = asyncio.create_task(read())
    for at, (room, takes) in enumerate(steps, 1):

        def take(data: bytes, _tokens: int, _now: float, *, room: bool = room) -> bool:
            if room:
                written.append(data)
            return room

        stream.direct = take
        if takes:
            client.set()
        else:
            client.clear()
        reports = line.trunk.reports
        line.send(Chunk(number, b"%d " % at, 1), load=Load(at))
        await until(lambda reports=reports: line.trunk.reports > reports)  # type: ignore[misc]
    line.send(Ended(number, b"end", 0, Usage(1, len(steps))))
    client.set()
    await soon(reading)
    assert b"".join(written) == b"".join([*(b"%d " % at for at in range(1, len(steps) + 1)), b"end"])


@settings(max_examples=40)
@given(chunks=st.lists(st.binary(min_size=1, max_size=30), max_size=12), cuts=st.lists(st.integers(1, 60)))
async def test_frames_arrive_however_they_are_torn(line: Line, chunks: list[bytes], cuts: list[int]) -> None:
    """Frames that come in pieces, each in a packet of its own, are the stream that was sent."""
    stream, number = await line.submit()
    sent = b"".join(messages.encode(Frame([Chunk(number, data, 1)])) for data in chunks)
    sent += messages.encode(Frame([Ended(number, b"end", 0, Usage(1, len(chunks)))]))
    for cut in cuts:
        line.replica.writer.write(sent[:cut])
        sent = sent[cut:]
        await asyncio.sleep(0)
    line.replica.writer.write(sent)
    pieces = [await soon(stream.read())]
    while not pieces[-1].last:
        pieces.append(await soon(stream.read()))
    assert b"".join(piece.data for piece in pieces) == b"".join(chunks) + b"end"
    assert sum(piece.tokens for piece in pieces) == len(chunks)


async def test_a_lost_trunk_ends_its_streams_with_what_they_had(line: Line) -> None:
    """When the connection closes, each stream can be read as far as it came and is lost after that; one of
    which nothing had come is lost at once."""
    begun, number = await line.submit()
    not_begun, _ = await line.submit()
    line.send(Chunk(number, b"half", 1))
    await soon(begun.started())
    line.replica.leave()
    assert (await soon(begun.read())).data == b"half"
    with pytest.raises(Lost):
        await soon(begun.read())
    with pytest.raises(Lost):
        await soon(not_begun.started())
    with pytest.raises(Lost):
        await soon(line.trunk.submit(chat()).started())
    begun.close()
    not_begun.close()


async def test_a_stream_that_the_engine_fails_is_lost(line: Line) -> None:
    """A failed end is a loss, of that stream alone."""
    stream, number = await line.submit()
    other, second = await line.submit()
    line.send(
        Chunk(number, b"half", 1), Ended(number, b"", 0, Usage(3, 1), failed=True), Chunk(second, b"x", 1)
    )
    assert (await soon(stream.read())).data == b"half"
    with pytest.raises(Lost):
        await soon(stream.read())
    assert (await soon(other.read())).data == b"x"


async def test_a_refusal_is_told_in_the_replicas_words(line: Line) -> None:
    """A refused stream raises the refusal with its status, and where the replica drains, that it leaves."""
    stream, number = await line.submit()
    line.send(Refused(number, 400, "too long", "messages", "context_length_exceeded"))
    with pytest.raises(ApiError, match="too long") as refusal:
        await soon(stream.started())
    assert (refusal.value.status, refusal.value.param) == (400, "messages")
    stream, number = await line.submit()
    line.send(Refused(number, 503, "shutting down", None, messages.DRAINING))
    with pytest.raises(Leaving):
        await soon(stream.started())


async def test_a_closed_stream_is_cancelled_once(line: Line) -> None:
    """Closing a stream cancels its request in the replica, however often it is closed; what is still on its
    way for it is dropped. A stream that has ended is not cancelled."""
    stream, number = await line.submit()
    other, second = await line.submit()
    stream.close()
    stream.close()
    line.send(Chunk(number, b"late", 1), Ended(number, b"later", 1, Usage(1, 2)))
    line.send(Ended(second, b"end", 1, Usage(1, 1)))
    assert await soon(other.read()) == Piece(b"end", 1, last=True)
    other.close()
    line.trunk.submit(chat()).close()
    assert await line.heard(Cancel) == Cancel(number)
    last = (await line.heard(Submit)).stream
    assert await line.heard(Cancel) == Cancel(last)
    assert not line.trunk.streams


async def test_a_slow_reader_slows_only_itself(line: Line) -> None:
    """What one stream's reader does not take gathers up to stream_buffer_bytes; past that its request is
    cancelled, its reader gets what had come and then the reason, and other streams go on."""
    slow, number = await line.submit()
    other, second = await line.submit()
    for _ in range(10):
        line.send(Chunk(number, b"-" * 100, 1))
    line.send(Chunk(second, b"x", 1))
    assert (await soon(other.read())).data == b"x"
    assert number in line.trunk.streams
    line.send(Chunk(number, b"-" * 100, 1))
    assert await line.heard(Cancel) == Cancel(number)
    line.send(Chunk(number, b"-" * 100, 1), Chunk(second, b"y", 1))
    assert (await soon(other.read())).data == b"y"
    assert await soon(slow.read()) == Piece(b"-" * 1100, 11, last=False)
    with pytest.raises(SlowReader, match="1024 bytes"):
        await soon(slow.read())


async def test_an_answer_that_ends_may_be_larger_than_the_buffer(line: Line) -> None:
    """The last bytes of a stream are taken whatever their size: nothing more will gather."""
    stream, number = await line.submit()
    line.send(Ended(number, b"-" * 10_000, 5, Usage(1, 5)))
    assert len((await soon(stream.read())).data) == 10_000


# ---- time-outs ----------------------------------------------------------------------------------------


def impatient(**timeouts: float) -> TrunkOptions:
    """Options with these time-outs."""
    return replace(OPTIONS, timeouts=ModelTimeouts(**timeouts))


async def test_a_stream_without_a_first_token_is_given_up() -> None:
    """A replica that accepts and makes nothing for first_token_s is told to stop, and the reader why."""
    async with connected(impatient(first_token_s=0.2)) as line:
        stream, number = await line.submit()
        with pytest.raises(FirstTokenTimeout, match=r"nothing within 0\.2 s"):
            await soon(stream.started())
        assert await line.heard(Cancel) == Cancel(number)


async def test_a_stream_that_stalls_is_given_up() -> None:
    """After its first token a stream may pause for stall_s and no longer; first_token_s is no matter then."""
    async with connected(impatient(first_token_s=0.1, stall_s=0.5)) as line:
        stream, number = await line.submit()
        line.send(Chunk(number, b"a", 1))
        began = asyncio.get_running_loop().time()
        assert (await soon(stream.read())).data == b"a"
        with pytest.raises(Stalled, match=r"nothing more for 0\.5 s"):
            await soon(stream.read())
        assert asyncio.get_running_loop().time() - began > 0.45
        assert await line.heard(Cancel) == Cancel(number)


async def test_progress_without_bytes_is_progress() -> None:
    """An answer of which nothing can be read yet has its first token and does not stall, as long as the
    replica says that there are more tokens; it has begun only when there are bytes."""
    async with connected(impatient(first_token_s=0.3, stall_s=0.3)) as line:
        stream, number = await line.submit()
        starting = asyncio.create_task(stream.started())
        for _ in range(20):
            line.send(Chunk(number, b"", 0))
            await line.heard(messages.Ping)  # about a heartbeat
        assert not starting.done()
        line.send(Ended(number, b"whole", 20, Usage(1, 20)))
        await soon(starting)
        assert await stream.read() == Piece(b"whole", 20, last=True)


# ---- the heartbeat ------------------------------------------------------------------------------------

RESTLESS = replace(OPTIONS, settings=TrunkSettings(heartbeat_s=0.05, silence_s=0.25, connect_s=5.0))


async def test_a_silent_replica_is_lost() -> None:
    """A replica whose socket stays open but says nothing is given up about silence_s later, and its streams
    with it."""
    async with connected(RESTLESS) as line:
        stream, number = await line.submit()
        line.send(Chunk(number, b"a", 1))
        began = asyncio.get_running_loop().time()
        assert (await soon(stream.read())).data == b"a"
        with pytest.raises(Lost):
            await soon(stream.read())
        silence_s, heartbeat_s = RESTLESS.settings.silence_s, RESTLESS.settings.heartbeat_s
        assert asyncio.get_running_loop().time() - began >= silence_s - heartbeat_s
        await line.lost()


async def test_a_slow_stream_is_not_a_silent_replica() -> None:
    """A stream may pause for several times silence_s while the replica pings."""
    async with connected(RESTLESS) as line:
        stream, number = await line.submit()
        for at in range(2):
            for _ in range(15):
                line.replica.send(messages.Ping())
                await line.heard(messages.Ping)
            line.send(Chunk(number, b"%d" % at, 1))
            assert (await soon(stream.read())).data == b"%d" % at


async def test_an_idle_trunk_is_kept_open_by_pings() -> None:
    """A router with nothing to say pings, and one that is pinged stays."""
    async with connected(RESTLESS) as line:
        for _ in range(20):
            assert await line.replica.receive() == messages.Ping()
            line.replica.send(messages.Ping())
        assert not line.trunk.closed.done()


async def test_a_router_that_speaks_pings_all_the_same() -> None:
    """Requests in each beat are no sign of life that the next beat could do without: it may come late."""
    async with connected(RESTLESS) as line:

        async def speak() -> None:
            while True:
                line.trunk.submit(chat()).close()
                await asyncio.sleep(RESTLESS.settings.heartbeat_s / 4)

        speaking = asyncio.create_task(speak())
        for _ in range(3):
            await soon(line.heard(messages.Ping))
        speaking.cancel()


# ---- what broken replicas send ------------------------------------------------------------------------

nested = st.integers(1, 200_000).map(lambda depth: b"\x92\x0c" + b"\x91" * depth)
payloads = st.binary(max_size=200) | nested
framed = payloads.map(lambda payload: struct.pack(">I", len(payload)) + payload)
known: st.SearchStrategy[messages.ToRouter] = st.sampled_from(
    [
        Frame([Chunk(1, b"x", 1), Chunk(77, b"y", 1), Refused(78, 400, "no")], Load(1, 2, 0.5)),
        Frame([Accepted(1, 5), Ended(77, b"", 0, Usage(0, 0), failed=True)]),
        messages.Challenge(messages.PROTOCOL, b"short"),
        messages.Welcome(b"", "again", 5),
        messages.Draining(),
    ]
)
garbage = st.lists(st.one_of(st.binary(max_size=200), framed, known.map(messages.encode)), max_size=5)


@settings(max_examples=60)
@given(sent=garbage)
async def test_garbage_ends_the_trunk_that_it_came_over(sent: list[bytes]) -> None:
    """Any bytes from a replica leave the router as it was: the trunk is closed or goes on, and its streams
    end either way once it closes."""
    async with connected() as line:
        stream = line.trunk.submit(chat())
        line.replica.writer.writelines(sent)
        line.replica.writer.write_eof()
        await line.lost()
        with suppress(Lost, ApiError, Leaving):
            while not (await soon(stream.read())).last:
                pass
        assert not line.trunk.streams


# ---- what is known of the replica ---------------------------------------------------------------------


async def test_a_request_counts_as_work_until_the_replica_reports_it(line: Line) -> None:
    """A request is expected work, by its choices, until a report that came after its acceptance: one that was
    under way when it was sent does not include it."""
    line.trunk.submit(chat(n=3))
    line.trunk.submit(chat())
    assert line.trunk.unreported == 4
    line.send(load=Load(7))
    await until(lambda: line.trunk.load == Load(7))
    assert line.trunk.unreported == 4
    line.send(Accepted(1, 5))
    line.send(load=Load(10))
    await until(lambda: line.trunk.load == Load(10))
    assert line.trunk.unreported == 1
    line.send(Accepted(2, 5), load=Load(11))
    line.send(load=Load(12))
    await until(lambda: line.trunk.load == Load(12))
    assert line.trunk.unreported == 0
    for stream in list(line.trunk.streams.values()):
        stream.close()
    assert line.trunk.unreported == 0


async def test_requests_that_come_and_go_between_two_reports_leave_nothing(line: Line) -> None:
    """A request that ends, is refused or is closed before the replica's load has changed is work no more: a
    replica that answers quickly does not look busy."""
    for _ in range(3):
        stream, number = await line.submit()
        line.send(Ended(number, b"quick", 1, Usage(1, 1)))
        await soon(stream.read())
        stream, number = await line.submit()
        line.send(Refused(number, 400, "no"))
        with pytest.raises(ApiError):
            await soon(stream.started())
        line.trunk.submit(chat(n=5)).close()
    assert line.trunk.unreported == 0
    reported, number = await line.submit()
    line.send(load=Load(1))
    await until(lambda: line.trunk.load == Load(1))
    reported.close()
    assert line.trunk.unreported == 0
