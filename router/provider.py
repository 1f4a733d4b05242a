"""An upstream provider over HTTP: pooled connections, and one door at which foreign errors are translated.

No exception of the HTTP library leaves this file, nor is one chained or logged: the headers of a request are
in the text of some, and with them the key. For the same reason nothing of the environment is used, as
`.netrc` and proxies would be: a call goes straight to the address that the configuration has.
"""

from __future__ import annotations

import asyncio
import io
import socket
from collections.abc import Awaitable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import aiohttp
import structlog
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from aiohttp.http_exceptions import HttpProcessingError
from pydantic import SecretStr

from router.errors import ApiError, ShuttingDown, UpstreamFailed, UpstreamTimeout

log = structlog.get_logger(__name__)

KEEP_ALIVE_S = 30.0
"""Seconds that an idle connection is kept: shorter than most providers keep theirs, as a request that meets
the end of its connection has to be sent again."""

UNSENT_S = 60.0
"""Seconds that a provider may leave what we send it lying, before its connection is dropped."""

REST_S = 1.0
"""Seconds for the end of a body after its last event, where the connection is to be used again."""

CLOSE_S = 1.0
"""Seconds for the connections to end when all of them are closed."""

T = TypeVar("T")


class Provider:
    """One OpenAI-compatible server. To be made on a running event loop."""

    def __init__(self, base_url: str, *, connect_s: float, buffer_bytes: int) -> None:
        """`buffer_bytes`: how much of an answer may gather before it is read; the rest stays with the
        provider."""
        self.host = urlsplit(base_url).netloc
        """For logs."""
        self._base_url = base_url
        self._connect_s = connect_s
        self._buffer_bytes = buffer_bytes
        self._pooled = self._session(keepalive_timeout=KEEP_ALIVE_S)
        self._fresh = self._session(force_close=True)
        """Every request has a new connection."""
        self.open: set[Answer] = set()
        """Answers that have not been closed."""
        self.closed = False
        """Whether nothing can be asked any more."""

    async def post(self, path: str, body: bytes, key: SecretStr, request_id: str) -> Answer:
        """The answer to a request, as soon as its status is there. Redirections are not followed.

        Raises UpstreamTimeout where no connection is made in time, UpstreamFailed or ShuttingDown.
        """
        if self.closed:
            raise ShuttingDown
        headers = {
            "authorization": f"Bearer {key.get_secret_value()}",
            "content-type": "application/json",
            "x-request-id": request_id,
        }
        return Answer(self, await self.guarded(self._sent(self._base_url + path, body, headers)))

    async def guarded(self, awaitable: Awaitable[T]) -> T:
        """What the library's awaitable gives. Raises UpstreamTimeout, UpstreamFailed or ShuttingDown."""
        try:
            return await awaitable
        except (aiohttp.ClientError, HttpProcessingError, OSError) as error:
            translated = self._translated(error)
        # Outside of the handler, so that the library's error is not its context.
        raise translated

    async def close(self) -> None:
        """Drop every connection; who waits for an answer is told that we shut down."""
        self.closed = True
        for answer in list(self.open):
            answer.close()
        # One whose end has still to be written may take as long as the provider likes.
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await asyncio.gather(self._pooled.close(), self._fresh.close())

    def _session(self, **connections: Any) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            # As many connections as there are requests; admission bounds those.
            connector=_Connector(limit=0, socket_factory=_socket, **connections),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"user-agent": f"trunkline/{version('trunkline')}", "accept-encoding": "identity"},
            read_bufsize=self._buffer_bytes // 2,  # the library stops reading at twice as much
            timeout=aiohttp.ClientTimeout(total=None, connect=self._connect_s),
            trust_env=False,
        )

    async def _sent(self, url: str, body: bytes, headers: Mapping[str, str]) -> aiohttp.ClientResponse:
        """The response to a request. A provider may close a pooled connection at the moment at which it is
        used again: where one that was used before ends without a word, the request is sent once more."""
        use = _Use()
        before = _use.set(use)
        try:
            return await self._post(self._pooled, url, body, headers)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            if self.closed or not use.was_pooled or use.has_said_something:
                raise
        finally:
            _use.reset(before)
        log.info("a provider had closed a connection that was kept", provider=self.host)
        return await self._post(self._fresh, url, body, headers)

    async def _post(
        self, session: aiohttp.ClientSession, url: str, body: bytes, headers: Mapping[str, str]
    ) -> aiohttp.ClientResponse:
        return await session.post(url, data=io.BytesIO(body), headers=headers, allow_redirects=False)

    def _translated(self, error: Exception) -> ApiError:
        if self.closed:
            return ShuttingDown()
        if isinstance(error, aiohttp.ConnectionTimeoutError):
            return UpstreamTimeout(self._connect_s)
        unreachable = isinstance(error, aiohttp.ClientConnectorError)
        # Only of these is the text about nothing but the connection.
        reason = str(error) if unreachable else None
        log.warning("provider failed", provider=self.host, error=type(error).__name__, reason=reason)
        return UpstreamFailed(
            "the provider could not be reached" if unreachable else "the provider broke off the connection"
        )


class Answer:
    """What a provider answers with. Whoever has it closes it."""

    def __init__(self, provider: Provider, response: aiohttp.ClientResponse) -> None:
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers
        self._provider = provider
        self._response = response
        self._ending: asyncio.Task[None] | None = None
        provider.open.add(self)

    async def read(self) -> bytes:
        """What has come of the body, waiting for some of it; nothing where it has ended.

        Raises UpstreamFailed or ShuttingDown.
        """
        return await self._provider.guarded(self._response.content.readany())

    def close(self) -> None:
        """Drop the connection at once, unless the body has ended. Idempotent."""
        self._provider.open.discard(self)
        if self._ending is not None:
            self._ending.cancel()
        connection = self._response.connection
        if connection is not None and connection.transport is not None:
            # To close it would wait until all that we had to say has been taken.
            connection.transport.abort()
        self._response.close()

    def end(self) -> None:
        """Nobody waits for the little that is left of the body, but its connection is to be used again."""
        if self._response.content.is_eof():
            self.close()
        else:
            self._ending = asyncio.create_task(self._end())

    async def _end(self) -> None:
        try:
            async with asyncio.timeout(REST_S):
                while await self.read():
                    pass
        except (ApiError, TimeoutError):
            pass
        finally:
            self._ending = None
            self.close()


class _Connection(ResponseHandler):
    """One that knows whether anything has come since it was last taken."""

    used = False
    heard = False

    def data_received(self, data: bytes) -> None:
        self.heard = True
        super().data_received(data)


class _Use:
    """Of a connection, for one request."""

    connection: _Connection | None = None
    was_pooled = False

    @property
    def has_said_something(self) -> bool:
        """Whether any of an answer has come."""
        return self.connection is not None and self.connection.heard


_use: ContextVar[_Use] = ContextVar("_use")
"""Of the request that is being sent."""


class _Connector(aiohttp.TCPConnector):
    """Tells of each connection that it gives whether it was used before."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # A factory of what it otherwise makes itself.
        self._factory = partial(_Connection, loop=self._loop)  # type: ignore[assignment]

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: Any,
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - the library calls it so
    ) -> Connection:
        connection = await super().connect(req, traces, timeout)
        made = cast("_Connection", connection.protocol)
        if (use := _use.get(None)) is not None:
            use.connection, use.was_pooled = made, made.used
        made.used, made.heard = True, False
        return connection


def _socket(address: tuple[Any, ...]) -> socket.socket:
    """A socket for an address as `getaddrinfo` gives it. It breaks off where the other end stops taking
    anything, also when we have closed it and some is still to be sent."""
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(UNSENT_S * 1000))
    return made
