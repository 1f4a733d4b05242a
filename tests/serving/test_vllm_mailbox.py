from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Iterator
from threading import Thread
from typing import Any

import pytest
import pytest_asyncio
import zmq
import zmq.asyncio
from vllm.utils.network_utils import get_open_zmq_ipc_path, make_zmq_socket

from serving.vllm_mailbox import Mailbox
from tests.waiting import soon

MESSAGES = 20_000

STALL_S = 0.3
"""Seconds in which a loop that has nothing to do must do next to nothing."""

LARGE = bytes(range(256)) * 256

pytestmark = pytest.mark.asyncio


class Wire:
    """A socket as vLLM makes it for its engine core's outputs, and the engine core's end of it."""

    def __init__(self) -> None:
        self.context = zmq.asyncio.Context()
        path = get_open_zmq_ipc_path()
        socket: Any = make_zmq_socket(self.context, path, zmq.PULL, bind=True)
        self.socket: zmq.asyncio.Socket = socket
        self.mailbox = Mailbox(self.socket)
        self.core: zmq.Socket[bytes] = zmq.Context(self.context).socket(zmq.PUSH)
        self.core.set_hwm(0)
        self.core.connect(path)

    async def read(self) -> list[bytes]:
        """The next message, as vLLM reads it."""
        frames = await soon(self.mailbox.recv_multipart(copy=False))
        return [bytes(frame.buffer) for frame in frames]

    def close(self) -> None:
        self.core.close(0)
        self.mailbox.close(0)
        self.context.term()


@pytest_asyncio.fixture
async def wire() -> AsyncIterator[Wire]:
    """One that is closed after the test."""
    wire = Wire()
    yield wire
    wire.close()


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Keeps the garbage collector, which walks through all of vLLM, from working meanwhile."""
    gc.disable()
    yield
    gc.enable()


def message(number: int) -> list[bytes]:
    """One of several parts; now and then one of them is large, or empty."""
    return [b"%d" % number, LARGE if number % 500 == 0 else b"", b"tokens"]


def send_in_bursts(core: zmq.Socket[bytes]) -> None:
    """Every message, in bursts of many sizes with pauses between them, as an engine core does."""
    for number in range(MESSAGES):
        core.send_multipart(message(number), copy=False)
        if number % 7 == 0 or number % 128 < 3:
            time.sleep(0.002 if number % 96 == 0 else 0)


def stall(number: int) -> float | None:
    """How long a reader is busy after a message: mostly not at all, at times for a turn of the loop, at times
    for longer than a burst."""
    if number % 1000 == 0:
        return 0.02
    return None if number % 11 else 0.0


async def test_every_message_arrives_once_and_in_order(wire: Wire) -> None:
    """Whether the reader waits for the messages or they for a reader that stalls, all arrive, whole and in
    the order in which they were sent."""
    sender = Thread(target=send_in_bursts, args=[wire.core])
    sender.start()
    for number in range(MESSAGES):
        assert await wire.read() == message(number)
        if (seconds := stall(number)) is not None:
            await asyncio.sleep(seconds)
    sender.join()


async def test_a_reader_that_gave_up_loses_nothing(wire: Wire) -> None:
    """One whose waiting is cancelled takes no message with it: the next reader has it."""
    for number in range(100):
        waiting = asyncio.ensure_future(wire.mailbox.recv_multipart(copy=False))
        await asyncio.sleep(0)
        waiting.cancel()
        wire.core.send_multipart(message(number))
        assert await wire.read() == message(number)


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("gives_up", [False, True], ids=["one waits", "one has given up"])
@pytest.mark.parametrize("messages", [0, 3], ids=["nothing came", "some came"])
async def test_the_loop_rests(wire: Wire, gives_up: bool, messages: int) -> None:
    """Where there is nothing to read, or nobody who reads it any more, the event loop sleeps."""
    waiting = asyncio.ensure_future(wire.mailbox.recv_multipart(copy=False))
    await asyncio.sleep(0)
    if gives_up:
        waiting.cancel()
    for number in range(messages):
        wire.core.send_multipart(message(number))
    began = time.thread_time()
    await asyncio.sleep(STALL_S)
    assert time.thread_time() - began < STALL_S / 5
    assert waiting.done() == (gives_up or messages > 0)
    waiting.cancel()


async def test_after_its_end_it_is_silent(wire: Wire) -> None:
    """Closed, as at the engine's end, it reads nothing more, closes the socket that it was made from, and the
    loop goes on; to close it again does nothing."""
    waiting = asyncio.ensure_future(wire.mailbox.recv_multipart(copy=False))
    await asyncio.sleep(0)
    wire.mailbox.close(0)
    assert wire.socket.closed
    wire.core.send(b"too late", zmq.DONTWAIT)
    await asyncio.sleep(0.05)
    assert not waiting.done()
    waiting.cancel()
    wire.mailbox.close(0)
