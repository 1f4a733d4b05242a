"""Text completions. Choice i belongs to prompt i // n.

A request for no tokens gets its prompt echoed, or nothing, with the prompt's usage and logprobs. The engine
cannot do with less than one token: it is dropped here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serving.answers import CHARACTER, LONGEST_ANSWER, Answer, Body, EventStream, Outlet, to_json
from serving.engine import FinishReason, Prompt, Refusal, TokenLogprobs
from serving.logprobs import TextLogprobs
from serving.messages import Text


class TextAnswer(Answer):
    """What the two forms of a text completion have in common: what stands before and beside its texts."""

    def __init__(self, request: Text, prompts: Sequence[Prompt], outlet: Outlet) -> None:
        super().__init__(request, prompts, outlet, "text_completion")
        self._n = request.sampling.n
        self._silent = not request.sampling.max_tokens
        self._echoes = [prompt.text or "" for prompt in prompts for _ in range(self._n)]
        self._logprobs = [TextLogprobs() for _ in self._echoes]
        # What is echoed is held and sent all at once, so that streams have a bound too.
        self._length = sum(map(len, self._echoes))
        if self._length > LONGEST_ANSWER:
            raise _echo_too_long()

    def prompt_logprobs(self, prompt: int, first: str, logprobs: Sequence[TokenLogprobs]) -> None:
        told = TextLogprobs()
        size = told.begin(first) + told.add(logprobs)
        self._logprobs[prompt * self._n : (prompt + 1) * self._n] = [told.copy() for _ in range(self._n)]
        self._length += self._n * size // CHARACTER
        if self._length > LONGEST_ANSWER:
            self._outlet.refused(_echo_too_long())


class TextStream(TextAnswer, EventStream):
    """A sink that writes an event for each `put` that has text, its choice's echo included, or that ends its
    choice. Logprobs of tokens whose text is held back ride with the next event."""

    def put(
        self,
        choice: int,
        text: str,
        token_ids: Sequence[int],
        finish_reason: FinishReason | None,
        logprobs: Sequence[TokenLogprobs] = (),
    ) -> None:
        if self._silent:
            text, token_ids, logprobs = "", (), ()
            finish_reason = finish_reason and "length"
        self._completion_tokens += len(token_ids)
        self._held_tokens += len(token_ids)
        self._logprobs[choice].add(logprobs)
        if self._echoes[choice]:
            text = self._echoes[choice] + text
            self._echoes[choice] = ""
        ends = finish_reason is not None
        self._send(self._event(choice, text, finish_reason) if text or ends else b"", ends=ends)

    def _event(self, choice: int, text: str, finish_reason: FinishReason | None) -> bytes:
        logprobs = self._logprobs[choice]
        entry = {
            "index": choice,
            "text": text,
            "logprobs": logprobs.take() if logprobs else None,
            "finish_reason": finish_reason,
        }
        return self._head + to_json(entry) + self._tail


class TextBody(TextAnswer, Body):
    """A sink that gathers the choices' texts, each after its echo."""

    def __init__(self, request: Text, prompts: Sequence[Prompt], outlet: Outlet) -> None:
        super().__init__(request, prompts, outlet)
        self._texts = [[echo] for echo in self._echoes]
        self._with_logprobs = request.logprobs is not None

    def put(
        self,
        choice: int,
        text: str,
        token_ids: Sequence[int],
        finish_reason: FinishReason | None,
        logprobs: Sequence[TokenLogprobs] = (),
    ) -> None:
        if self._silent:
            text, token_ids, logprobs = "", (), ()
            finish_reason = finish_reason and "length"
        self._completion_tokens += len(token_ids)
        self._length += len(text) + self._logprobs[choice].add(logprobs) // CHARACTER
        self._texts[choice].append(text)
        self._gathered(choice, finish_reason)

    def _choice(self, choice: int) -> dict[str, Any]:
        return {
            "index": choice,
            "text": "".join(self._texts[choice]),
            "logprobs": self._logprobs[choice].take() if self._with_logprobs else None,
            "finish_reason": self._finish_reasons[choice],
        }


def _echo_too_long() -> Refusal:
    return Refusal(
        f"echo: the prompts, n times each and with logprobs, have more than {LONGEST_ANSWER} characters",
        param="echo",
        code="answer_too_long",
    )
