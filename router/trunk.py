"""The router's end of the trunk: requests out, frames in, one buffer per stream.

The way of a token: a read brings the frames of one engine step or more, each with pieces for many streams.
All frames that a turn of the event loop finds are taken apart first; then each stream hands on, in one piece,
what they brought. So a router that falls behind writes less often, and catches up. Where a stream's reader
waits for its piece, nothing is ahead of it, and it goes straight to the client's socket: no task wakes. Where
the reader is busy, because its client is slow, it gathers. Both ways the order is that of the frames.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import cast

import structlog

from router.backend import Direct, Piece
from router.errors import FirstTokenTimeout, SlowReader, Stalled, from_refusal
from router.settings import ModelTimeouts
from serving import messages
from serving.handshake import HandshakeFailed, nonce, prove, verify
from serving.messages import Accepted, Chunk, Ended, Event, FrameReader, Load, Refused, Request, Usage
from serving.metrics import TrunkTraffic
from serving.settings import TrunkSettings

log = structlog.get_logger(__name__)


READER_S = 0.05
"""Seconds that a reader gets to take what is too much to wait: one read from the trunk may bring more of a
long echo than a stream's buffer has room for, before any reader can run."""


class Lost(Exception):
    """The replica is gone, or gave up on the request: nothing more will come."""


class Leaving(Exception):
    """The replica is shutting down and has not taken the request."""


@dataclass(frozen=True, slots=True)
class TrunkOptions:
    """What all trunks of one model have in common."""

    router: str
    secret: bytes
    settings: TrunkSettings
    timeouts: ModelTimeouts
    stream_buffer_bytes: int
    traffic: TrunkTraffic


class Trunk(asyncio.Protocol):
    """One connection to one replica, and every stream on it."""

    transport: asyncio.Transport

    def __init__(self, options: TrunkOptions) -> None:
        loop = asyncio.get_running_loop()
        self.options = options
        self.loop = loop
        self.replica = "unknown"
        self.context_length = 0
        self.load = Load()
        self.draining = False
        self.unreported = 0
        """Sequences that the load does not include: submitted, and not ended or in a report since."""
        self.reportable = 0
        """Those of them that the replica has accepted: its next report includes them."""
        self.reports = 0
        """How often the replica has told its load."""
        self.streams: dict[int, TrunkStream] = {}
        self.ready: asyncio.Future[None] = loop.create_future()
        """Done when the two ends have proven themselves to each other."""
        self.closed: asyncio.Future[None] = loop.create_future()
        self._outgoing = bytearray()
        """What the loop's next turn writes: the requests of one turn go out together."""
        self._touched: set[TrunkStream] = set()
        """Streams that the frames of this turn have brought something."""
        self._nonce = nonce()
        self._challenge = b""
        self._reader = FrameReader(messages.HANDSHAKE_LIMIT)
        self._next_stream = 0
        self._silent_beats = 0
        self._beating: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        state = "closed" if self.closed.done() else "draining" if self.draining else "open"
        return f"<trunk to {self.replica}: {state}, {len(self.streams)} streams, {self.load}>"

    @classmethod
    async def connect(cls, host: str, port: int, options: TrunkOptions) -> Trunk:
        """An open trunk. Raises OSError, TimeoutError or HandshakeFailed."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(options.settings.connect_s):
            _, trunk = await loop.create_connection(lambda: cls(options), host, port)
            try:
                await trunk.ready
            except BaseException:
                trunk.abort()
                raise
        return trunk

    def submit(self, request: Request) -> TrunkStream:
        """Open a stream for the request. A trunk that is closed gives a stream that is lost."""
        self._next_stream += 1
        stream = TrunkStream(self, self._next_stream, request.sequences)
        if self.closed.done():
            stream.fail(Lost())
            return stream
        self.streams[self._next_stream] = stream
        self.unreported += request.sequences
        self.send(messages.Submit(self._next_stream, request))
        return stream

    def send(self, message: messages.ToReplica) -> None:
        """Write one message before the loop waits again."""
        frame = messages.encode(message)
        self.options.traffic.sent(len(frame))
        if not self._outgoing:
            self.loop.call_soon(self._flush)
        self._outgoing += frame

    def abort(self) -> None:
        """Drop the connection; its streams are lost."""
        self.transport.abort()

    def _flush(self) -> None:
        outgoing, self._outgoing = self._outgoing, bytearray()
        if not self.transport.is_closing():
            self.transport.write(outgoing)

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._schedule_beat()

    def data_received(self, data: bytes) -> None:
        self._silent_beats = 0
        try:
            for frame in self._reader.feed(data):
                self._receive(messages.decode_to_router(frame))
        except (ValueError, RecursionError, HandshakeFailed) as error:
            # ValueError covers what does not decode and what is too long, RecursionError what is too deep.
            log.warning("trunk broken", replica=self.replica, error=str(error))
            self._give_up(HandshakeFailed(str(error)))

    def connection_lost(self, error: Exception | None) -> None:
        if self._beating is not None:
            self._beating.cancel()
        if not self.ready.done():
            self.ready.set_exception(error or ConnectionResetError("closed during the handshake"))
        self.closed.set_result(None)
        for stream in list(self.streams.values()):
            stream.fail(Lost())

    # Incoming.

    def _receive(self, message: messages.ToRouter) -> None:
        match message:
            case messages.Frame():
                self._frame(message)
            case messages.Ping():
                pass
            case messages.Challenge():
                self._answer(message)
            case messages.Welcome():
                self._welcomed(message)
            case messages.Draining():
                self.draining = True

    def _frame(self, frame: messages.Frame) -> None:
        if not self.ready.done():
            raise HandshakeFailed("a frame before the welcome")
        if frame.load is not None:
            self.load = frame.load
            self.reports += 1
            self.unreported -= self.reportable
            self.reportable = 0
        streams, touched = self.streams, self._touched
        if frame.events and not touched:
            # Behind the reads of this turn, of which there may be many where much has come.
            self.loop.call_soon(self._hand_on)
        for event in frame.events:
            stream = streams.get(event.stream)
            if stream is None:
                continue  # closed here while this was on its way
            touched.add(stream)
            if type(event) is Chunk:  # nearly all are
                stream.gather(event.data, event.tokens)
            else:
                stream.receive(event)

    def _hand_on(self) -> None:
        touched, self._touched = self._touched, set()
        now = perf_counter()
        for stream in touched:
            stream.hand_on(now)

    def _answer(self, challenge: messages.Challenge) -> None:
        if challenge.protocol != messages.PROTOCOL:
            raise HandshakeFailed(
                f"the replica speaks protocol {challenge.protocol}, not {messages.PROTOCOL}"
            )
        self._challenge = challenge.nonce
        proof = prove(self.options.secret, "router", challenge.nonce, self._nonce)
        self.send(messages.Hello(self.options.router, proof, self._nonce))

    def _welcomed(self, welcome: messages.Welcome) -> None:
        verify(self.options.secret, "replica", welcome.proof, self._challenge, self._nonce)
        self.replica = welcome.replica
        self.context_length = welcome.context_length
        self._reader.limit = messages.MAX_FRAME
        if not self.ready.done():
            self.ready.set_result(None)

    def _give_up(self, error: Exception) -> None:
        if not self.ready.done():
            self.ready.set_exception(error)
        self.abort()

    # The clock: one timer per trunk looks after the heartbeat and after every stream's time-outs.

    def _schedule_beat(self) -> None:
        self._beating = self.loop.call_later(self.options.settings.heartbeat_s, self._beat)

    def _beat(self) -> None:
        self._schedule_beat()
        self._silent_beats += 1
        settings = self.options.settings
        # Beats are counted, not seconds: after a stall of our own, what the replica sent meanwhile is
        # read before the silence is judged.
        if self._silent_beats * settings.heartbeat_s >= settings.silence_s:
            log.warning("trunk lost: the replica is silent", replica=self.replica)
            self.abort()
            return
        if self.ready.done():
            self.send(messages.Ping())
        now = perf_counter()
        for stream in list(self.streams.values()):
            stream.check(now)


class TrunkStream:
    """One request on a trunk. Its output gathers here until its reader takes it.

    The stream owns its place on the trunk: `close` frees it, whoever calls it, as often as it is called.
    """

    __slots__ = (
        "_data",
        "_ended",
        "_error",
        "_heard_at",
        "_judging",
        "_number",
        "_reports",
        "_sequences",
        "_size",
        "_started",
        "_tokens",
        "_trunk",
        "_waiter",
        "accepted",
        "direct",
        "overflowed",
        "prompt_tokens",
        "usage",
    )

    def __init__(self, trunk: Trunk, number: int, sequences: int) -> None:
        self.accepted = False
        """Whether the replica's engine has the request."""
        self.prompt_tokens = 0
        self.usage: Usage | None = None
        self.overflowed: Callable[[SlowReader], None] | None = None
        """Told when the stream is given up because it is not read: its reader is held up where `read` cannot
        tell it."""
        self.direct: Direct | None = None
        """Where pieces go without waking the reader that waits for them."""
        self._trunk = trunk
        self._number = number
        self._sequences = sequences
        self._reports: int | None = None
        """How many reports there had been when the replica accepted; the next one includes this request."""
        self._data: list[bytes] = []
        self._size = 0
        self._tokens = 0
        self._ended = False
        self._started = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._judging: asyncio.TimerHandle | None = None
        self._heard_at = perf_counter()

    @property
    def completion_tokens(self) -> int | None:
        """Generated tokens by the engine's count; None until the answer has ended."""
        return None if self.usage is None else self.usage.completion_tokens

    @property
    def replica(self) -> str:
        """Who generates."""
        return self._trunk.replica

    async def started(self) -> None:
        """Returns when there are bytes to read.

        Raises the replica's refusal as an ApiError, or FirstTokenTimeout, Lost, Leaving.
        """
        await self._wait()
        if not self._data and self._error is not None:
            raise self._error

    async def read(self) -> Piece:
        """Everything that has gathered, waiting for something to gather.

        Raises what ended the stream early, once all that came before it has been read: Lost, or the
        ApiError for a stall or a reader that was too slow.
        """
        await self._wait()
        if not self._data and self._error is not None:
            raise self._error
        piece = Piece(self._joined(), self._tokens, self._ended)
        self._forget()
        return piece

    def close(self) -> None:
        """Leave the trunk; a request that has not ended is cancelled in the engine."""
        self.direct = self.overflowed = None
        if self._judging is not None:
            self._judging.cancel()
        if self._leave() and not self._ended:
            self._trunk.send(messages.Cancel(self._number))

    # What the trunk calls.

    def gather(self, data: bytes, tokens: int) -> None:
        """Bytes for the client, or nothing but a sign of life. They stay here until `hand_on`."""
        self._started = True
        if data:
            self._data.append(data)
            self._size += len(data)
            self._tokens += tokens

    def receive(self, event: Event) -> None:
        """An event that begins or ends the stream."""
        match event:
            case Accepted(prompt_tokens=prompt_tokens):
                self.accepted = True
                self.prompt_tokens = prompt_tokens
                self._reports = self._trunk.reports
                self._trunk.reportable += self._sequences
            case Ended(failed=False, data=data, tokens=tokens, usage=usage):
                self.usage = usage
                self._ended = True
                self._leave()
                self.gather(data, tokens)
            case Ended():
                self.fail(Lost())
            case Refused():
                self.fail(Leaving() if event.code == messages.DRAINING else from_refusal(event))

    def hand_on(self, now: float) -> None:
        """The frames of one turn are taken apart: what they brought goes on, as one piece."""
        self._heard_at = now
        if not self._data:
            return
        if self._waiter is None or self._waiter.done():
            self._limit()  # the reader is busy, and finds it afterwards
        elif self._ended or self.direct is None or not self.direct(self._joined(), self._tokens, now):
            self._waiter.set_result(None)
        else:
            self._forget()

    def fail(self, error: Exception) -> None:
        """Nothing more will be received, because of `error`."""
        self._leave()
        self._error = self._error or error
        self._wake()

    def check(self, now: float) -> None:
        """End the stream if its engine has kept silent for too long."""
        timeouts = self._trunk.options.timeouts
        silence = now - self._heard_at
        if self._started and silence > timeouts.stall_s:
            self._stop(Stalled(timeouts.stall_s))
        elif not self._started and silence > timeouts.first_token_s:
            self._stop(FirstTokenTimeout(timeouts.first_token_s))

    def _joined(self) -> bytes:
        return self._data[0] if len(self._data) == 1 else b"".join(self._data)

    def _forget(self) -> None:
        """What had gathered has been taken."""
        self._data.clear()
        self._size = self._tokens = 0

    def _limit(self) -> None:
        """Where too much has gathered, give the reader a moment to take it."""
        if self._size > self._trunk.options.stream_buffer_bytes and self._judging is None:
            self._judging = self._trunk.loop.call_later(READER_S, self._judge)

    def _judge(self) -> None:
        """Give the request up if its reader has not taken what is too much."""
        self._judging = None
        limit = self._trunk.options.stream_buffer_bytes
        if self._size > limit and not self._ended and self._error is None:
            error, tell = SlowReader(limit), self.overflowed
            self._stop(error)
            if tell is not None:
                tell(error)

    def _stop(self, error: Exception) -> None:
        """Give the request up from our side: the engine is told, the reader finds `error`."""
        self.close()
        self.fail(error)

    def _leave(self) -> bool:
        """Free the place on the trunk; whether it was still held."""
        trunk = self._trunk
        if trunk.streams.pop(self._number, None) is None:
            return False
        # Where it is gone before a report, that report may never come: the load is what it was before.
        if self._reports in {None, trunk.reports}:
            trunk.unreported -= self._sequences
        if self._reports == trunk.reports:
            trunk.reportable -= self._sequences
        return True

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait(self) -> None:
        # An ended stream has data until its last piece is read, and is not read after that.
        while not self._data and self._error is None:
            self._waiter = self._trunk.loop.create_future()
            await self._waiter
