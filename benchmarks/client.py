"""A lean HTTP/1.1 client for one request at a time: a raw connection, httptools, and a reader for the body.

Bytes are read where they arrive, in the protocol's callback; the task that asked wakes once, at the end.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Self, cast
from urllib.parse import urlsplit

import httptools

from benchmarks.answer import Answer, Reader, RefusalReader, StreamReader, WholeReader

Turns = Iterator[tuple[bytes, Answer]]
"""Requests, each with the answer to fill in."""


class BadTarget(ValueError):
    """The URL is not one that may be loaded; its words say why."""


@dataclass(frozen=True, slots=True)
class Target:
    """The server that is measured, on this machine."""

    host: str
    port: int

    @classmethod
    def parse(cls, url: str) -> Self:
        """The server of `http://127.0.0.1:8000` or the like. Raises BadTarget.

        Plain HTTP and loopback addresses only, and no names but localhost: the generator asks no name server.
        """
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port or 80
        except ValueError as error:
            raise BadTarget(f"the URL {url!r} cannot be read: {error}") from None
        if parts.scheme != "http" or host is None:
            raise BadTarget(f"the URL {url!r} is not of the form http://127.0.0.1:8000")
        if parts.path.strip("/") or parts.query or parts.fragment:
            raise BadTarget(f"the URL {url!r} has a path; give the server alone, as in http://127.0.0.1:8000")
        if host == "localhost":
            host = "127.0.0.1"
        if not _is_loopback(host):
            raise BadTarget(
                f"the URL {url!r} names {host!r}, which is not a loopback address (127.0.0.0/8, ::1 or "
                "localhost): the load generator loads servers on its own machine only"
            )
        return cls(host, port)

    @property
    def authority(self) -> str:
        """As the Host header has it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@asynccontextmanager
async def connected(target: Target, connections: int) -> AsyncIterator[Callable[[], int]]:
    """So many connections on which nothing is asked, closed after the block. Yields what tells how many of
    them the server has left open. Raises OSError."""
    loop = asyncio.get_running_loop()
    idle: list[_Connection] = []
    try:
        for _ in range(connections):
            _, connection = await loop.create_connection(_Connection, target.host, target.port)
            idle.append(connection)
        yield lambda: sum(not connection.closed for connection in idle)
    finally:
        for connection in idle:
            connection.close()


class Client:
    """One stream of requests to a target: one connection, kept alive and opened again where it was closed."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._connection: _Connection | None = None

    async def ask(self, request: bytes, *, stream: bool, limit: float, into: Answer | None = None) -> Answer:
        """Send `request` (a whole HTTP request) and read its answer, in `limit` seconds at most.

        Raises nothing: what goes wrong is the answer's `failure`. The time to connect, where needed, counts.
        Who wants to see the answer grow passes one in as `into`. Cancelled in mid-answer, it closes the
        connection at once: the server sees the client leave.
        """
        answer = into or Answer(perf_counter())
        await self.converse(iter([(request, answer)]), stream=stream, limit=limit)
        return answer

    async def converse(self, turns: Turns, *, stream: bool, limit: float) -> bool:
        """As `ask`, one request after another, until there are no more or one has failed; whether none has.

        The next turn is taken, and its request sent, where the last answer's end is read: no task has to wake
        up for it, which at hundreds of streams would be many milliseconds later.
        """
        for request, answer in turns:
            last = await self._exchange(_Exchange(request, answer, turns, stream, limit))
            if last.failure is not None:
                return False
        return True

    def close(self) -> None:
        """Close the connection, at once; a server sees the client leave. Idempotent."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def _exchange(self, exchange: _Exchange) -> Answer:
        """Carry on for as long as the connection holds, and return the last answer."""
        try:
            async with asyncio.timeout(exchange.limit) as exchange.timeout:
                if self._connection is None or self._connection.closed:
                    self._connection = await self._connect()
                await self._connection.carry(exchange)
        except TimeoutError:
            exchange.answer.fail("timeout", f"no whole answer within {exchange.limit:g} s", perf_counter())
        except OSError as error:
            exchange.answer.fail("connect", str(error), perf_counter())
        finally:
            if self._connection is not None and not self._connection.reusable:
                self.close()
        return exchange.answer

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, self._target.host, self._target.port)
        return connection


@dataclass(slots=True)
class _Exchange:
    """A request under way, and those to follow it on the same connection."""

    request: bytes
    answer: Answer
    turns: Turns
    stream: bool
    limit: float
    timeout: asyncio.Timeout = field(init=False)

    def reader(self) -> Reader:
        return StreamReader(self.answer) if self.stream else WholeReader(self.answer)

    def next(self) -> bool:
        """Go on to the next turn; false where there is none."""
        turn = next(self.turns, None)
        if turn is None:
            return False
        self.request, self.answer = turn
        self.timeout.reschedule(asyncio.get_running_loop().time() + self.limit)
        return True


class _Connection(asyncio.Protocol):
    """One socket, and the answer that is being read from it. An answer must be chunked or have a length."""

    def __init__(self) -> None:
        self.closed = False
        self.reusable = False
        """The last answer was read to its end and the server keeps the connection."""
        self._parser = httptools.HttpResponseParser(self)
        self._exchange: _Exchange | None = None
        self._now = 0.0

    async def carry(self, exchange: _Exchange) -> None:
        """Return when the last answer has been judged or has failed, or the connection is not kept."""
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._exchange = exchange
        self._send()
        await self._over

    def close(self) -> None:
        self.closed = True
        self._exchange = None
        self._transport.abort()

    def _send(self) -> None:
        assert self._exchange is not None  # noqa: S101 - for mypy
        self.reusable = False
        self._reader = self._exchange.reader()
        self._transport.write(self._exchange.request)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._now = perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end_early("bad answer", f"{error}: {data!r}")

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        self._now = perf_counter()
        self._end_early("cut off", str(error or "the server closed the connection before the answer's end"))

    def _end_early(self, kind: str, detail: str) -> None:
        if self._exchange is not None:
            self._exchange.answer.fail(kind, detail, self._now)
            self._finish()

    def _finish(self) -> None:
        self._exchange = None
        if not self._over.done():
            self._over.set_result(None)

    # What httptools calls, from within feed_data.

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        self._keep_alive = self._parser.should_keep_alive()
        if status != 200 and self._exchange is not None:
            self._reader = RefusalReader(self._exchange.answer, status)

    def on_body(self, data: bytes) -> None:
        self._reader.feed(data, self._now)

    def on_message_complete(self) -> None:
        if self._exchange is None:
            return
        self._reader.end(self._now)
        self.reusable = self._keep_alive
        if self.reusable and self._exchange.answer.failure is None and self._exchange.next():
            self._send()
        else:
            self._finish()
