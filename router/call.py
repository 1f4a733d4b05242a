"""One HTTP request for tokens: its ids, its clock, what has been sent, and what is told of it at the end."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import structlog
from pydantic import SecretStr
from starlette.types import Receive, Scope, Send

from router.backend import Piece, Stream
from router.errors import ApiError, BodyTooLarge, RequestTimeout, UnsupportedMediaType
from router.http import DROP_UNREAD
from router.metrics import ModelMetrics, Outcome, RequestMetrics, RouterMetrics

log = structlog.get_logger("router.requests")

_CALLERS_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")

LAST_EVENT_S = 1.0
"""Seconds that a client gets to take the event that ends a broken stream."""

Headers = list[tuple[bytes, bytes]]


class ClientLeft(Exception):
    """The client closed its connection before its answer was complete."""


def request_id(scope: Scope) -> str:
    """The caller's own id where it is one that is fit for headers and logs, otherwise a new one."""
    given = header(scope, b"x-request-id")
    return given.decode() if given is not None and _CALLERS_ID.fullmatch(given) else uuid.uuid4().hex


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first value of a request header; `name` in lower case."""
    return next((value for key, value in scope["headers"] if key == name), None)


class Call:
    """What one request is and what becomes of it. Tokens count when the client's socket has them."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, metrics: RouterMetrics) -> None:
        self.key = uuid.uuid4().hex
        """Ours, unique; the caller's `request_id` may not be."""
        self.request_id = request_id(scope)
        self.path: str = scope["path"]
        self.model: str | None = None
        self.streamed = False
        self._scope = scope
        self._receive = receive
        self._send = send
        self._router_metrics = metrics
        self._metrics: RequestMetrics | None = None
        self.began = time.perf_counter()
        """By the metrics' clock."""
        self._first_bytes_at: float | None = None
        self._begun = False
        """Whether the answer's headers have gone out."""
        self._stream: Stream | None = None
        self._tokens = 0
        # What holds until more is known: whatever ends the request now, its client got nothing.
        self._status = 499
        self._outcome: Outcome = "cancelled"
        self._error: str | None = None

    @property
    def provider_key(self) -> SecretStr | None:
        """The caller's own key for an upstream provider."""
        key = header(self._scope, b"x-openai-api-key")
        return SecretStr(key.decode("latin-1")) if key else None

    async def read(self, limit: int, timeout_s: float) -> bytes:
        """The request's body. Raises UnsupportedMediaType, BodyTooLarge, RequestTimeout or ClientLeft."""
        media_type = header(self._scope, b"content-type")
        if media_type is None or media_type.split(b";")[0].strip().lower() != b"application/json":
            raise UnsupportedMediaType(media_type.decode("latin-1") if media_type else None)
        length = header(self._scope, b"content-length")
        if length is not None and int(length) > limit:
            raise BodyTooLarge(limit)
        try:
            async with asyncio.timeout(timeout_s):
                return await self._read_body(limit)
        except TimeoutError:
            raise RequestTimeout(timeout_s) from None

    async def _read_body(self, limit: int) -> bytes:
        parts: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientLeft
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > limit:
                raise BodyTooLarge(limit)
            if not message.get("more_body", False):
                return b"".join(parts)

    def is_for(self, model: str, metrics: ModelMetrics) -> None:
        """The request is known to be for the model that is called `model` here."""
        self.model = model
        self._metrics = metrics.started(self.began)

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Raises ClientLeft in the block as soon as the client leaves. The body must have been read."""
        task = asyncio.current_task()
        left = False

        async def watch() -> None:
            nonlocal left
            while (await self._receive())["type"] != "http.disconnect":
                pass
            left = True
            if task is not None:
                task.cancel()

        watcher = asyncio.create_task(watch())
        try:
            yield
        except asyncio.CancelledError:
            if left and task is not None and task.uncancel() == 0:
                raise ClientLeft from None
            raise
        finally:
            watcher.cancel()

    def tried(self, stream: Stream) -> None:
        """A replica was asked; where several were, the last one answers for the request."""
        self._stream = stream

    async def answer(self, stream: Stream) -> None:
        """Hand everything that the stream brings to the client. Raises what ends it early."""
        async with interruptible() as interrupt:
            piece = await stream.read()
            await self._start(200, self._answer_headers(piece))
            stream.overflowed = interrupt
            while True:
                await self._write(piece.data, more=not piece.last)
                self._handed_over(piece)
                if piece.last:
                    self._outcome = "completed"
                    return
                piece = await stream.read()

    async def fail(self, error: ApiError) -> None:
        """Tell the client why there is no answer, or no more of it."""
        self._error = error.code or error.type
        if self._begun:
            self._outcome = "failed"
            # A client that has stopped reading must hold neither the request nor its connection for ever.
            self._scope["state"][DROP_UNREAD](LAST_EVENT_S)
            # Where this is not written, uvicorn drops the connection of the answer that was left incomplete.
            # So it does for a whole answer, which has no place for an error.
            if self.streamed:
                await self._write(error.event(), more=False)
            return
        self._outcome = "failed" if self._stream is not None and self._stream.accepted else "refused"
        body = error.body()
        extra = [(name.encode(), value.encode()) for name, value in error.headers.items()]
        if error.status == 408:
            # The rest of the body may never come. That of one which is too long does, and is dropped for a
            # while: to close now would reset the connection, and a client that still sends would not see why.
            extra.append((b"connection", b"close"))
        await self._start(error.status, _json_headers(len(body)) + extra)
        await self._write(body, more=False)

    def finish(self) -> None:
        """Count the request and write its line in the log. To be called once, at the end."""
        now = time.perf_counter()
        if self._outcome == "cancelled":
            self._status = 499  # whatever its client was sent before it left
        if self._metrics is not None:
            if self._stream is not None and self._stream.accepted:
                self._metrics.accepted(self._stream.prompt_tokens)
            self._metrics.finished(self._outcome, self._status, now)
        else:
            self._router_metrics.refused(self._status)
        log.info("request", **self._line(now))

    def _line(self, now: float) -> dict[str, Any]:
        agent = header(self._scope, b"user-agent")
        stream = self._stream
        return {
            "request_id": self.request_id,
            "key": self.key,
            "path": self.path,
            "model": self.model,
            "stream": self.streamed,
            "status": self._status,
            "outcome": self._outcome,
            "error": self._error,
            "replica": stream.replica if stream else None,
            "prompt_tokens": stream.prompt_tokens if stream else 0,
            "completion_tokens": self._tokens,
            "ttfb_ms": _ms(self.began, self._first_bytes_at),
            "duration_ms": _ms(self.began, now),
            "user_agent": agent.decode("latin-1")[:200] if agent else None,
        }

    def _answer_headers(self, piece: Piece) -> Headers:
        if self.streamed:
            return [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        return _json_headers(len(piece.data))

    async def _start(self, status: int, headers: Headers) -> None:
        headers.append((b"x-request-id", self.request_id.encode()))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        self._begun = True
        self._status = status

    async def _write(self, data: bytes, *, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    def _handed_over(self, piece: Piece) -> None:
        now = time.perf_counter()
        metrics = self._metrics
        if self._first_bytes_at is None:
            self._first_bytes_at = now
            # A provider tells at the end how many there were.
            if metrics is not None and self._stream is not None and self._stream.prompt_tokens:
                metrics.accepted(self._stream.prompt_tokens)
        self._tokens += piece.tokens
        if metrics is not None:
            if self.streamed:
                metrics.chunk(piece.tokens, now)
            else:
                metrics.body(piece.tokens)


@asynccontextmanager
async def interruptible() -> AsyncIterator[Callable[[Exception], None]]:
    """Gives what raises an exception in the block, wherever it waits."""
    error: Exception | None = None
    try:
        async with asyncio.timeout(None) as block:

            def interrupt(why: Exception) -> None:
                nonlocal error
                error = why
                block.reschedule(0)

            yield interrupt
    except TimeoutError:
        if error is None:
            raise
        raise error from None


def _json_headers(length: int) -> Headers:
    return [(b"content-type", b"application/json"), (b"content-length", b"%d" % length)]


def _ms(began: float, at: float | None) -> float | None:
    return None if at is None else round((at - began) * 1000, 3)
