from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
import zmq
import zmq.asyncio
from vllm.utils.network_utils import get_open_zmq_inproc_path, make_zmq_socket

from serving.vllm_outbox import MOST, Outbox

CORE = b"core"

pytestmark = pytest.mark.asyncio


class Wire:
    """A socket as vLLM makes it for its engine core's messages, and the engine core's end of it."""

    def __init__(self) -> None:
        self._context = zmq.asyncio.Context()
        path = get_open_zmq_inproc_path()
        socket: Any = make_zmq_socket(self._context, path, zmq.ROUTER, bind=True)
        self.socket: zmq.asyncio.Socket = socket
        self.outbox = Outbox(self.socket)
        self._core: zmq.Socket[bytes] = zmq.Context(self._context).socket(zmq.DEALER)
        self._core.setsockopt(zmq.IDENTITY, CORE)
        self._core.connect(path)

    async def send(self, *parts: Any) -> None:
        """As vLLM does."""
        await self.outbox.send_multipart((CORE, *parts), copy=False)

    def arrived(self) -> list[list[bytes]]:
        """All messages that the engine core can read by now."""
        messages = []
        while self._core.poll(0):
            messages.append(self._core.recv_multipart())
        return messages

    def close(self) -> None:
        self._core.close(0)
        self.socket.close(0)
        self._context.term()


@pytest_asyncio.fixture
async def wire() -> AsyncIterator[Wire]:
    """One that is closed after the test."""
    wire = Wire()
    yield wire
    wire.close()


@pytest.mark.parametrize("together", [1, 2, MOST - 1, MOST, MOST + 1, 3 * MOST + 1])
async def test_messages_arrive_whole_and_in_order(wire: Wire, together: int) -> None:
    """However many leave in one turn of the loop, each arrives once, with all its parts, large ones and empty
    ones too, in the order in which they were sent."""
    large = memoryview(bytes(range(256)) * 1024)
    messages = [(b"\x00", b"%d" % number, b"", large) for number in range(2 * together)]
    for turn in (messages[:together], messages[together:]):
        for message in turn:
            await wire.send(*message)
        await asyncio.sleep(0)
    assert wire.arrived() == [[bytes(part) for part in message] for message in messages]


async def test_a_turns_messages_leave_together(wire: Wire) -> None:
    """A message waits for those that the same turn of the loop brings, but for no more than MOST - 1."""
    await wire.send(b"first")
    assert wire.arrived() == []
    for _ in range(MOST - 1):
        await wire.send(b"another")
    assert len(wire.arrived()) == MOST
    await wire.send(b"last")
    assert wire.arrived() == []
    await asyncio.sleep(0)
    assert wire.arrived() == [[b"last"]]


@pytest.mark.parametrize("bad", range(MOST))
async def test_a_message_that_cannot_be_sent_takes_no_other_with_it(wire: Wire, bad: int) -> None:
    """Wherever it stands among a turn's messages, the others arrive, and their senders hear nothing of it."""
    messages = [b"%d" % number for number in range(MOST)]
    for number, message in enumerate(messages):
        await wire.send(5 if number == bad else message)
    await asyncio.sleep(0)
    assert wire.arrived() == [[message] for message in messages if message != messages[bad]]


async def test_what_waits_at_the_end_is_dropped(wire: Wire) -> None:
    """A socket that is closed with a message waiting, as at the engine's end, sends nothing and raises
    nothing."""
    said: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))
    await wire.send(b"too late")
    wire.socket.close(0)
    await asyncio.sleep(0)
    assert said == []
