"""The replica's end of the trunk: requests in, frames out.

Whatever an engine step puts into the sinks of one router's streams leaves as one frame. The flush is
self-clocked: it runs once the step is over, and while the router is not reading, output gathers and
leaves as fewer, larger pieces.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, cast

import structlog

from serving import messages
from serving.engine import Engine, Refusal
from serving.generate import generate
from serving.handshake import HandshakeFailed, nonce, prove, verify
from serving.messages import Accepted, Chunk, Ended, Event, Frame, FrameReader, Load, Refused, Usage
from serving.metrics import TrunkTraffic
from serving.settings import TrunkSettings

log = structlog.get_logger(__name__)

FRAME_DATA = 1024 * 1024
"""Bytes of stream data after which a frame is closed and the next one begun."""

GATHERED_LIMIT = 64 * 1024 * 1024
"""Bytes that may gather for a router that does not read, before it is given up."""


class TrunkServer:
    """Listens for routers and generates for them on one engine."""

    def __init__(
        self, engine: Engine, *, replica: str, secret: bytes, settings: TrunkSettings, traffic: TrunkTraffic
    ) -> None:
        self.engine = engine
        self.replica = replica
        self.secret = secret
        self.settings = settings
        self.traffic = traffic
        self.draining = False
        self.connections: set[Connection] = set()
        self._streams = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._alone = asyncio.Event()
        self._alone.set()
        self._server: asyncio.Server | None = None
        self._beating: asyncio.Task[None] | None = None

    async def start(self, host: str) -> tuple[str, int]:
        """Listen on a free port of `host`; returns the address that routers connect to."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Connection(self), host, 0)
        self._beating = asyncio.create_task(self._beat(), name="trunk heartbeat")
        address: tuple[str, int] = self._server.sockets[0].getsockname()[:2]
        return address

    async def drain(self) -> None:
        """Take no new stream, and return when the last one has ended."""
        self.draining = True
        for connection in self.connections:
            connection.send(messages.Draining())
        await self._idle.wait()

    async def close(self) -> None:
        """Send what is still to be sent, then end every connection, and with it every stream."""
        if self._beating is not None:
            self._beating.cancel()
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.finish()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._alone.wait(), self.settings.silence_s)
        for connection in list(self.connections):
            connection.abort()

    def connected(self, connection: Connection) -> None:
        """A router has opened a trunk."""
        self.connections.add(connection)
        self._alone.clear()

    def disconnected(self, connection: Connection) -> None:
        """A trunk is gone."""
        self.connections.discard(connection)
        if not self.connections:
            self._alone.set()

    def count_streams(self, change: int) -> None:
        """A stream has begun (1) or ended (-1)."""
        self._streams += change
        if self._streams:
            self._idle.clear()
        else:
            self._idle.set()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self.settings.heartbeat_s)
            for connection in list(self.connections):
                connection.beat()


class Connection(asyncio.Protocol):
    """One router's trunk, from the challenge to the last frame."""

    transport: asyncio.Transport

    def __init__(self, server: TrunkServer) -> None:
        self.streams: dict[int, ReplicaStream] = {}
        self.router = "unknown"
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._nonce = nonce()
        self._welcomed = False
        self._reader = FrameReader(messages.HANDSHAKE_LIMIT)
        self._events: list[Event] = []
        self._gathered = 0
        self._flush_scheduled = False
        self._paused = False
        self._finished = False
        self._reported: Load | None = None
        self._silent_beats = 0
        self._handshake: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<trunk to {self.router}: {len(self.streams)} streams, {self._gathered} bytes gathered>"

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._server.connected(self)
        self.send(messages.Challenge(messages.PROTOCOL, self._nonce))
        self._handshake = self._loop.call_later(self._server.settings.connect_s, self.abort)

    def data_received(self, data: bytes) -> None:
        if self._finished:
            return
        self._silent_beats = 0
        try:
            for frame in self._reader.feed(data):
                self._receive(messages.decode_to_replica(frame))
        except (ValueError, RecursionError, HandshakeFailed) as error:
            # ValueError covers what does not decode and what is too long, RecursionError what is too deep.
            log.warning("trunk refused", router=self.router, peer=self._peer(), error=str(error))
            self.abort()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._schedule_flush()

    def connection_lost(self, error: Exception | None) -> None:
        self._end_handshake()
        for stream in list(self.streams.values()):
            stream.cancel()
        self._server.disconnected(self)
        if self._welcomed:
            log.info("trunk closed", router=self.router, error=repr(error) if error else None)

    # Incoming.

    def _receive(self, message: messages.ToReplica) -> None:
        match message:
            case messages.Hello() if not self._welcomed:
                self._welcome(message)
            case messages.Submit() if self._welcomed:
                self._submit(message)
            case messages.Cancel() if self._welcomed:
                if stream := self.streams.get(message.stream):
                    stream.cancel()
            case messages.Ping() if self._welcomed:
                pass
            case _:
                raise HandshakeFailed(f"{type(message).__name__} out of order")

    def _welcome(self, hello: messages.Hello) -> None:
        server = self._server
        verify(server.secret, "router", hello.proof, hello.nonce, self._nonce)
        self._end_handshake()
        self._welcomed = True
        self.router = hello.router
        self._reader.limit = messages.MAX_FRAME
        proof = prove(server.secret, "replica", hello.nonce, self._nonce)
        self.send(messages.Welcome(proof, server.replica, server.engine.context_length))
        self._report_load()
        if server.draining:
            self.send(messages.Draining())
        log.info("trunk open", router=self.router)

    def _submit(self, message: messages.Submit) -> None:
        if message.stream in self.streams:
            raise ValueError(f"stream {message.stream} is already open")
        stream = ReplicaStream(self, self._server.engine, message)
        self.streams[message.stream] = stream
        self._server.count_streams(1)
        if self._server.draining:
            stream.refused(Refusal("the replica is shutting down", status=503, code=messages.DRAINING))
        else:
            stream.start()

    # Outgoing.

    def send(self, message: messages.ToRouter) -> None:
        """Write one message at once."""
        frame = messages.encode(message)
        self._server.traffic.sent(len(frame))
        self.transport.write(frame)

    def emit(self, event: Event, size: int = 0) -> None:
        """Send an event, which has `size` bytes for a client, with the next frame."""
        self._events.append(event)
        self._gathered += size
        if not self._flush_scheduled:
            self._schedule_flush()

    def forget(self, stream: int) -> None:
        """The stream has ended."""
        del self.streams[stream]
        self._server.count_streams(-1)

    def finish(self) -> None:
        """Write what has gathered and close once the router has read it.

        Our direction is closed and the other one read until the router closes it: a socket that is closed
        with a ping unread drops what is still on its way to the router.
        """
        if not self._welcomed:
            self.abort()
        elif not self._finished:
            self._paused = False
            self._flush()
            self._finished = True
            self.transport.write_eof()

    def abort(self) -> None:
        """Drop the connection without waiting for the router."""
        self.transport.abort()

    def beat(self) -> None:
        """Once a heartbeat: notice silence, and give a sign of life, whatever else has been said."""
        for stream in self.streams.values():
            stream.report_progress()
        self._silent_beats += 1
        settings = self._server.settings
        if self._silent_beats * settings.heartbeat_s >= settings.silence_s:
            log.warning("trunk lost: the router is silent", router=self.router)
            self.abort()
        elif self._welcomed and not self._report_load():
            self.send(messages.Ping())

    def _schedule_flush(self) -> None:
        self._flush_scheduled = True
        self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_scheduled = False
        if self._paused:
            self._judge_reader()
            return
        if self._finished or not self._events or self.transport.is_closing():
            return
        events, self._events = self._events, []
        size, self._gathered = self._gathered, 0
        for part in [events] if size <= FRAME_DATA else _frames(events):
            self.send(Frame(part, self._changed_load()))

    def _judge_reader(self) -> None:
        """Give up a router that never reads."""
        if self._gathered > GATHERED_LIMIT:
            log.warning("trunk given up: the router does not read", router=self.router, bytes=self._gathered)
            self._events.clear()
            self.abort()

    def _report_load(self) -> bool:
        load = self._changed_load()
        if load is not None:
            self.send(Frame([], load))
        return load is not None

    def _changed_load(self) -> Load | None:
        load = self._server.engine.load()
        if load == self._reported:
            return None
        self._reported = load
        return load

    def _end_handshake(self) -> None:
        if self._handshake is not None:
            self._handshake.cancel()

    def _peer(self) -> Any:
        return self.transport.get_extra_info("peername")


class ReplicaStream:
    """One request on one trunk: the outlet that its answer is written to."""

    __slots__ = ("_closed", "_connection", "_engine", "_progressed", "_request", "_starting", "_stream")

    def __init__(self, connection: Connection, engine: Engine, submit: messages.Submit) -> None:
        self._connection = connection
        self._engine = engine
        self._stream = submit.stream
        self._request = submit.request
        self._starting: asyncio.Task[None] | None = None
        self._progressed = False
        self._closed = False

    def start(self) -> None:
        """Begin to generate."""
        self._starting = asyncio.create_task(generate(self._engine, self._request, self))

    def cancel(self) -> None:
        """Nobody waits any more: free what the request holds in the engine. Idempotent."""
        if self._closed:
            return
        if self._starting is not None:
            self._starting.cancel()
        self._engine.cancel(self._request.id)
        self._close()

    def accepted(self, prompt_tokens: int) -> None:
        if not self._closed:
            self._connection.emit(Accepted(self._stream, prompt_tokens))

    def refused(self, refusal: Refusal) -> None:
        if not self._closed:
            self._connection.emit(
                Refused(
                    self._stream,
                    refusal.status,
                    refusal.message,
                    refusal.param,
                    refusal.code,
                    refusal.retry_after,
                )
            )
            self._engine.cancel(self._request.id)
            self._close()

    def progress(self) -> None:
        self._progressed = True

    def report_progress(self) -> None:
        """Once a heartbeat: an empty chunk for what was made since and is not for the client yet."""
        if self._progressed:
            self._progressed = False
            self._connection.emit(Chunk(self._stream, b"", 0))

    def chunk(self, data: bytes, tokens: int) -> None:
        if not self._closed:
            self._connection.emit(Chunk(self._stream, data, tokens), len(data))

    def ended(self, data: bytes, tokens: int, usage: Usage, *, failed: bool = False) -> None:
        if not self._closed:
            self._connection.emit(Ended(self._stream, data, tokens, usage, failed), len(data))
            self._close()

    def _close(self) -> None:
        self._closed = True
        self._connection.forget(self._stream)


def _frames(events: list[Event]) -> Iterable[list[Event]]:
    """Cut gathered events into frames of about FRAME_DATA bytes, in order."""
    frame: list[Event] = []
    size = 0
    for event in events:
        frame.append(event)
        size += len(event.data) if isinstance(event, Chunk | Ended) else 0
        if size >= FRAME_DATA:
            yield frame
            frame, size = [], 0
    if frame:
        yield frame
