"""One HTTP request for tokens: its ids, its clock, what has been sent, and what is told of it at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from time import perf_counter
from typing import Any, Self

from pydantic import SecretStr
from starlette.types import Receive, Scope

from router.backend import Piece, Stream
from router.cors import origin_lines
from router.errors import ApiError, BodyTooLarge, RequestTimeout, TotalTimeout, UnsupportedMediaType
from router.gate import UNKEPT, Entry, Settlement
from router.headers import Header, header, request_id, user_agent
from router.http import EXCHANGE, Exchange, header_line
from router.ids import next_id
from router.metrics import ModelMetrics, Outcome, RequestMetrics, RouterMetrics

LAST_EVENT_S = 1.0
"""Seconds that a client gets to take the event that ends a broken stream."""

_JSON = header_line("content-type", "application/json")
_EVENTS = header_line("content-type", "text/event-stream; charset=utf-8") + header_line(
    "cache-control", "no-cache"
)


class ClientLeft(Exception):
    """The client closed its connection before its answer was complete."""


class Interruptible:
    """A block of work. Raises in it, wherever it waits: ClientLeft as soon as the client leaves, TotalTimeout
    after so many seconds, and whatever `interrupt` is told."""

    __slots__ = ("_exchange", "_late", "_task", "_total_s", "_why")

    def __init__(self, exchange: Exchange, total_s: float) -> None:
        self._exchange = exchange
        self._total_s = total_s
        self._task: asyncio.Task[Any] | None = None
        """What is in the block."""
        self._why: Exception | None = None

    def __enter__(self) -> Self:
        if self._exchange.disconnected:
            raise ClientLeft
        self._task = asyncio.current_task()
        self._exchange.listen(self._left)
        self._late = asyncio.get_running_loop().call_later(self._total_s, self._out_of_time)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        task, self._task = self._task, None
        self._late.cancel()
        self._exchange.listen(None)
        # Who else has cancelled the task wants it to end, not the request.
        if kind is asyncio.CancelledError and self._why and task and not task.uncancel():
            raise self._why from None

    def interrupt(self, why: Exception) -> None:
        """End the work with an exception; the first one counts."""
        if self._task is not None and self._why is None:
            self._why = why
            self._task.cancel()

    def _left(self) -> None:
        self.interrupt(ClientLeft())

    def _out_of_time(self) -> None:
        self.interrupt(TotalTimeout(self._total_s))


class Call:
    """What one request is and what becomes of it. Tokens count when the client's socket has them."""

    def __init__(
        self, scope: Scope, receive: Receive, metrics: RouterMetrics, origins: Collection[str] = ()
    ) -> None:
        """`origins`: those whose pages may read the answer."""
        self.key = next_id()
        """Ours, unique; the caller's `request_id` may not be."""
        self.headers: list[Header] = scope["headers"]
        self.request_id = request_id(self.headers) or self.key
        self.agent = user_agent(self.headers)
        self.path: str = scope["path"]
        self.model: str | None = None
        self.streamed = False
        self.entry: Entry = UNKEPT
        """What is kept of it, as soon as it is known who calls."""
        # Taken out, as it holds the scope itself: a request shall leave nothing to the collector of garbage.
        self._exchange: Exchange = scope["state"].pop(EXCHANGE)
        self._origin_lines = origin_lines(origins, self.headers) if origins else b""
        self._receive = receive
        self._router_metrics = metrics
        self._metrics: RequestMetrics | None = None
        self.began = perf_counter()
        """By the metrics' clock."""
        self._first_bytes_at: float | None = None
        """When the answer's first bytes went out, its head before them."""
        self._stream: Stream | None = None
        self._tokens = 0
        # What holds until more is known: whatever ends the request now, its client got nothing.
        self._status = 499
        self._outcome: Outcome = "cancelled"
        self._error: str | None = None

    @property
    def provider_key(self) -> SecretStr | None:
        """The caller's own key for an upstream provider."""
        key = header(self.headers, b"x-openai-api-key")
        return SecretStr(key.decode("latin-1")) if key else None

    async def read(self, limit: int, timeout_s: float) -> bytes:
        """The request's body. Raises UnsupportedMediaType, BodyTooLarge, RequestTimeout or ClientLeft."""
        media_type = header(self.headers, b"content-type")
        if media_type != b"application/json" and not _is_json(media_type):
            raise UnsupportedMediaType(media_type.decode("latin-1") if media_type else None)
        length = header(self.headers, b"content-length")
        if length is not None and int(length) > limit:
            raise BodyTooLarge(limit)
        body = self._exchange.body()
        if body is None:
            try:
                async with asyncio.timeout(timeout_s):
                    return await self._read_parts(limit)
            except TimeoutError:
                raise RequestTimeout(timeout_s) from None
        if len(body) > limit:
            raise BodyTooLarge(limit)
        return body

    async def _read_parts(self, limit: int) -> bytes:
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

    def interruptible(self, total_s: float) -> Interruptible:
        """A block of work on the request, of at most so many seconds."""
        return Interruptible(self._exchange, total_s)

    def tried(self, stream: Stream) -> None:
        """A replica was asked; where several were, the last one answers for the request."""
        self._stream = stream

    async def answer(self, stream: Stream, work: Interruptible) -> None:
        """Hand everything that the stream brings to the client, in a block of work. Raises what ends it
        early."""
        exchange = self._exchange
        piece = await stream.read()
        await self._kept(piece)
        await exchange.drain()
        self._begin(piece)
        if not piece.last:
            stream.overflowed, stream.direct = work.interrupt, self._hand_over
        while not piece.last:
            piece = await stream.read()
            await self._kept(piece)
            await exchange.drain()
            exchange.write(piece.data, more=not piece.last)
            self._count(piece.tokens, perf_counter())
        self._outcome = "completed"

    async def _kept(self, piece: Piece) -> None:
        """Returns when what the client will know once it has this piece is kept: that there is an answer, or
        how it ended."""
        if self.entry is UNKEPT:
            return
        if self.entry.keeps_text:
            self.entry.answered(piece.data)
        if piece.last:
            counted = self._stream.completion_tokens if self._stream is not None else None
            self._settle("completed", 200, self._tokens + piece.tokens if counted is None else counted)
        await self.entry.written()

    def _settle(self, outcome: Outcome, status: int, completion_tokens: int) -> None:
        """Say what is to be kept of the request's end."""
        stream, now = self._stream, perf_counter()
        # Who has got nothing but an error has used nothing.
        got_nothing = outcome in {"failed", "refused"} and self._first_bytes_at is None
        used = stream is not None and stream.accepted and not got_nothing
        first = self._first_bytes_at or (now if outcome == "completed" else None)
        self.entry.settle(
            Settlement(
                outcome,
                status,
                self.model or "",
                self._error or "",
                replica=stream.replica if stream is not None else "",
                prompt_tokens=stream.prompt_tokens if stream is not None and used else 0,
                completion_tokens=completion_tokens,
                first_us=None if first is None else _us(self.began, first),
                duration_us=_us(self.began, now),
            )
        )

    def _begin(self, piece: Piece) -> None:
        if self.streamed:
            self._exchange.begin(200, _EVENTS + self._own_lines(), piece.data, more=not piece.last)
        else:
            self._exchange.respond(200, _JSON + self._own_lines(), piece.data)
        self._status = 200
        self._first_bytes_at = perf_counter()
        # A provider tells at the end how many there were.
        if self._metrics is not None and self._stream is not None and self._stream.prompt_tokens:
            self._metrics.accepted(self._stream.prompt_tokens)
        self._count(piece.tokens, self._first_bytes_at)

    def _hand_over(self, data: bytes, tokens: int, now: float) -> bool:
        """Write a piece that came while all before it had been written; whether there was room for it."""
        taken = self._exchange.offer(data)
        if taken:
            self._count(tokens, now)
            if self.entry.keeps_text:
                self.entry.answered(data)
        return taken

    def _count(self, tokens: int, now: float) -> None:
        """So many tokens were handed to the client's socket."""
        self._tokens += tokens
        if self._metrics is None:
            return
        if self.streamed:
            self._metrics.chunk(tokens, now)
        else:
            self._metrics.body(tokens)

    async def fail(self, error: ApiError) -> None:
        """Tell the client why there is no answer, or no more of it."""
        exchange = self._exchange
        self._error = error.code or error.type
        if self._first_bytes_at is not None:
            self._outcome = "failed"
            await self._fail_kept(self._status)
            # A client that has stopped reading must hold neither the request nor its connection for ever.
            exchange.drop_unread(LAST_EVENT_S)
            # Where this is not written, uvicorn drops the connection of the answer that was left incomplete.
            # So it does for a whole answer, which has no place for an error.
            if self.streamed:
                await exchange.drain()
                exchange.write(error.event(), more=False)
            return
        self._outcome = "failed" if self._stream is not None and self._stream.accepted else "refused"
        await self._fail_kept(error.status)
        if error.status == 408:
            # The rest of the body may never come. That of one which is too long does, and is dropped for a
            # while: to close now would reset the connection, and a client that still sends would not see why.
            exchange.be_last()
        own = b"".join(header_line(*header) for header in error.headers.items())
        await exchange.drain()
        exchange.respond(error.status, _JSON + self._own_lines() + own, error.body())
        self._status = error.status

    async def _fail_kept(self, status: int) -> None:
        self._settle(self._outcome, status, self._tokens)
        await self.entry.written()

    def finish(self, log: Any) -> None:
        """Count the request and write its line in a log. To be called once, at the end."""
        now = perf_counter()
        if self._outcome == "cancelled":
            self._status = 499  # whatever its client was sent before it left
            self._settle("cancelled", 499, self._tokens)
        if self._metrics is not None:
            if self._stream is not None and self._stream.accepted:
                self._metrics.accepted(self._stream.prompt_tokens)
            self._metrics.finished(self._outcome, self._status, now)
        else:
            self._router_metrics.refused(self._status)
        self._write_line(log, now)

    def _write_line(self, log: Any, now: float) -> None:
        stream = self._stream
        log.info(
            "request",
            request_id=self.request_id,
            key=self.key,
            path=self.path,
            model=self.model,
            stream=self.streamed,
            status=self._status,
            outcome=self._outcome,
            error=self._error,
            replica=stream.replica if stream else None,
            prompt_tokens=stream.prompt_tokens if stream else 0,
            completion_tokens=self._tokens,
            ttfb_ms=_ms(self.began, self._first_bytes_at),
            duration_ms=_ms(self.began, now),
            user_agent=self.agent or None,
        )

    def _own_lines(self) -> bytes:
        """The headers that are this answer's own."""
        lines = header_line("x-request-id", self.request_id) + self._origin_lines
        return lines + b"".join(header_line(*each) for each in self.entry.headers)


def _is_json(media_type: bytes | None) -> bool:
    """Whether a content type says so, with whatever parameters."""
    return media_type is not None and media_type.split(b";")[0].strip().lower() == b"application/json"


def _us(began: float, at: float) -> int:
    return int((at - began) * 1_000_000)


def _ms(began: float, at: float | None) -> float | None:
    return None if at is None else round((at - began) * 1000, 3)
