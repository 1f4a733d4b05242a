"""A client that can leave, count and hold a thousand streams: one raw connection for each exchange."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, cast

import httptools
import msgspec

from tests.end_to_end.server import Server

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
DONE = "[DONE]"

PATIENCE_S = 120.0
"""Seconds for an answer to end."""


class Exchange(asyncio.Protocol):
    """One request for tokens and what has come back for it."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = bytearray()
        self.asked_at = time.perf_counter()
        self.heard_at = 0.0
        """When the last bytes came, the answer's end among them."""
        self.ended_at = 0.0
        self.begun: asyncio.Future[None] = loop.create_future()
        """Done when the first byte of the body is there."""
        self.ended: asyncio.Future[None] = loop.create_future()
        """Done when the body has ended properly; ConnectionError where it was cut off."""
        self._more = asyncio.Event()
        self._gone: asyncio.Future[None] = loop.create_future()
        self._parser = httptools.HttpResponseParser(self)

    async def first(self) -> None:
        """Return when the answer has begun."""
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.wait([self.begun, self.ended], return_when=asyncio.FIRST_COMPLETED)

    async def more(self) -> None:
        """Return when the answer has gone on, or has ended."""
        if self.ended.done():
            return
        self._more.clear()
        async with asyncio.timeout(PATIENCE_S):
            await self._more.wait()

    async def end(self) -> Exchange:
        """Itself, when the answer has ended. Raises ConnectionError where it was cut off."""
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.shield(self.ended)
        return self

    async def leave(self) -> None:
        """Close the connection at once."""
        self._transport.abort()
        await self._gone

    # ---- the answer ----------------------------------------------------------------------------------

    @property
    def seconds(self) -> float:
        """From the request to the end of its answer."""
        return self.ended_at - self.asked_at

    @property
    def events(self) -> list[str]:
        """The data of each whole server-sent event so far."""
        blocks = self.body.decode().split("\n\n")[:-1]
        assert all(block.startswith("data: ") for block in blocks), blocks
        return [block.removeprefix("data: ") for block in blocks]

    @property
    def done(self) -> bool:
        """Whether the stream's last event is [DONE]."""
        return self.events[-1:] == [DONE]

    @property
    def chunks(self) -> list[dict[str, Any]]:
        """The JSON of each event."""
        return [msgspec.json.decode(event) for event in self.events if event != DONE]

    @property
    def json(self) -> dict[str, Any]:
        """A whole answer, or an error."""
        answer: dict[str, Any] = json.loads(self.body)
        return answer

    @property
    def error(self) -> dict[str, Any]:
        """The error that the stream's last event, or the body, carries."""
        last: dict[str, Any] = json.loads(self.events[-1]) if self._streamed else self.json
        error: dict[str, Any] = last["error"]
        return error

    def text(self, choice: int = 0) -> str:
        """The text of one choice; "" where a message has none."""
        if not self._streamed:
            return _text(self.json["choices"][choice], "message")
        return "".join(_text(part, "delta") for part in self._parts(choice))

    def finish_reason(self, choice: int = 0) -> str | None:
        """Why one choice ended; None if it has not."""
        parts = self._parts(choice) if self._streamed else self.json["choices"][choice : choice + 1]
        reason: str | None = parts[-1]["finish_reason"]
        return reason

    def logprobs(self, choice: int = 0) -> list[Any]:
        """What one choice's tokens are said to be worth: of a chat its entries, of a text completion its
        columns' rows."""
        parts = self._parts(choice) if self._streamed else self.json["choices"][choice : choice + 1]
        told = [part["logprobs"] for part in parts if part["logprobs"]]
        return [row for one in told for row in one.get("content") or zip(*one.values(), strict=True)]

    @property
    def choices(self) -> int:
        """How many choices it has."""
        if not self._streamed:
            return len(self.json["choices"])
        return len({part["index"] for chunk in self.chunks for part in chunk["choices"]})

    @property
    def usage(self) -> dict[str, Any]:
        """What was used; of a stream that was asked for it."""
        usage: dict[str, Any] = (self.chunks[-1] if self._streamed else self.json)["usage"]
        return usage

    @property
    def _streamed(self) -> bool:
        return self.headers["content-type"].startswith("text/event-stream")

    def _parts(self, choice: int) -> list[dict[str, Any]]:
        return [part for chunk in self.chunks for part in chunk.get("choices", ()) if part["index"] == choice]

    # ---- what asyncio and httptools call -------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self.heard_at = time.perf_counter()
        self._parser.feed_data(data)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(ConnectionError(f"cut off after {bytes(self.body[-300:])!r}"))
            self.ended.exception()  # a client that left does not ask
            self._more.set()
        self._gone.set_result(None)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode()

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        self.body += data
        self._more.set()
        if not self.begun.done():
            self.begun.set_result(None)

    def on_message_complete(self) -> None:
        self.ended_at = time.perf_counter()
        if not self.ended.done():
            self.ended.set_result(None)
            self._more.set()


def _text(choice: dict[str, Any], message: str) -> str:
    """The text in a choice: of a text completion its own, of a chat its message's."""
    text: str | None = choice["text"] if "text" in choice else choice[message].get("content")
    return text or ""


@asynccontextmanager
async def asking(
    server: Server, body: Mapping[str, Any] | str, headers: Mapping[str, str] | None = None
) -> AsyncIterator[Exchange]:
    """The exchange of a request that has just been sent; the client leaves when the block does. A body with a
    prompt asks for a text completion, any other for a chat completion. One that is a text is JSON already."""
    path = CHAT if isinstance(body, str) or "prompt" not in body else TEXT
    data = (body if isinstance(body, str) else json.dumps(body)).encode()
    lines = {"host": "t", "content-type": "application/json", "content-length": len(data), **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    loop = asyncio.get_running_loop()
    transport, exchange = await loop.create_connection(Exchange, "127.0.0.1", server.port)
    transport.write(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + data)
    try:
        yield exchange
    finally:
        await exchange.leave()


async def ask(
    server: Server, body: Mapping[str, Any] | str, headers: Mapping[str, str] | None = None
) -> Exchange:
    """The exchange of a request that has been answered to the end."""
    async with asking(server, body, headers) as exchange:
        return await exchange.end()


async def ask_all(server: Server, bodies: list[dict[str, Any]]) -> list[Exchange]:
    """All of them at once."""
    return await asyncio.gather(*(ask(server, body) for body in bodies))


def chat(model: str, words: str, **parameters: Any) -> dict[str, Any]:
    """The body of a request with one user message."""
    return {"model": model, "messages": [{"role": "user", "content": words}], **parameters}
