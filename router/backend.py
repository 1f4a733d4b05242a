"""What answers for a model: replicas of this deployment, or a provider. Both are asked by one verb."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Literal, NamedTuple, Protocol

import msgspec
from pydantic import SecretStr

from router.errors import ApiError, SlowReader
from serving.messages import Request

State = Literal["ready", "loading", "stopped", "failed"]
"""Whether a request would be answered now."""

Kind = Literal["hosted", "upstream"]
"""Whether a model runs here or at an upstream provider."""


class Piece(NamedTuple):
    """What has gathered since the last read: bytes for the client and the tokens in them."""

    data: bytes
    tokens: int
    last: bool


Direct = Callable[[bytes, int, float], bool]
"""Takes a piece that came while its reader had nothing left to take: the bytes, the tokens in them, and when
it came. Says whether it took it: where it does not, the piece waits for the reader."""


class Job(msgspec.Struct, frozen=True):
    """One validated request on its way to whatever answers it."""

    key: str
    """Ours, unique."""
    request: Request
    """As a replica takes it."""
    data: dict[str, Any]
    """The JSON object that the request was read from."""
    provider_key: SecretStr | None = None
    """The caller's own key for an upstream provider."""


class Stream(Protocol):
    """One answer on its way. Whoever opened it closes it, however it ends."""

    accepted: bool
    """Whether whatever answers has taken the request."""
    overflowed: Callable[[SlowReader], None] | None
    """Told when the stream is given up because it is not read: its reader is held up where `read` cannot
    tell it."""
    direct: Direct | None
    """Where pieces may go without waking the reader, once it has read the first. A stream may ignore it."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt, by the count of whatever answers; 0 until it has told it."""

    @property
    def completion_tokens(self) -> int | None:
        """Generated tokens, by the same count, over all choices; None until it has told it."""

    @property
    def replica(self) -> str:
        """Who answers, for the log."""

    async def read(self) -> Piece:
        """Everything that has gathered, waiting for something to gather. Raises what ended it early."""

    def close(self) -> None:
        """Free what the stream holds; an answer that has not ended is cancelled. Idempotent."""


class Backend(Protocol):
    """What answers for one model."""

    @property
    def kind(self) -> Kind:
        """Where that is."""

    @property
    def state(self) -> State:
        """Whether a request would be answered now."""

    @property
    def context_length(self) -> int | None:
        """Tokens that prompt and answer may have together, where known."""

    @property
    def waiting(self) -> int:
        """Requests that wait for something to take them."""

    def check(self, job: Job) -> None:
        """Raises the ApiError of a job that could not be done at any time, so that it waits for nothing."""

    async def generate(self, job: Job, timeout_s: float, tried: Callable[[Stream], None]) -> Stream:
        """A stream that has bytes to read. `tried` is told of each stream as it is opened.

        Waits up to `timeout_s` seconds for something to take the request. Raises ApiError.
        """

    async def close(self) -> None:
        """Free everything."""


@asynccontextmanager
async def within(seconds: float, late: ApiError) -> AsyncIterator[None]:
    """Raises `late` in the block after so many seconds."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise late from None
