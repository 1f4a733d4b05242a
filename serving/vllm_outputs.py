"""From the engine core's outputs to the queues of their requests: vLLM's way, with a shorter one for most.

Of most requests nothing but the text is wanted. vLLM builds two objects for each of their outputs, and looks
for what such a one cannot bring: a stop string, log-probs. Here its tokens are decoded and handed over, and
counted as vLLM counts them. Requests that want more go vLLM's way.

Import this module only through `serving.engines`, which sets the environment first.
"""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any, Protocol

from tokenizers.decoders import DecodeStream
from vllm import envs
from vllm.outputs import PoolingRequestOutput, RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer
from vllm.v1.engine.output_processor import OutputProcessor, OutputProcessorOutput, RequestState
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.metrics.stats import IterationStats, RequestStateStats

from serving.vllm_texts import Decoder, Texts

KNOWN_SAMPLINGS = 1024
"""Sampling parameters for which what follows from them is kept."""


class Queue(Protocol):
    """Where a request's outputs go."""

    decoder: Decoder | FastIncrementalDetokenizer | None
    """Set for a request whose outputs go the shorter way."""

    def put(self, output: RequestOutput | PoolingRequestOutput | Exception) -> None:
        """Take what came vLLM's way. Never raises."""

    def begin(self, cached_tokens: int) -> None:
        """Hear, before any tokens, how many of the prompt's the prefix cache held. Never raises."""

    def put_tokens(self, token_ids: list[int]) -> None:
        """Take tokens that came the shorter way. Never raises."""

    def end(self, token_ids: list[int], reason: FinishReason) -> None:
        """Take the last tokens that came the shorter way. Never raises."""


class Llm(AsyncLLM):
    """vLLM's engine, with `Outputs` in the place of its output processor."""

    def _run_output_handler(self) -> None:
        # vLLM's constructor calls this last, and the task that it makes keeps the processor that it finds.
        if self.output_handler is None:
            self.output_processor.__class__ = Outputs  # it has no state of its own
        super()._run_output_handler()  # type: ignore[no-untyped-call]


class Outputs(OutputProcessor):
    """vLLM's output processor for requests whose queue is a `Queue`."""

    @cached_property
    def _texts(self) -> Texts | None:
        tokenizer: Any = self.tokenizer
        return Texts.of(tokenizer._tokenizer)  # noqa: SLF001 - as vLLM's detokenizer takes it

    @cached_property
    def _likes(self) -> dict[int, tuple[SamplingParams, dict[str, Any]]]:
        """For sampling parameters that have been seen before, what vLLM has worked out from them."""
        return {}

    def add_request(
        self,
        request: EngineCoreRequest,
        prompt: str | None,
        parent_req: ParentRequest | None = None,
        request_index: int = 0,
        queue: Any = None,
    ) -> None:
        """As vLLM's; `prompt` is the text that the prompt's tokens were made of, if they were."""
        params, texts = request.sampling_params, self._texts
        if prompt is not None and texts is not None and (like := self._likes.get(id(params))) is not None:
            self._add(_state(like[1], request, prompt, queue))
            queue.decoder = Decoder(texts, partial(_detokenizer, self.tokenizer, request), whole=True)
            return
        super().add_request(request, prompt, parent_req, request_index, queue)
        state: Any = self.request_states[request.request_id]
        if self.tracing_enabled or not _is_plain(state):
            return
        queue.decoder = detokenizer = state.detokenizer
        if texts is None:
            return
        if prompt is not None:
            detokenizer.stream = _stream(detokenizer)
        if detokenizer.spaces_between_special_tokens:
            queue.decoder = Decoder(texts, lambda: detokenizer, whole=prompt is not None)
            if params is not None and state.stats == RequestStateStats(arrival_time=request.arrival_time):
                self._remember(params, state)

    def _remember(self, params: SamplingParams, state: RequestState) -> None:
        if len(self._likes) >= KNOWN_SAMPLINGS:
            self._likes.clear()
        self._likes[id(params)] = params, vars(state).copy()

    def _add(self, state: RequestState) -> None:
        self.request_states[state.request_id] = state
        self.external_req_ids[state.external_req_id].append(state.request_id)
        self._update_admission_stats()

    def process_outputs(
        self,
        engine_core_outputs: list[EngineCoreOutput],
        engine_core_timestamp: float | None = None,
        iteration_stats: IterationStats | None = None,
        weight_version: str | None = None,
    ) -> OutputProcessorOutput:
        # Statistics are always kept, as the load is told by one who listens to them.
        assert engine_core_timestamp is not None  # noqa: S101
        assert iteration_stats is not None  # noqa: S101
        others = self._put_tokens(engine_core_outputs, engine_core_timestamp, iteration_stats)
        if not others:
            return OutputProcessorOutput([], [])
        return super().process_outputs(others, engine_core_timestamp, iteration_stats, weight_version)

    def _put_tokens(
        self, outputs: list[EngineCoreOutput], now: float, step: IterationStats
    ) -> list[EngineCoreOutput]:
        """Hand over what can go the shorter way, and count it as vLLM would; returns the others."""
        states: dict[str, Any] = self.request_states  # queues are ours, and statistics are kept
        others = []
        latencies = step.inter_token_latencies_iter
        for output in outputs:
            state = states.get(output.request_id)
            if state is None:
                continue  # it was aborted
            queue = state.queue
            if queue.decoder is None:
                others.append(output)
                continue
            if state.is_prefilling or output.finish_reason is not None or output.events is not None:
                self._put_more(state, output, now, step)
                continue
            tokens = output.new_token_ids
            stats = state.stats
            stats.num_generation_tokens += len(tokens)
            step.num_generation_tokens += len(tokens)
            latencies.append(now - stats.last_token_ts)
            stats.last_token_ts = now
            queue.put_tokens(tokens)
        return others

    def _put_more(self, state: Any, output: EngineCoreOutput, now: float, step: IterationStats) -> None:
        """The same for an output that is the first or the last of its request, or tells more of it."""
        self._update_stats_from_output(state, output, now, step)
        if state.is_prefilling:
            state.is_prefilling = False
            if output.prefill_stats is not None:
                state.num_cached_tokens = output.prefill_stats.num_cached_tokens
            state.queue.begin(state.num_cached_tokens)
        reason = output.finish_reason
        if reason is None:
            state.queue.put_tokens(output.new_token_ids)
            return
        state.queue.end(output.new_token_ids, reason)
        self._finish_request(state)
        self._update_stats_from_finished(state, reason, step)


def _state(like: dict[str, Any], request: EngineCoreRequest, prompt: str, queue: Any) -> RequestState:
    """What vLLM keeps of a plain request, made of what it has kept of another one with the same sampling."""
    tokens: Any = request.prompt_token_ids
    state = RequestState.__new__(RequestState)
    vars(state).update(
        like,
        request_id=request.request_id,
        external_req_id=request.external_req_id,
        prompt=prompt,
        prompt_token_ids=tokens,
        prompt_len=len(tokens),
        queue=queue,
        stats=RequestStateStats(arrival_time=request.arrival_time),
    )
    return state


def _detokenizer(tokenizer: Any, request: EngineCoreRequest) -> FastIncrementalDetokenizer:
    """What tells an answer's tokens after a text."""
    detokenizer = FastIncrementalDetokenizer(tokenizer, request)
    detokenizer.stream = _stream(detokenizer)
    return detokenizer


def _stream(detokenizer: FastIncrementalDetokenizer) -> DecodeStream:
    """Where a text has ended with a whole character, nothing hangs on it. So the prompt need not be decoded,
    which vLLM does twice."""
    return DecodeStream(skip_special_tokens=detokenizer.skip_special_tokens)


def _is_plain(state: RequestState) -> bool:
    """Whether the request wants nothing but text, and each token's text can be told by itself."""
    detokenizer = state.detokenizer
    logprobs = state.logprobs_processor
    return (
        isinstance(detokenizer, FastIncrementalDetokenizer)
        and not detokenizer.stop
        and logprobs is not None
        and logprobs.num_logprobs is None
        and logprobs.num_prompt_logprobs is None
        and state.stream_interval == 1
        and not state.streaming_input
        # Told by a KV connector, it takes the place of what the prefix cache held.
        and state.remote_prefill_cached_tokens is None
        and not envs.VLLM_COMPUTE_NANS_IN_LOGITS
    )
