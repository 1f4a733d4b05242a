"""A small real HTTP server that answers byte by byte as a test scripts it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any


def event(payload: object) -> bytes:
    """One server-sent event, of JSON or of bytes as they are."""
    return b"data: " + (payload if isinstance(payload, bytes) else json.dumps(payload).encode()) + b"\n\n"


def chunk(text: str | None, finish_reason: str | None = None) -> bytes:
    """The event of one chunk of text, of its one choice."""
    delta = {} if text is None else {"content": text}
    return event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}], "usage": None})


def usage(prompt: int, completion: int) -> dict[str, int]:
    """A usage object."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


ROLE = event(
    {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
)
USAGE = event({"choices": [], "usage": usage(7, 12)})
DONE = event(b"[DONE]")
STREAM = (ROLE, chunk("three words at"), chunk(" once", "length"), USAGE, DONE)
"""A good stream of 12 tokens in two chunks, as usage tells."""

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
LAST = b"0\r\n\r\n"


def framed(data: bytes) -> bytes:
    """One HTTP chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def sized(body: bytes, status: str = "200 OK") -> bytes:
    """A whole HTTP answer of known length."""
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


@dataclass(frozen=True)
class Asked:
    """One request as a server received it, and where its answer goes."""

    number: int
    head: str
    body: dict[str, Any]
    writer: asyncio.StreamWriter
    reader: asyncio.StreamReader

    async def gone(self) -> None:
        """Return when the client has closed the connection."""
        with suppress(ConnectionError):
            await self.reader.read()

    async def say(self, *parts: bytes) -> None:
        """Send bytes as they are, a write for each part."""
        for part in parts:
            self.writer.write(part)
            await self.writer.drain()

    async def stream(self, *events: bytes) -> None:
        """Send a whole answer of these events, a write for each."""
        await self.say(HEAD, *map(framed, events), LAST)


Script = Callable[[Asked], Awaitable[None]]


class Peer:
    """A server that answers each request as its script says; the script ends the connection by closing it."""

    def __init__(self, script: Script) -> None:
        self.asked: list[Asked] = []
        self.connections = 0
        self._script = script
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen, on a port that is free."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """End every connection."""
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            while not writer.is_closing():
                await self._script(await self._read(reader, writer))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has left
        finally:
            writer.close()

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Asked:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = re.search(r"content-length: (\d+)", head)
        assert length is not None
        body = json.loads(await reader.readexactly(int(length[1])))
        asked = Asked(len(self.asked), head, body, writer, reader)
        self.asked.append(asked)
        return asked
