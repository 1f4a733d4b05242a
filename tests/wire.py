"""A bare HTTP client: it reads when it is told to, and leaves as it likes."""

from __future__ import annotations

import asyncio
import json
import socket
from dataclasses import dataclass, field
from typing import Any

from tests.waiting import soon


@dataclass
class Answer:
    """A streamed answer that was read to its end."""

    status: int
    events: list[dict[str, Any]] = field(default_factory=list)
    done: bool = False
    """Whether [DONE] came, as the last event."""
    complete: bool = False
    """Whether the body was ended as HTTP demands."""

    @property
    def error(self) -> dict[str, Any] | None:
        """The error of the last event, if it is one."""
        error: dict[str, Any] | None = self.events[-1].get("error") if self.events else None
        return error

    def text(self, choice: int = 0) -> str:
        """Every delta of one choice, joined."""
        return "".join(delta.get("content", "") for delta in self.deltas(choice))

    def deltas(self, choice: int = 0) -> list[dict[str, Any]]:
        """Every delta of one choice."""
        return [each["delta"] for each in self.choices(choice)]

    def choices(self, choice: int = 0) -> list[dict[str, Any]]:
        """Every entry of one choice."""
        return [each for event in self.events for each in event.get("choices", ()) if each["index"] == choice]


class Wire:
    """One HTTP/1.1 request on a socket of its own. It reads when it is told to, and leaves as it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self._reader = reader
        self._writer = writer
        self._pending = b""

    @classmethod
    async def connect(cls, port: int, receive_buffer: int | None = None) -> Wire:
        """A connection with nothing sent yet. `receive_buffer`: bytes that the kernel holds for us."""
        sock = socket.socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        return cls(*await asyncio.open_connection(sock=sock, limit=2**14))

    def post(self, body: dict[str, Any], **headers: str) -> None:
        """Send a chat completion request; `x_request_id` is the header x-request-id."""
        content = json.dumps(body).encode()
        self.post_head(len(content), **headers)
        self.send(content)

    def post_head(self, length: int, content_type: str = "application/json", **headers: str) -> None:
        """Send the head of a chat completion request whose body has so many bytes."""
        lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        self.send(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: test\r\ncontent-type: %b\r\n%b"
            b"content-length: %d\r\n\r\n" % (content_type.encode(), lines.encode(), length)
        )

    def send(self, data: bytes) -> None:
        """Write as it is."""
        self._writer.write(data)

    async def closed(self) -> bool:
        """Whether the server closes the connection, with nothing more to say."""
        return await soon(self._reader.read()) == b""

    def leave(self) -> None:
        """Drop the connection, whatever is still to come."""
        self._writer.transport.abort()

    async def head(self) -> int:
        """Read the status line and the headers; returns the status."""
        if not self.status:
            lines = (await soon(self._reader.readuntil(b"\r\n\r\n"))).decode("latin-1").split("\r\n")
            self.status = int(lines[0].split(" ")[1])
            pairs = (line.partition(":") for line in lines[1:] if line)
            self.headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        return self.status

    async def body(self) -> bytes:
        """Read a body that is not chunked."""
        await self.head()
        return await soon(self._reader.readexactly(int(self.headers["content-length"])))

    async def some(self, most: int) -> bytes:
        """Read what there is, but not more than that many bytes."""
        return await soon(self._reader.read(most))

    async def event(self) -> bytes:
        """The data of the next event; empty at the end of the body. Raises IncompleteReadError where the
        body is cut off."""
        await self.head()
        while b"\n\n" not in self._pending:
            size = int(await soon(self._reader.readuntil(b"\r\n")), 16)
            chunk = await soon(self._reader.readexactly(size + 2))
            if not size:
                assert not self._pending
                return b""
            self._pending += chunk[:-2]
        event, _, self._pending = self._pending.partition(b"\n\n")
        assert event.startswith(b"data: ")
        return event.removeprefix(b"data: ")

    async def answer(self) -> Answer:
        """Read everything that is still to come."""
        answer = Answer(await self.head())
        if answer.status != 200:
            answer.events.append(json.loads(await self.body()))
            answer.complete = True
            return answer
        try:
            while event := await self.event():
                assert not answer.done, "an event after [DONE]"
                if event == b"[DONE]":
                    answer.done = True
                else:
                    answer.events.append(json.loads(event))
            answer.complete = True
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        return answer
