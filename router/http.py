"""The HTTP server: uvicorn, with an end to all that a connection costs, errors in OpenAI's envelope, and a
way for answers that is shorter than ASGI's.

What a token costs a router is mostly its way to the socket. ASGI's is a coroutine, a message and a list of
pieces for each chunk, and two writes where an answer begins; an `Exchange` writes what the client will read
straight to the transport, and says whether the client keeps up.
"""

from __future__ import annotations

import asyncio
import select
import uuid
from asyncio import BaseTransport, TimerHandle, Transport
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, cast

import structlog
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from router.errors import ApiError, HeadersTooLarge, MalformedRequest, RequestTimeout, TooManyConnections
from router.settings import Limits, Timeouts

log = structlog.get_logger(__name__)

EXCHANGE = "trunkline.exchange"
"""Where a request's `scope["state"]` has its `Exchange`."""

GOODBYE_S = 1.0
"""Seconds between a refusal that ends a connection and its end. To close at once would reset the connection
of a client that is still sending, and it would not see why."""

DATE_S = 1.0
"""Seconds between two readings of the clock for the `date` that answers carry."""

PEER_S = 0.5
"""Seconds between two looks whether a client that is not being read is still there."""


class Server(uvicorn.Server):
    """uvicorn's server, which looks ten times a second whether it is to end. This one is told."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._leaving = asyncio.Event()

    def leave(self) -> None:
        """Take no more connections, and end with the last answer."""
        self.should_exit = True
        self._leaving.set()

    async def main_loop(self) -> None:
        while not await self.on_tick(0):
            with suppress(TimeoutError):
                await asyncio.wait_for(self._leaving.wait(), DATE_S)


def uvicorn_server(application: ASGIApp, limits: Limits, timeouts: Timeouts) -> Server:
    """An HTTP server that leaves the event loop, signals and logs to us."""
    # Whatever makes a protocol will do; the annotation wants a class.
    connection = cast("type[Connection]", partial(Connection, limits=limits, timeouts=timeouts))
    return Server(
        uvicorn.Config(
            application,
            loop="none",
            http=connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=75,
            backlog=4096,
        )
    )


class Exchange:
    """One request, and its answer as bytes on the way to the client. What is written after the client has
    left goes nowhere.

    An answer is one `respond`, or a `begin` and as many `write`s as there are pieces after the first. Between
    two of them `drain` waits until the client has taken enough; nothing else bounds what waits for it.
    Headers are lines, as `header_line` makes them.
    """

    __slots__ = ("_connection", "_cycle", "_flow", "_left", "_transport")

    def __init__(self, connection: Connection) -> None:
        self._left: Callable[[], None] | None = None
        self._connection = connection
        self._cycle = connection.cycle
        self._flow = connection.flow
        self._transport = connection.transport

    # The request.

    @property
    def disconnected(self) -> bool:
        """Whether nobody waits for the answer."""
        return self._cycle.disconnected

    def body(self) -> bytes | None:
        """The request's body, where the whole of it is here."""
        if self._cycle.more_body:
            return None
        self._flow.resume_reading()
        body, self._cycle.body = self._cycle.body, bytearray()
        return bytes(body)

    def listen(self, left: Callable[[], None] | None) -> None:
        """Call `left` where the client leaves before its answer is complete."""
        self._left = left
        # The end of a connection is noticed only while it is read; a large body may have stopped that.
        self._flow.resume_reading()

    def leave(self) -> None:
        """The client is gone."""
        self._cycle.disconnected = True
        self._cycle.message_event.set()
        if self._left is not None:
            self._left()

    @property
    def answerable(self) -> bool:
        """Whether the request has come whole, or its answer has begun."""
        return self._cycle.response_started or not self._cycle.more_body

    def be_last(self) -> None:
        """Close the connection once the answer is complete."""
        self._cycle.keep_alive = False

    # The answer.

    def respond(self, status: int, headers: bytes, body: bytes) -> None:
        """Write a whole answer and how long it is."""
        if not self._cycle.disconnected:
            head = self._head(status, headers)
            self._transport.write(b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body))
            self._complete()

    def begin(self, status: int, headers: bytes, data: bytes, *, more: bool) -> None:
        """Write the head of an answer of unknown length, and its first piece."""
        if not self._cycle.disconnected:
            head = self._head(status, headers)
            self._transport.write(b"%btransfer-encoding: chunked\r\n\r\n%b" % (head, _chunk(data, more=more)))
            if not more:
                self._complete()

    def write(self, data: bytes, *, more: bool) -> None:
        """Write the next piece."""
        if not self._cycle.disconnected:
            self._transport.write(_chunk(data, more=more))
            if not more:
                self._complete()

    def offer(self, data: bytes) -> bool:
        """Write the next piece, of which more follow, if the client keeps up; whether it does."""
        if self._flow.write_paused or self._cycle.disconnected:
            return False
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True

    async def drain(self) -> None:
        """Returns when the client has taken enough of what was written, or has left."""
        if self._flow.write_paused and not self._cycle.disconnected:
            await self._flow.drain()

    def drop_unread(self, after_s: float) -> None:
        """End the connection if the client has not taken all of its last answer after so many seconds."""
        connection, last = self._connection, self._connection.cycle

        def drop() -> None:
            if connection.cycle is last and connection.transport.get_write_buffer_size():
                connection.transport.abort()

        connection.loop.call_later(after_s, drop)

    def _head(self, status: int, headers: bytes) -> bytes:
        """The head of an answer, but for how long it is and its end."""
        cycle = self._cycle
        cycle.response_started = True
        return _head(status, self._connection, headers if cycle.keep_alive else headers + _LAST)

    def _complete(self) -> None:
        cycle = self._cycle
        cycle.response_complete = True
        if not cycle.keep_alive:
            self._transport.close()
        cycle.on_response()


class Connection(HttpToolsProtocol):
    """One client's connection. uvicorn sets no end to these, and here they have one: a head that is too long
    or too late, the rest of a body that is answered already, a client that takes nothing of what waits for
    it, and one that has left behind a request that it sent ahead."""

    # More than 30 attributes in an object's dictionary would cost each connection 2 kB.
    __slots__ = (
        "_in_head",
        "_limits",
        "_may_come",
        "_refused",
        "_surplus",
        "_timeouts",
        "_timers",
        "_unanswered",
        "_unread",
    )

    def __init__(self, *arguments: Any, limits: Limits, timeouts: Timeouts, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._limits = limits
        self._timeouts = timeouts
        self._unanswered: list[Exchange] = []
        """Requests whose head has come, in order. The first is being worked on."""
        self._in_head = False
        self._may_come = limits.header_bytes
        """Bytes that may come before a head is complete or a part of a body is there."""
        self._surplus = False
        self._refused = False
        """Whether what still comes is dropped."""
        self._unread = 0
        """Bytes that waited for the client at the last look."""
        self._timers: dict[Callable[[], None], TimerHandle] = {}

    # What the transport calls.

    def connection_made(self, transport: BaseTransport) -> None:
        super().connection_made(cast("Transport", transport))
        self._surplus = len(self.connections) > self._limits.connections
        self._ring_after(GOODBYE_S if self._surplus else self._timeouts.header_s, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._leave_unanswered()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._surplus:
            self._refuse(TooManyConnections())
        while data and not self._refused:
            # The parser gathers a line until it ends, so that it must not be given more than a head may have.
            part, data = data[: self._may_come], data[self._may_come :]
            self._may_come -= len(part)
            super().data_received(part)
            if self._may_come == 0:
                self._refuse(HeadersTooLarge(self._limits.header_bytes))
        if not self._refused and (self._in_head or not self._unanswered):
            self._ring_after(self._timeouts.header_s, self._late)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    # What the parser calls.

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._silence(self._late)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._in_head = False
        self._may_come = self._limits.header_bytes
        self._silence(self._late)
        exchange = self.scope["state"][EXCHANGE] = Exchange(self)
        self._unanswered.append(exchange)
        if len(self._unanswered) > 1:
            self._ring_after(PEER_S, self._look_for_peer)

    def on_body(self, body: bytes) -> None:
        self._may_come = self._limits.header_bytes
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._may_come = self._limits.header_bytes
        super().on_message_complete()

    def on_response_complete(self) -> None:
        del self._unanswered[0]
        super().on_response_complete()
        self._watch_reader()

    # Refusals.

    def send_400_response(self, msg: str) -> None:
        self._refuse(MalformedRequest())

    def _refuse(self, error: ApiError) -> None:
        """Answer what is no request, and end the connection. Requests that came whole are answered first, and
        are the last."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        log.info("no request", client=self.client, status=error.status, error=error.code)
        good = [exchange for exchange in self._unanswered if exchange.answerable]
        if good:
            good[-1].be_last()
            return
        self._leave_unanswered()
        body = error.body()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            "x-request-id": uuid.uuid4().hex,
            **error.headers,
        }
        lines = b"".join(header_line(*header) for header in headers.items())
        self.transport.write(b"%b\r\n%b" % (_head(error.status, self, lines), body))
        self.transport.write_eof()
        self._ring_after(GOODBYE_S, self.transport.abort)

    def _leave_unanswered(self) -> None:
        """Let every request know that nobody waits for its answer. uvicorn tells the newest one alone."""
        for exchange in self._unanswered:
            exchange.leave()

    # The clock.

    def _ring_after(self, seconds: float, look: Callable[[], None]) -> None:
        """Call `look` after so many seconds, unless it is going to be called anyway."""

        def ring() -> None:
            del self._timers[look]
            look()

        if look not in self._timers:
            self._timers[look] = self.loop.call_later(seconds, ring)

    def _silence(self, look: Callable[[], None]) -> None:
        if timer := self._timers.pop(look, None):
            timer.cancel()

    def _late(self) -> None:
        """No head has come in time, or no end of a body that is answered already."""
        if self.flow.read_paused:
            self._ring_after(self._timeouts.header_s, self._late)
        elif self._in_head:
            self._refuse(RequestTimeout(self._timeouts.header_s, "headers"))
        elif not self._unanswered:
            self.transport.close()

    def _watch_reader(self) -> None:
        """Make sure that the client takes something of what waits for it, time and again."""
        self._unread = self.transport.get_write_buffer_size()
        self._silence(self._look_at_reader)
        if self._unread:
            self._ring_after(self._timeouts.reader_s, self._look_at_reader)

    def _look_at_reader(self) -> None:
        # While writing is paused, and where nothing is being answered, nothing is added to what waits.
        if self.flow.write_paused or not self._unanswered:
            if self.transport.get_write_buffer_size() >= self._unread:
                self.transport.abort()
            else:
                self._watch_reader()

    def _look_for_peer(self) -> None:
        """Notice a client that left after it had sent a request ahead: nothing is read before that one's
        turn, and the end of the connection comes behind it."""
        if len(self._unanswered) > 1:
            peer = select.poll()
            peer.register(self.transport.get_extra_info("socket").fileno(), select.POLLRDHUP)
            if peer.poll(0):
                self.transport.abort()
            else:
                self._ring_after(PEER_S, self._look_for_peer)


def header_line(name: str, value: str) -> bytes:
    """A header as it is sent."""
    return f"{name}: {value}\r\n".encode()


_LAST = header_line("connection", "close")


def _head(status: int, connection: Connection, headers: bytes) -> bytes:
    """The first line of an answer, what the server says in each, and these headers."""
    common = [b"%b: %b\r\n" % header for header in connection.server_state.default_headers]
    return b"".join((STATUS_LINE[status], *common, headers))


def _chunk(data: bytes, *, more: bool) -> bytes:
    """A piece of a body as HTTP/1.1 sends it; an empty one would be its end."""
    chunk = b"%x\r\n%b\r\n" % (len(data), data) if data else b""
    return chunk if more else chunk + b"0\r\n\r\n"
