"""The engine protocol: what a replica needs of whatever makes the tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import msgspec

from serving.messages import Load, Request, Sampling, ToolCall

FinishReason = Literal["stop", "length"]
"""How an engine ends a choice: by itself or at a stop string, or because it had all the tokens it might."""


class Refusal(Exception):
    """The request cannot be generated, and the client is told why in these words."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        """`retry_after`: seconds after which the same request may be taken, where that is known."""
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after


class EngineDead(Exception):
    """The engine cannot go on; its replica has to be replaced."""


class Logprob(NamedTuple):
    """How likely a token was to the model, before penalties and bias."""

    token: str
    logprob: float


class TokenLogprobs(NamedTuple):
    """The token that stands at one place, and the likeliest ones there, likeliest first."""

    chosen: Logprob
    likeliest: Sequence[Logprob]


class ToolCallDelta(NamedTuple):
    """More of one call of a function: its id and its name come first, its arguments piece by piece."""

    call: int
    """Its place among the choice's calls, from 0."""
    id: str | None
    name: str | None
    arguments: str


class Delta(NamedTuple):
    """More of one choice's message. None: nothing of that kind."""

    content: str | None = None
    reasoning: str | None = None
    tool_calls: Sequence[ToolCallDelta] = ()


class Parsed(NamedTuple):
    """One choice's message, whole."""

    content: str | None
    reasoning: str | None
    tool_calls: Sequence[ToolCall]


class Parser(Protocol):
    """Finds the reasoning and the tool calls in what a model says. One for each choice."""

    def delta(self, text: str, token_ids: Sequence[int], *, finished: bool) -> Delta | None:
        """What `text`, which these tokens spell, adds to the message; None where that is not certain yet.
        `finished`: nothing follows."""

    def whole(self, text: str, token_ids: Sequence[int]) -> Parsed:
        """The message that a choice's whole text is. For a parser that has seen no delta."""

    def reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        """How many of a choice's tokens are reasoning."""


class Prompt(NamedTuple):
    """A rendered prompt: its length in tokens, and what the engine that rendered it wants back."""

    length: int
    content: Any
    text: str | None = None
    """Its text, where the request wants it echoed."""
    parser: Callable[[], Parser] | None = None
    """Makes what reads one choice's answer; None where an answer is nothing but its text."""
    decoder: Callable[[], Callable[[int], str]] | None = None
    """Makes what tells, of each token of one choice's answer in turn, what it adds to the text. None where
    each `put` of an engine has a text and the tokens that spell it, and one of them at most is a mark."""


class Sink(Protocol):
    """Where one request's output goes. An engine calls it on the event loop, in the order of generation."""

    cached_tokens: int
    """Prompt tokens that the engine did not have to compute; set before the first `put`."""

    def accepted(self) -> None:
        """The engine has taken the request: no `Refusal` can follow. Called once, before any `put`."""

    def prompt_logprobs(self, prompt: int, first: str, logprobs: Sequence[TokenLogprobs]) -> None:
        """Of the tokens of one prompt: the text of the first, which nothing precedes, and the logprobs of the
        others. Called before any `put` of that prompt, where a request that is echoed asks for logprobs."""

    def put(
        self,
        choice: int,
        text: str,
        token_ids: Sequence[int],
        finish_reason: FinishReason | None,
        logprobs: Sequence[TokenLogprobs] = (),
    ) -> None:
        """More tokens of one choice, which spell `text` (it may be empty while bytes of a character or a
        possible stop string are held back). `logprobs` has one entry for each token where the request asks
        for them. A `finish_reason` ends the choice."""

    def fail(self, error: Exception) -> None:
        """The engine gives up on the whole request. Nothing follows."""


def fit(sampling: Sampling, prompt: Prompt, context_length: int, *, param: str = "messages") -> Sampling:
    """The sampling with `max_tokens`, and what must not exceed it, clamped to the room that the prompt
    leaves in the context.

    Raises Refusal, for the field `param`, where it leaves none.
    """
    room = context_length - prompt.length
    if room < 1:
        raise Refusal(
            f"{param}: the prompt has {prompt.length} tokens, and with at least one token of answer it must"
            f" fit the model's context of {context_length} tokens",
            param=param,
            code="context_length_exceeded",
        )
    if sampling.max_tokens <= room:
        return sampling
    return msgspec.structs.replace(sampling, max_tokens=room, min_tokens=min(sampling.min_tokens, room))


class Engine(Protocol):
    """One model, loaded. All methods are called on one event loop."""

    context_length: int
    """Tokens that prompt and answer may have together; known once `start` has returned."""

    async def start(self) -> None:
        """Load the model. Raises what made that impossible."""

    async def render(self, request: Request) -> list[Prompt]:
        """The prompts of a request: of a chat one, under the model's chat template. Raises Refusal."""

    async def generate(self, request: Request, prompts: Sequence[Prompt], sink: Sink) -> None:
        """Start generating `request.sampling.n` choices for each of the prompts that `render` made of the
        request into `sink`; returns when the engine has all of them.

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
