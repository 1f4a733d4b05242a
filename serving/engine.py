"""The engine protocol: what a replica needs of whatever makes the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from serving.messages import Load, Message, Sampling

FinishReason = Literal["stop", "length"]


class Refusal(Exception):
    """The request cannot be generated, and the client is told why in these words."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code


class EngineDead(Exception):
    """The engine cannot go on; its replica has to be replaced."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered prompt: its length in tokens, and what the engine that rendered it wants back."""

    length: int
    content: Any


class Sink(Protocol):
    """Where one request's output goes. An engine calls it on the event loop, in the order of generation."""

    cached_tokens: int
    """Prompt tokens that the engine did not have to compute; set before the first `put`."""

    def accepted(self) -> None:
        """The engine has taken the request: no `Refusal` can follow. Called once, before any `put`."""

    def put(self, choice: int, text: str, tokens: int, finish_reason: FinishReason | None) -> None:
        """`tokens` more tokens of one choice, which spell `text` (it may be empty while bytes of a character
        or a possible stop string are held back). A `finish_reason` ends the choice."""

    def fail(self, error: Exception) -> None:
        """The engine gives up on the whole request. Nothing follows."""


class Engine(Protocol):
    """One model, loaded. All methods are called on one event loop."""

    context_length: int
    """Tokens that prompt and answer may have together; known once `start` has returned."""

    async def start(self) -> None:
        """Load the model. Raises what made that impossible."""

    async def render(self, messages: Sequence[Message]) -> Prompt:
        """The prompt that these messages make under the model's chat template. Raises Refusal."""

    async def generate(self, request_id: str, prompt: Prompt, sampling: Sampling, sink: Sink) -> None:
        """Start generating `sampling.n` choices into `sink`; returns when the engine has the request.

        Raises Refusal before `sink.accepted()`; after it, everything goes through the sink. Cancelling the
        awaiting task before it returns cancels the request too.
        """

    def cancel(self, request_id: str) -> None:
        """Stop generating and free what the request holds. Idempotent; the sink hears nothing more."""

    def load(self) -> Load:
        """The load after the last step. Cheap: it is asked once for every frame."""

    async def died(self) -> EngineDead:
        """Returns when the engine has died, at once if it already has."""

    async def close(self) -> None:
        """Free everything, processes included. Idempotent."""
