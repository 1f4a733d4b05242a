"""One connection to Redis, over which scripts go in the order in which they were given.

What has gathered since the last answers came goes out as one write, so that a busy router sends few. What is
asked is answered within a second or fails. What is told is sent again until Redis has it.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import structlog
from redis.asyncio import ConnectionPool
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ResponseError

from router.errors import LimitsUnavailable

log = structlog.get_logger(__name__)

PATIENCE_S = 0.9
"""Seconds within which Redis has to answer: a client is told within one that it does not."""

RETRY_S = 0.5
"""Seconds between two attempts to send what was told, where nobody asks anything."""

AT_ONCE = 256
"""Messages in one write."""

MOST_TOLD = 100_000
"""Messages that wait for a Redis that is away."""


class Script:
    """A script of Redis, known there by its hash."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()


class Message:
    """A script to run."""

    __slots__ = ("answer", "arguments", "keys", "script", "sent")

    def __init__(self, script: Script, keys: Sequence[str], arguments: Sequence[str | int]) -> None:
        self.script = script
        self.keys = keys
        self.arguments = arguments
        self.sent = False
        """Whether Redis may have it."""
        self.answer: asyncio.Future[Any] | None = None
        """None where it was told, not asked."""

    @property
    def command(self) -> tuple[str | int, ...]:
        """What Redis gets."""
        return ("EVALSHA", self.script.sha, len(self.keys), *self.keys, *self.arguments)


class Wire:
    """The connection, made when it is needed."""

    def __init__(self, url: str, patience_s: float = PATIENCE_S) -> None:
        """`url`: redis://, rediss:// or unix://. Raises ValueError where it is none of them."""
        self._patience_s = patience_s
        pool = ConnectionPool.from_url(
            url, socket_timeout=None, socket_connect_timeout=None, retry=Retry(NoBackoff(), 0)
        )
        self._connection: AbstractConnection = pool.make_connection()  # type: ignore[no-untyped-call]
        self._queue: deque[Message] = deque()
        self._given = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._sender: asyncio.Task[None] | None = None
        self._closed = False
        self._lost = False
        self._full = False

    def __repr__(self) -> str:
        return f"<wire to Redis: {'lost' if self._lost else 'well'}, {len(self._queue)} messages wait>"

    async def ask(self, message: Message) -> Any:
        """What the script returns. Raises LimitsUnavailable."""
        message.answer = asyncio.get_running_loop().create_future()
        self._give(message)
        try:
            async with asyncio.timeout(self._patience_s):
                return await message.answer
        except TimeoutError:
            raise LimitsUnavailable from None

    def tell(self, message: Message) -> None:
        """Have the script run, perhaps later. Never waits and never raises."""
        if len(self._queue) < MOST_TOLD:
            self._full = False
            self._give(message)
        elif not self._full:
            self._full = True
            log.error("messages to redis are lost until it is back", waiting=len(self._queue))

    async def close(self) -> None:
        """Send what waits, if Redis takes it now, and leave."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._patience_s):
                await self._idle.wait()
        self._closed = True
        if self._sender is not None:
            self._sender.cancel()
            await asyncio.wait([self._sender])
        self._fail_asked()
        await self._connection.disconnect(nowait=True)

    def _give(self, message: Message) -> None:
        if self._closed:
            if message.answer is not None:
                message.answer.set_exception(LimitsUnavailable())
            return
        self._queue.append(message)
        self._given.set()
        self._idle.clear()
        if self._sender is None:
            self._sender = asyncio.get_running_loop().create_task(self._send())

    async def _send(self) -> None:
        while True:
            await self._given.wait()
            batch = self._next()
            try:
                async with asyncio.timeout(self._patience_s):
                    answers = await self._exchange(batch)
            except Exception as error:  # noqa: BLE001 - whatever it was, a new connection may do better
                self._failed(batch, error)
                await self._connection.disconnect(nowait=True)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._given.wait(), RETRY_S)
                self._given.set()
            else:
                self._answered(batch, answers)

    def _next(self) -> list[Message]:
        """What goes into the next write, without what nobody waits for any more."""
        batch: list[Message] = []
        while self._queue and len(batch) < AT_ONCE:
            message = self._queue.popleft()
            if message.answer is None or not message.answer.done():
                batch.append(message)
        return batch

    async def _exchange(self, batch: Sequence[Message]) -> list[Any]:
        """The answers, errors of scripts among them. Raises what the connection does."""
        was_connected = self._connection.is_connected
        try:
            return await self._run(batch)
        except RedisConnectionError:
            # What was connected may have been closed since; no script minds to run twice.
            if not was_connected:
                raise
        return await self._run(batch)

    async def _run(self, batch: Sequence[Message]) -> list[Any]:
        await self._connection.connect()  # type: ignore[no-untyped-call]
        for message in batch:
            message.sent = True
        answers = await self._pipe([message.command for message in batch])
        unknown = [at for at, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
        if unknown:
            scripts = {batch[at].script for at in unknown}
            again = [batch[at].command for at in unknown]
            loaded = await self._pipe([*(("SCRIPT", "LOAD", script.source) for script in scripts), *again])
            for at, answer in zip(unknown, loaded[len(scripts) :], strict=True):
                answers[at] = answer
        return answers

    async def _pipe(self, commands: Sequence[tuple[str | int, ...]]) -> list[Any]:
        await self._connection.send_packed_command(self._connection.pack_commands(commands))
        answers: list[Any] = []
        for _ in commands:
            try:
                answers.append(await self._connection.read_response())
            except ResponseError as error:
                answers.append(error)
        return answers

    def _answered(self, batch: Sequence[Message], answers: Sequence[Any]) -> None:
        if self._lost:
            self._lost = False
            log.info("redis is back")
        for message, answer in zip(batch, answers, strict=True):
            failed = isinstance(answer, Exception)
            if failed:
                log.error("redis refused a script", verb=message.arguments[0], reason=str(answer)[:200])
            if message.answer is None or message.answer.done():
                continue
            if failed:
                message.answer.set_exception(LimitsUnavailable())
            else:
                message.answer.set_result(answer)
        self._rest()

    def _failed(self, batch: Sequence[Message], error: Exception) -> None:
        if not self._lost:
            self._lost = True
            log.warning("redis cannot be reached", error=type(error).__name__)
        self._queue.extendleft(reversed(batch))
        self._fail_asked()
        self._rest()

    def _fail_asked(self) -> None:
        """Answer everybody who waits, and keep what was told."""
        for message in self._queue:
            if message.answer is not None and not message.answer.done():
                message.answer.set_exception(LimitsUnavailable())
        self._queue = deque(message for message in self._queue if message.answer is None)

    def _rest(self) -> None:
        if not self._queue:
            self._idle.set()
        if not self._queue or self._lost:
            self._given.clear()
