"""Who may ask for tokens, and what is kept of it. `router.accounts` answers; where accounts are off anyone
may, and nothing is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from router.headers import Header
from router.metrics import Outcome
from router.settings import ModelSettings
from serving.messages import Request


class Settlement(NamedTuple):
    """How a request ends."""

    outcome: Outcome
    status: int
    model: str
    """The name that was asked for, or nothing."""
    error: str
    """Its code, or nothing."""
    replica: str
    prompt_tokens: int
    completion_tokens: int
    first_us: int | None
    """Microseconds from the request's arrival to the first bytes of its answer."""
    duration_us: int


class Entry(Protocol):
    """What is kept of one request, and what it holds of its caller's limits."""

    caller: str
    """Whoever waits for the same model is served fairly: this tells callers apart."""
    keeps_text: bool
    """Whether what is asked and answered is kept."""

    @property
    def headers(self) -> Sequence[tuple[str, str]]:
        """What the client is told of its limits."""

    async def admit(
        self, model: ModelSettings, request: Request, body_bytes: int, context: int | None
    ) -> None:
        """Let the request in, with what it may use at most reserved until the entry is settled.

        `context`: tokens that prompt and answer may have together, where known. Raises ApiError.
        """

    def asked(self, body: bytes) -> None:
        """The request's body has come."""

    def answered(self, data: bytes) -> None:
        """More of the answer has gone out. To be told where texts are kept."""

    async def written(self) -> None:
        """Returns when it is safe from the death of any process, as it is now."""

    def settle(self, end: Settlement) -> None:
        """The request ends like this; the last word counts. Every entry is settled in the end."""


class Gate(Protocol):
    """What every request for tokens passes."""

    async def enter(self, headers: Sequence[Header], key: str, request_id: str, path: str) -> Entry:
        """It is known who asks. `key` is our id of the request, `request_id` perhaps the client's own.

        Raises ApiError.
        """


class Unkept:
    """The entry of a request that nobody keeps."""

    caller = ""
    keeps_text = False
    headers: Sequence[tuple[str, str]] = ()

    async def admit(
        self, model: ModelSettings, request: Request, body_bytes: int, context: int | None
    ) -> None:
        pass

    def asked(self, body: bytes) -> None:
        pass

    def answered(self, data: bytes) -> None:
        pass

    async def written(self) -> None:
        pass

    def settle(self, end: Settlement) -> None:
        pass


UNKEPT = Unkept()


class OpenGate:
    """Lets anyone in."""

    async def enter(self, headers: Sequence[Header], key: str, request_id: str, path: str) -> Entry:
        return UNKEPT
