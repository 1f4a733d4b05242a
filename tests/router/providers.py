"""A provider on a loopback port whose every byte a test decides, and the ways in which one can misbehave."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from tests.waiting import soon

KEY = "sk-deployment-0123456789abcdef"
"""The deployment's key for a provider."""

OTHER_KEY = "sk-of-the-caller-fedcba9876543210"
"""A caller's key for a provider."""

CALLERS_KEY = "tl-of-the-caller-5f4dcc3b5aa765d6"
"""A caller's key for Trunkline itself."""

USAGE = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}


@dataclass(frozen=True)
class Asked:
    """One request as the provider read it."""

    path: str
    headers: dict[str, str]
    """Names in lower case."""
    body: dict[str, Any]

    @property
    def stream(self) -> bool:
        """Whether a stream was asked for."""
        return bool(self.body.get("stream"))


class Line:
    """One connection from the router."""

    def __init__(
        self, provider: Provider, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.writer = writer
        self._provider = provider
        self._reader = reader

    async def asked(self) -> Asked:
        """The next request, read to its end."""
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        pairs = (line.partition(": ") for line in head[1:] if line)
        headers = {name.lower(): value for name, _, value in pairs}
        body = await self._reader.readexactly(int(headers["content-length"]))
        asked = Asked(head[0].split(" ")[1], headers, json.loads(body))
        self._provider.asked.append(asked)
        return asked

    async def send(self, *parts: bytes) -> None:
        """Write as it is, as fast as it is taken."""
        if self.writer.transport.is_closing():
            raise ConnectionResetError
        for part in parts:
            self.writer.write(part)
        await self.writer.drain()

    async def answer(
        self, status: int, body: bytes, content_type: str = "application/json", **headers: str
    ) -> None:
        """Send a whole response."""
        lines = {"content-type": content_type, "content-length": str(len(body))} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        await self.send(f"HTTP/1.1 {status} Whatever\r\n{head}\r\n".encode() + body)

    async def stream(self, *events: bytes) -> None:
        """Send the head of a stream, and its first events."""
        await self.send(HEAD, *map(chunked, events))

    async def gone(self) -> None:
        """Returns when the router has closed the connection; what it still sends is lost."""
        with suppress(ConnectionError):
            while await self._reader.read(2**16):
                pass

    def reset(self) -> None:
        """Drop the connection without a goodbye."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Behaviour = Callable[[Line], Awaitable[None]]
"""What a provider does with a connection. When it returns, the connection is closed."""


class Provider:
    """A server, what it was asked, and the connections to it."""

    def __init__(self) -> None:
        self.url = ""
        self.asked: list[Asked] = []
        self.accepted = 0
        """Connections that there ever were."""
        self.lines: set[Line] = set()
        """Connections that are open."""
        self.behaviour: Behaviour = behaves


@asynccontextmanager
async def provider(*behaviours: Behaviour, tls: ssl.SSLContext | None = None) -> AsyncIterator[Provider]:
    """A running provider. Its connections are treated by these behaviours in turn, and then well."""
    one = Provider()
    turns = iter(behaviours)

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = Line(one, reader, writer)
        one.accepted += 1
        one.lines.add(line)
        try:
            await next(turns, one.behaviour)(line)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the router has left
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
            one.lines.discard(line)

    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=tls, limit=2**24)
    port = server.sockets[0].getsockname()[1]
    one.url = f"{'https' if tls else 'http'}://127.0.0.1:{port}/v1"
    try:
        yield one
    finally:
        server.close()
        for line in list(one.lines):
            line.writer.transport.abort()
        await soon(server.wait_closed())


# ---- what a good one says -----------------------------------------------------------------------------

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
DONE = b"data: [DONE]\n\n"


def chunked(data: bytes) -> bytes:
    """A piece of a body as HTTP/1.1 frames it."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(content: object) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def chunk(text: str, finish_reason: str | None = None, **fields: Any) -> bytes:
    """The event of one delta, by a model that calls itself otherwise."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}
    return event({"id": "far", "model": "far-model-7b", "choices": [choice], "usage": None, **fields})


def usage() -> bytes:
    """The event that tells what was used."""
    return event({"id": "far", "model": "far-model-7b", "choices": [], "usage": USAGE})


def whole(text: str = "all is well", **fields: Any) -> bytes:
    """The body of a whole answer."""
    message = {"role": "assistant", "content": text}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    return json.dumps(
        {"id": "far", "model": "far-model-7b", "choices": choices, "usage": USAGE, **fields}
    ).encode()


async def behaves(line: Line) -> None:
    """Answers every request well."""
    while True:
        asked = await line.asked()
        if asked.stream:
            await line.stream(chunk("all "), chunk("is "), chunk("well", "stop"), usage(), DONE)
            await line.send(END)
        else:
            await line.answer(200, whole())


# ---- the ways in which it can misbehave ---------------------------------------------------------------


def refuses(status: int, body: bytes, content_type: str = "application/json", **headers: str) -> Behaviour:
    """Says this to its first request, and behaves with the others."""

    async def behaviour(line: Line) -> None:
        await line.asked()
        await line.answer(status, body, content_type, **headers)
        await behaves(line)

    return behaviour


def says(*parts: bytes) -> Behaviour:
    """Answers its first request with these bytes and closes the connection."""

    async def behaviour(line: Line) -> None:
        await line.asked()
        await line.send(*parts)

    return behaviour


def says_and_hangs(*parts: bytes) -> Behaviour:
    """The same, but then nothing more happens."""

    async def behaviour(line: Line) -> None:
        await line.asked()
        await line.send(*parts)
        await line.gone()

    return behaviour


async def hangs_at_once(line: Line) -> None:
    """Accepts the connection and does not even read."""
    await line.gone()


async def resets(line: Line) -> None:
    """Drops the connection once it has been asked."""
    await line.asked()
    line.reset()


async def echoes_the_key(line: Line) -> None:
    """Refuses the key, and repeats it whole and in part."""
    key = (await line.asked()).headers["authorization"].removeprefix("Bearer ")
    message = f"Incorrect API key provided: {key}. We know {key[:12]}***{key[-4:]} and '{key[6:-2]}'."
    error = {"message": message, "type": key, "param": key[3:], "code": "invalid_api_key"}
    await line.answer(401, json.dumps({"error": error}).encode(), retry_after=key)
    await behaves(line)


def gzipped(body: bytes) -> bytes:
    """A whole response that was compressed although nobody asked for it."""
    packed = gzip.compress(body)
    head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-encoding: gzip\r\ncontent-length: "
    return f"{head}{len(packed)}\r\n\r\n".encode() + packed


def body(content: bytes, content_type: bytes = b"application/json") -> bytes:
    """A whole response."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n"
    return head % (content_type, len(content)) + content
