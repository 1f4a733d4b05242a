"""Where messages to the engine core leave: together, those of one turn of the event loop.

A message that is sent by itself wakes ZeroMQ's thread, and that the engine core's: 20 us of a request's time
here. Requests often come several at once, and then one waking does for all.

Import this module only through `serving.engines`, which sets the environment first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any

import structlog
import zmq
import zmq.asyncio
from vllm.v1.engine.core_client import AsyncMPClient

log = structlog.get_logger(__name__)

MOST = 8
"""Messages that wait for each other at most: the engine core can begin with some while others come."""


def install(client: AsyncMPClient) -> None:
    """Let vLLM send its messages to the engine core through an `Outbox`. To be called on the event loop."""
    assert isinstance(client.input_socket, zmq.asyncio.Socket)  # noqa: S101 - as every asyncio client's
    outbox: Any = Outbox(client.input_socket)  # vLLM asks nothing of the socket but to send and to be closed
    client.input_socket = outbox


class Outbox:
    """Sends whole messages through a socket that takes any number of them, in the order in which they come.

    Such a socket, a ROUTER without a high-water mark, never has its sender wait.
    """

    def __init__(self, socket: zmq.asyncio.Socket) -> None:
        self._loop = asyncio.get_running_loop()
        self._messages: zmq.Socket[bytes] = zmq.Socket.shadow(socket.underlying)
        self._waiting: list[Sequence[Any]] = []
        self._sent = self._loop.create_future()
        self._sent.set_result(None)

    def send_multipart(self, parts: Sequence[Any], *, copy: bool) -> Awaitable[None]:
        """Send with the turn's other messages; there is nothing to wait for."""
        self._waiting.append(parts)
        if len(self._waiting) == 1:
            self._loop.call_soon(self._send)
        elif len(self._waiting) == MOST:
            self._send()
        return self._sent

    def _send(self) -> None:
        waiting, self._waiting = self._waiting, []
        if self._messages.closed:
            return
        for parts in waiting:
            try:
                self._messages.send_multipart(parts, zmq.DONTWAIT, copy=False)
            except Exception:
                # Whoever sent it has gone on; the router's time-outs end its request. The others go out.
                log.exception("a message could not be sent to the engine core")
