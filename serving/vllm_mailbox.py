"""Where the engine core's outputs arrive: a socket that costs less to wait for than pyzmq's own.

pyzmq's asyncio sockets compare enumerations and keep a list of events for each message, about 90 us of it
(Python 3.11), once for every engine step. Waiting for one message at a time needs none of that.

Import this module only through `serving.engines`, which sets the environment first.
"""

from __future__ import annotations

import asyncio
from typing import Any

import zmq
import zmq.asyncio
from vllm.v1.engine.core_client import AsyncMPClient


def install(client: AsyncMPClient) -> None:
    """Let vLLM read the engine core's outputs from a `Mailbox`.

    To be called on the event loop before vLLM has begun to read: right after the client was made, without an
    await between.
    """
    resources = client.resources
    assert isinstance(resources.output_socket, zmq.asyncio.Socket)  # noqa: S101 - as every asyncio client's
    assert resources.output_queue_task is not None  # noqa: S101 - begun where a loop runs
    # It has not run yet, so it ends without a word.
    resources.output_queue_task.cancel()
    resources.output_queue_task = None
    resources.output_socket = Mailbox(resources.output_socket)
    client._ensure_output_queue_task()  # type: ignore[no-untyped-call]  # noqa: SLF001 - as vLLM does itself


class Mailbox(zmq.asyncio.Socket):
    """A socket for one reader that reads nothing but whole messages. It closes the one it was made from."""

    # pyzmq takes what is not declared in a class for one of its options.
    _arrival: asyncio.Future[None] | None
    _descriptor: int
    _loop: asyncio.AbstractEventLoop
    _messages: zmq.Socket[bytes]
    _original: zmq.asyncio.Socket

    def __init__(self, socket: zmq.asyncio.Socket) -> None:
        messages: zmq.Socket[bytes] = zmq.Socket.shadow(socket.underlying)
        super().__init__(messages)  # type: ignore[misc]
        self._arrival = None
        self._descriptor = messages.FD
        self._loop = asyncio.get_running_loop()
        self._messages = messages
        self._original = socket
        self._loop.add_reader(self._descriptor, self._arrived)

    async def recv_multipart(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        while True:
            try:
                return self._messages.recv_multipart(zmq.DONTWAIT, *args, **kwargs)
            except zmq.Again:
                # The descriptor speaks of what comes after this look, and not of anything before it.
                self._arrival = self._loop.create_future()
                await self._arrival

    def close(self, linger: int | None = None) -> None:
        if not self._loop.is_closed():
            self._loop.remove_reader(self._descriptor)
        # Both are handles of one socket, which must not be closed twice.
        self._original.close(linger)

    def _arrived(self) -> None:
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)
        else:
            # Nobody waits: whoever comes to read looks at the socket first. But as long as nobody looks, the
            # descriptor goes on to speak, at each turn of the loop.
            self._messages.getsockopt(zmq.EVENTS)
