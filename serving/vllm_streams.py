"""From vLLM's outputs to our sinks.

Import this module only through `serving.engines`, which sets the environment first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import structlog
from vllm.logprobs import LogprobsOnePosition
from vllm.outputs import PoolingRequestOutput, RequestOutput
from vllm.v1.engine import FinishReason as FinishedFor
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

from serving.engine import EngineDead, FinishReason, Logprob, Refusal, Sink, TokenLogprobs
from serving.messages import Request
from serving.vllm_texts import Decoder

log = structlog.get_logger(__name__)

_FINISH_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


class Stream:
    """One request in flight: where its output goes, until its last choice has ended or it is cancelled."""

    __slots__ = (
        *("_begun", "_cached_tokens", "_cancel", "_constrained_by", "_finished", "_request"),
        *("_tokenizer", "_unfinished", "closed", "sequences", "sink"),
    )

    def __init__(
        self,
        request: Request,
        sink: Sink,
        tokenizer: Any,
        *,
        constrained_by: str | None,
        finished: Callable[[str], object],
        cancel: Callable[[str], object],
    ) -> None:
        """`constrained_by` is the request's field that has a constraint put on its answers, if any.
        `finished` and `cancel` are called with the request's id: the one when its last choice has ended by
        itself, the other when it is given up."""
        self.closed = False
        """Once true, the sink hears nothing more."""
        self._request = request
        self.sink = sink
        self._tokenizer = tokenizer
        self._constrained_by = constrained_by
        self._finished = finished
        self._cancel = cancel
        self._unfinished = self.sequences = request.sequences
        # Prompts of which something was heard.
        self._begun: set[int] = set()
        self._cached_tokens = 0

    def put_output(self, choice: int, output: RequestOutput) -> None:
        """Pass on what one engine step made for one choice."""
        if self.begin(choice, output.num_cached_tokens or 0):
            self._prompt_logprobs(choice // self._request.sampling.n, output)
        completion = output.outputs[0]
        tokens = completion.token_ids
        logprobs = () if completion.logprobs is None else self._logprobs(tokens, completion.logprobs)
        if completion.finish_reason is None:
            self.sink.put(choice, completion.text, tokens, None, logprobs)
        else:
            self.end(choice, completion.text, tokens, completion.finish_reason, logprobs)

    def begin(self, choice: int, cached_tokens: int) -> bool:
        """Hear how many tokens of a choice's prompt were cached; whether that prompt had not begun yet."""
        prompt = choice // self._request.sampling.n
        if prompt in self._begun:
            return False
        self._begun.add(prompt)
        self._cached_tokens += cached_tokens
        self.sink.cached_tokens = self._cached_tokens
        return True

    def end(
        self,
        choice: int,
        text: str,
        tokens: Sequence[int],
        reason: str,
        logprobs: Sequence[TokenLogprobs] = (),
    ) -> None:
        """Pass on the last that there is of a choice, or that it failed."""
        if reason not in _FINISH_REASONS:
            self.fail(self._failure(reason))
            return
        self.sink.put(choice, text, tokens, _FINISH_REASONS[reason], logprobs)
        self._unfinished -= 1
        if not self._unfinished:
            self.closed = True
            self._finished(self._request.id)

    def fail(self, error: Exception) -> None:
        """Give up on all choices and tell the sink, once."""
        if not self.closed:
            self._cancel(self._request.id)
            self.sink.fail(error)

    def _failure(self, reason: str) -> Exception:
        param = self._constrained_by
        if reason == "error" and param is not None:
            return Refusal(f"{param}: an answer came to where nothing can follow by its schema", param=param)
        return RuntimeError(f"the engine ended a choice with {reason!r}")

    def _prompt_logprobs(self, prompt: int, output: RequestOutput) -> None:
        logprobs, tokens = output.prompt_logprobs, output.prompt_token_ids
        if logprobs and tokens:
            first = self._tokenizer.decode(tokens[:1])
            self.sink.prompt_logprobs(prompt, first, self._logprobs(tokens[1:], logprobs[1:]))

    def _logprobs(self, tokens: Sequence[int], positions: Sequence[Any]) -> list[TokenLogprobs]:
        likeliest = self._request.logprobs or 0
        return [
            token_logprobs(token, position, likeliest)
            for token, position in zip(tokens, positions, strict=True)
        ]


class Choice:
    """The queue of one choice's request, as vLLM's outputs are put into it: see `vllm_outputs`."""

    __slots__ = ("_index", "_stream", "decoder")

    def __init__(self, stream: Stream, index: int) -> None:
        self.decoder: Decoder | FastIncrementalDetokenizer | None = None
        self._stream = stream
        self._index = index

    def put(self, output: RequestOutput | PoolingRequestOutput | Exception) -> None:
        """Called by vLLM on the event loop. An exception from here would end the output of every request."""
        if self._stream.closed:
            return
        try:
            if isinstance(output, RequestOutput):
                self._stream.put_output(self._index, output)
            else:
                self._stream.fail(EngineDead("the engine has died"))
        except Exception as error:
            log.exception("a sink failed")
            self._stream.fail(error)

    def begin(self, cached_tokens: int) -> None:
        """The first tokens come next, the shorter way."""
        if not self._stream.closed:
            self._stream.begin(self._index, cached_tokens)

    def put_tokens(self, token_ids: list[int]) -> None:
        """The same as `put` for tokens in mid-answer, which come the shorter way."""
        stream, decoder = self._stream, self.decoder
        if stream.closed or decoder is None:
            return
        try:
            if len(token_ids) == 1:
                text = decoder.decode_next(token_ids[0])
            else:
                text = "".join(map(decoder.decode_next, token_ids))
            stream.sink.put(self._index, text, token_ids, None)
        except Exception as error:
            log.exception("a sink failed")
            stream.fail(error)

    def end(self, token_ids: list[int], reason: FinishedFor) -> None:
        """The same for the last tokens. The token that stopped the answer is not part of its text."""
        stream, decoder = self._stream, self.decoder
        if stream.closed or decoder is None:
            return
        try:
            spoken = token_ids[:-1] if reason is FinishedFor.STOP else token_ids
            stream.end(self._index, "".join(map(decoder.decode_next, spoken)), token_ids, str(reason))
        except Exception as error:
            log.exception("a sink failed")
            stream.fail(error)


def token_logprobs(token: int, position: LogprobsOnePosition, likeliest: int) -> TokenLogprobs:
    """What vLLM tells of one place, where it has the chosen token first and then the likeliest by rank, the
    chosen one not again."""
    told = {
        candidate: Logprob(logprob.decoded_token or "", logprob.logprob)
        for candidate, logprob in position.items()
    }
    ranked = sorted(told.values(), key=lambda logprob: logprob.logprob, reverse=True)
    return TokenLogprobs(told[token], ranked[:likeliest])
