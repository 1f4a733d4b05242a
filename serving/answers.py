"""What all answers have in common: whom they go to, what is counted, how they begin and how they end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec
import structlog

from serving.engine import EngineDead, Prompt, Refusal, TokenLogprobs
from serving.messages import Request, Usage

log = structlog.get_logger(__name__)

to_json = msgspec.json.Encoder().encode

DONE = b"data: [DONE]\n\n"

CHARACTER = 6
"""Bytes that a character has in JSON at most."""

LONGEST_ANSWER = 8 * 1024 * 1024
"""Characters of a whole answer, all choices together; of logprobs each CHARACTER bytes count as one. Thus it
fits a frame."""

_TOO_LONG = Refusal(
    f"the answer has more than {LONGEST_ANSWER} characters, which only a stream may have",
    param="stream",
    code="answer_too_long",
)

INTERNAL = Refusal("internal error", status=500, code="internal_error")
"""What a client learns of a fault of ours; the log says more."""


class Outlet(Protocol):
    """The trunk's end of one stream. Exactly one of `refused` and `ended` closes it; after that, nothing that
    is called has an effect."""

    def accepted(self, prompt_tokens: int) -> None:
        """The engine has the request, whose prompts have so many tokens together."""

    def refused(self, refusal: Refusal) -> None:
        """Nothing will be generated, or no more of it."""

    def chunk(self, data: bytes, tokens: int) -> None:
        """`data` for the client, carrying `tokens` tokens."""

    def progress(self) -> None:
        """There are more tokens, and none for the client yet."""

    def ended(self, data: bytes, tokens: int, usage: Usage, *, failed: bool = False) -> None:
        """The last bytes and what was used in all. A failed stream has none."""


class Answer:
    """A sink as far as it does not matter what it writes: it counts, and it can fail."""

    def __init__(self, request: Request, prompts: Sequence[Prompt], outlet: Outlet, kind: str) -> None:
        self.cached_tokens = 0
        self._outlet = outlet
        # What the client reads in every event, or once in a body.
        self._header = {
            "id": request.id,
            "object": kind,
            "created": request.created,
            "model": request.model,
        }
        self._prompt_tokens = sum(prompt.length for prompt in prompts)
        self._completion_tokens = 0
        # None where nothing looks for reasoning.
        self._reasoning_tokens = 0 if any(prompt.parser for prompt in prompts) else None
        self._unfinished = request.sequences

    def accepted(self) -> None:
        self._outlet.accepted(self._prompt_tokens)

    def prompt_logprobs(self, prompt: int, first: str, logprobs: Sequence[TokenLogprobs]) -> None:
        """Only an echo has a place for them."""

    def fail(self, error: Exception) -> None:
        log.error("generation failed", completion=self._header["id"], error=repr(error))
        if isinstance(error, EngineDead):
            self._outlet.ended(b"", 0, self._usage(), failed=True)
        else:
            self._outlet.refused(error if isinstance(error, Refusal) else INTERNAL)

    def _usage(self) -> Usage:
        return Usage(
            self._prompt_tokens, self._completion_tokens, self.cached_tokens, self._reasoning_tokens or 0
        )

    def _usage_json(self) -> dict[str, Any]:
        usage: dict[str, Any] = {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
        if self._reasoning_tokens is not None:
            usage["completion_tokens_details"] = {"reasoning_tokens": self._reasoning_tokens}
        return usage


class EventStream(Answer):
    """An answer as server-sent events."""

    def __init__(self, request: Request, prompts: Sequence[Prompt], outlet: Outlet, kind: str) -> None:
        super().__init__(request, prompts, outlet, kind)
        self._include_usage = request.include_usage
        # Of tokens whose text is held back; they ride with the next bytes.
        self._held_tokens = 0
        # What stands around a choice in every event.
        self._head = b"data: " + to_json(self._header)[:-1] + b',"choices":['
        self._tail = b"]" + (b',"usage":null' if request.include_usage else b"") + b"}\n\n"

    def _send(self, events: bytes, *, ends: bool) -> None:
        """Hand over the events of one `put`, which may be none; `ends`: its choice has ended."""
        if ends:
            self._unfinished -= 1
            if not self._unfinished:
                self._outlet.ended(events + self._closing(), self._held_tokens, self._usage())
                return
        if events:
            self._outlet.chunk(events, self._held_tokens)
            self._held_tokens = 0
        else:
            self._outlet.progress()

    def _closing(self) -> bytes:
        if not self._include_usage:
            return DONE
        return self._head + b'],"usage":' + to_json(self._usage_json()) + b"}\n\n" + DONE


class Body(Answer, ABC):
    """An answer as one JSON body, written when the last choice has ended."""

    def __init__(self, request: Request, prompts: Sequence[Prompt], outlet: Outlet, kind: str) -> None:
        super().__init__(request, prompts, outlet, kind)
        # What counts for LONGEST_ANSWER.
        self._length = 0
        self._finish_reasons: list[str | None] = [None] * request.sequences

    @abstractmethod
    def _choice(self, choice: int) -> dict[str, Any]:
        """A choice that has ended, as the body shows it."""

    def _gathered(self, choice: int, finish_reason: str | None) -> None:
        """What a `put` brought has been kept; `finish_reason` is what the client will read."""
        if self._length > LONGEST_ANSWER:
            self._outlet.refused(_TOO_LONG)
        elif finish_reason is None:
            self._outlet.progress()
        else:
            self._finish_reasons[choice] = finish_reason
            self._unfinished -= 1
            if not self._unfinished:
                self._outlet.ended(self._body(), self._completion_tokens, self._usage())

    def _body(self) -> bytes:
        choices = [self._choice(choice) for choice in range(len(self._finish_reasons))]
        return to_json(self._header | {"choices": choices, "usage": self._usage_json()})
