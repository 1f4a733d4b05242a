"""The HTTP server: uvicorn, with an end to all that a connection costs, and errors in OpenAI's envelope."""

from __future__ import annotations

import select
import uuid
from asyncio import BaseTransport, TimerHandle, Transport
from collections import deque
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any, cast

import structlog
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from router.errors import ApiError, HeadersTooLarge, MalformedRequest, RequestTimeout, TooManyConnections
from router.settings import Limits, Timeouts

log = structlog.get_logger(__name__)

DROP_UNREAD = "trunkline.drop_unread"
"""Where a request's `scope["state"]` has `Connection.drop_unread`."""

GOODBYE_S = 1.0
"""Seconds between a refusal that ends a connection and its end. To close at once would reset the connection
of a client that is still sending, and it would not see why."""

PEER_S = 0.5
"""Seconds between two looks whether a client that is not being read is still there."""


def uvicorn_server(application: ASGIApp, limits: Limits, timeouts: Timeouts) -> uvicorn.Server:
    """An HTTP server that leaves the event loop, signals and logs to us."""
    # Whatever makes a protocol will do; the annotation wants a class.
    connection = cast("type[Connection]", partial(Connection, limits=limits, timeouts=timeouts))
    return uvicorn.Server(
        uvicorn.Config(
            application,
            loop="none",
            http=connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=75,
            backlog=4096,
        )
    )


class Connection(HttpToolsProtocol):
    """One client's connection. uvicorn sets no end to these, and here they have one: a head that is too long
    or too late, the rest of a body that is answered already, a client that takes nothing of what waits for
    it, and one that has left behind a request that it sent ahead."""

    def __init__(self, *arguments: Any, limits: Limits, timeouts: Timeouts, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._limits = limits
        self._timeouts = timeouts
        self._unanswered: deque[RequestResponseCycle] = deque()
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

    def drop_unread(self, after_s: float) -> None:
        """End the connection if the client has not taken all of its last answer after so many seconds."""
        last = self.cycle

        def drop() -> None:
            if self.cycle is last and self.transport.get_write_buffer_size():
                self.transport.abort()

        self.loop.call_later(after_s, drop)

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
        self.scope["state"][DROP_UNREAD] = self.drop_unread
        self._in_head = True
        self._silence(self._late)

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._in_head = False
        self._may_come = self._limits.header_bytes
        self._silence(self._late)
        self._unanswered.append(self.cycle)
        if len(self._unanswered) > 1:
            self._ring_after(PEER_S, self._look_for_peer)

    def on_body(self, body: bytes) -> None:
        self._may_come = self._limits.header_bytes
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._may_come = self._limits.header_bytes
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self._unanswered.popleft()
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
        good = [cycle for cycle in self._unanswered if cycle.response_started or not cycle.more_body]
        if good:
            good[-1].keep_alive = False
            return
        self._leave_unanswered()
        body = error.body()
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
            (b"x-request-id", uuid.uuid4().hex.encode()),
            *((name.encode(), value.encode()) for name, value in error.headers.items()),
        ]
        head = b"HTTP/1.1 %d %b\r\n" % (error.status, HTTPStatus(error.status).phrase.encode())
        lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
        self.transport.write(head + lines + b"\r\n" + body)
        self.transport.write_eof()
        self._ring_after(GOODBYE_S, self.transport.abort)

    def _leave_unanswered(self) -> None:
        """Let every request know that nobody waits for its answer. uvicorn tells the newest one alone."""
        for cycle in self._unanswered:
            cycle.disconnected = True
            cycle.message_event.set()

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
