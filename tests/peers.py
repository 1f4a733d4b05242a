"""Both ends of a trunk, spoken by hand: for what neither of the real ones would ever say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Generic, TypeVar

from serving import messages
from serving.handshake import nonce, prove, verify
from serving.messages import FrameReader
from tests.waiting import soon

SECRET = b"the secret of the deployment under test"

M = TypeVar("M")


class Peer(Generic[M]):
    """One end of a trunk, spoken by hand."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, decode: Callable[[bytes], M]
    ) -> None:
        self.writer = writer
        self.bytes = bytearray()
        """Everything that was read."""
        self._reader = reader
        self._decode = decode
        self._frames = FrameReader(messages.MAX_FRAME)
        self._received: list[M] = []

    def send(self, *sent: messages.ToReplica | messages.ToRouter) -> None:
        """Write these messages."""
        self.writer.writelines(map(messages.encode, sent))

    async def receive(self) -> M | None:
        """The next message; None once the other end has closed."""
        while not self._received:
            try:
                data = await soon(self._reader.read(2**16))
            except ConnectionError:
                return None
            if not data:
                self.leave()
                return None
            self.bytes += data
            self._received.extend(map(self._decode, self._frames.feed(data)))
        return self._received.pop(0)

    async def all(self) -> list[M]:
        """Every message until the other end closes."""
        received = []
        while (message := await self.receive()) is not None:
            received.append(message)
        return received

    def leave(self) -> None:
        """Drop the connection."""
        self.writer.transport.abort()

    async def closed(self) -> None:
        """Returns when nothing is left of the connection at this end."""
        with suppress(ConnectionError):
            await soon(self.writer.wait_closed())


BareRouter = Peer[messages.ToRouter]
BareReplica = Peer[messages.ToReplica]


async def dial(address: tuple[str, int]) -> BareRouter:
    """A connection to a replica, nothing said yet."""
    reader, writer = await asyncio.open_connection(*address)
    return Peer(reader, writer, messages.decode_to_router)


async def introduce(peer: BareRouter, name: str = "bare") -> None:
    """The handshake from a router's side."""
    challenge = await peer.receive()
    assert isinstance(challenge, messages.Challenge)
    ours = nonce()
    peer.send(messages.Hello(name, prove(SECRET, "router", challenge.nonce, ours), ours))
    welcome = await peer.receive()
    assert isinstance(welcome, messages.Welcome)
    verify(SECRET, "replica", welcome.proof, challenge.nonce, ours)


@asynccontextmanager
async def bare_replica() -> AsyncIterator[tuple[tuple[str, int], asyncio.Queue[BareReplica]]]:
    """A listener; its address, and the connections that routers open to it, nothing said yet."""
    accepted: asyncio.Queue[BareReplica] = asyncio.Queue()
    everyone: list[BareReplica] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(reader, writer, messages.decode_to_replica)
        everyone.append(peer)
        accepted.put_nowait(peer)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[:2], accepted
    finally:
        server.close()
        for peer in everyone:
            peer.leave()
            await peer.closed()


async def welcome(peer: BareReplica, name: str = "bare", context_length: int = 1000) -> None:
    """The handshake from a replica's side."""
    ours = nonce()
    peer.send(messages.Challenge(messages.PROTOCOL, ours))
    hello = await peer.receive()
    assert isinstance(hello, messages.Hello)
    verify(SECRET, "router", hello.proof, hello.nonce, ours)
    peer.send(messages.Welcome(prove(SECRET, "replica", hello.nonce, ours), name, context_length))
