"""From vLLM's outputs to our sinks.

Import this module only through `serving.engines`, which sets the environment first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import structlog
from vllm.logprobs import LogprobsOnePosition
from vllm.outputs import PoolingRequestOutput, RequestOutput
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer

from serving.engine import EngineDead, FinishReason, Logprob, Refusal, Sink, TokenLogprobs
from serving.messages import Request

log = structlog.get_logger(__name__)

_FINISH_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


class Stream:
    """One request in flight: where its output goes, until its last choice has ended or it is cancelled."""

    __slots__ = (
        *("_begun", "_cached_tokens", "_cancel", "_constrained_by", "_finished", "_request"),
        *("_tokenizer", "_unfinished", "closed", "sink"),
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
        self._unfinished = request.sequences
        # Prompts of which something was heard.
        self._begun: set[int] = set()
        self._cached_tokens = 0

    def put(self, choice: int, output: RequestOutput) -> None:
        """Pass on what one engine step made for one choice."""
        prompt = choice // self._request.sampling.n
        if prompt not in self._begun:
            self._begin(prompt, output)
        completion = output.outputs[0]
        reason = completion.finish_reason
        if reason is not None and reason not in _FINISH_REASONS:
            self.fail(self._failure(reason))
            return
        tokens = completion.token_ids
        logprobs = () if completion.logprobs is None else self._logprobs(tokens, completion.logprobs)
        if reason is None:
            self.sink.put(choice, completion.text, tokens, None, logprobs)
            return
        self.sink.put(choice, completion.text, tokens, _FINISH_REASONS[reason], logprobs)
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

    def _begin(self, prompt: int, output: RequestOutput) -> None:
        self._begun.add(prompt)
        self._cached_tokens += output.num_cached_tokens or 0
        self.sink.cached_tokens = self._cached_tokens
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
        self.decoder: FastIncrementalDetokenizer | None = None
        self._stream = stream
        self._index = index

    def put(self, output: RequestOutput | PoolingRequestOutput | Exception) -> None:
        """Called by vLLM on the event loop. An exception from here would end the output of every request."""
        if self._stream.closed:
            return
        try:
            if isinstance(output, RequestOutput):
                self._stream.put(self._index, output)
            else:
                self._stream.fail(EngineDead("the engine has died"))
        except Exception as error:
            log.exception("a sink failed")
            self._stream.fail(error)

    def put_tokens(self, token_ids: list[int]) -> None:
        """The same for tokens in mid-answer, once there is a decoder."""
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


def token_logprobs(token: int, position: LogprobsOnePosition, likeliest: int) -> TokenLogprobs:
    """What vLLM tells of one place, where it has the chosen token first and then the likeliest by rank, the
    chosen one not again."""
    told = {
        candidate: Logprob(logprob.decoded_token or "", logprob.logprob)
        for candidate, logprob in position.items()
    }
    ranked = sorted(told.values(), key=lambda logprob: logprob.logprob, reverse=True)
    return TokenLogprobs(told[token], ranked[:likeliest])
