"""A lean HTTP/1.1 client for one request at a time: a raw connection, httptools, and a reader for the body.

Bytes are read where they arrive, in the protocol's callback; the task that asked wakes once, at the end.
"""

from __future__ import annotations

import asyncio
import ipaddress
from dataclasses import dataclass
from time import perf_counter
from typing import Self, cast
from urllib.parse import urlsplit

import httptools

from benchmarks.answer import Answer, Reader, RefusalReader, StreamReader, WholeReader


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
        reader = StreamReader(answer) if stream else WholeReader(answer)
        try:
            async with asyncio.timeout(limit):
                if self._connection is None or self._connection.closed:
                    self._connection = await self._connect()
                await self._connection.exchange(request, answer, reader)
        except TimeoutError:
            answer.fail("timeout", f"no whole answer within {limit:g} s", perf_counter())
        except OSError as error:
            answer.fail("connect", str(error), perf_counter())
        finally:
            if self._connection is not None and not self._connection.reusable:
                self.close()
        return answer

    def close(self) -> None:
        """Close the connection, at once; a server sees the client leave. Idempotent."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, self._target.host, self._target.port)
        return connection


class _Connection(asyncio.Protocol):
    """One socket, and the answer that is being read from it. An answer must be chunked or have a length."""

    def __init__(self) -> None:
        self.closed = False
        self.reusable = False
        """The last answer was read to its end and the server keeps the connection."""
        self._parser = httptools.HttpResponseParser(self)
        self._answer: Answer | None = None
        self._now = 0.0

    async def exchange(self, request: bytes, answer: Answer, reader: Reader) -> None:
        """Send `request` and return when `reader` has judged its answer or `answer` has failed."""
        self.reusable = False
        self._answer, self._reader = answer, reader
        self._whole: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._whole

    def close(self) -> None:
        self.closed = True
        self._answer = None
        self._transport.abort()

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
        if self._answer is not None:
            self._answer.fail(kind, detail, self._now)
            self._finish()

    def _finish(self) -> None:
        self._answer = None
        if not self._whole.done():
            self._whole.set_result(None)

    # What httptools calls, from within feed_data.

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        self._keep_alive = self._parser.should_keep_alive()
        if status != 200 and self._answer is not None:
            self._reader = RefusalReader(self._answer, status)

    def on_body(self, data: bytes) -> None:
        self._reader.feed(data, self._now)

    def on_message_complete(self) -> None:
        if self._answer is not None:
            self._reader.end(self._now)
            self.reusable = self._keep_alive
            self._finish()
