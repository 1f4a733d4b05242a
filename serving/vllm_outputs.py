"""From the engine core's outputs to the queues of their requests: vLLM's way, with a shorter one for most.

Most outputs are one token in the middle of an answer of which nothing but the text is wanted. vLLM builds two
objects for each, and looks for what such a token cannot bring: a stop string, log-probs, an end. Here it is
decoded and handed over. First and last tokens, and requests that want more, go vLLM's way.

Import this module only through `serving.engines`, which sets the environment first.
"""

from __future__ import annotations

from typing import Any, Protocol

from vllm import envs
from vllm.outputs import PoolingRequestOutput, RequestOutput
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer
from vllm.v1.engine.output_processor import OutputProcessor, OutputProcessorOutput, RequestState
from vllm.v1.metrics.stats import IterationStats


class Queue(Protocol):
    """Where a request's outputs go."""

    decoder: FastIncrementalDetokenizer | None
    """Set once the rest of the answer, but for its last token, is to be put by `put_tokens`."""

    def put(self, output: RequestOutput | PoolingRequestOutput | Exception) -> None:
        """Take what came vLLM's way. Never raises."""

    def put_tokens(self, token_ids: list[int]) -> None:
        """Take tokens that came the shorter way. Never raises."""


class Llm(AsyncLLM):
    """vLLM's engine, with `Outputs` in the place of its output processor."""

    def _run_output_handler(self) -> None:
        # vLLM's constructor calls this last, and the task that it makes keeps the processor that it finds.
        if self.output_handler is None:
            self.output_processor.__class__ = Outputs  # it has no state of its own
        super()._run_output_handler()  # type: ignore[no-untyped-call]


class Outputs(OutputProcessor):
    """vLLM's output processor for requests whose queue is a `Queue`."""

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
        processed = super().process_outputs(others, engine_core_timestamp, iteration_stats, weight_version)
        for output in others:
            state = self.request_states.get(output.request_id)
            if state is not None and _is_plain(state):
                queue: Any = state.queue
                queue.decoder = state.detokenizer
        return processed

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
            if queue.decoder is None or output.finish_reason is not None or output.events is not None:
                others.append(output)
                continue
            tokens = output.new_token_ids
            stats = state.stats
            stats.num_generation_tokens += len(tokens)
            step.num_generation_tokens += len(tokens)
            latencies.append(now - stats.last_token_ts)
            stats.last_token_ts = now
            queue.put_tokens(tokens)
        return others


def _is_plain(state: RequestState) -> bool:
    """Whether the request wants nothing but text, and its next tokens' text can be told token by token."""
    detokenizer = state.detokenizer
    logprobs = state.logprobs_processor
    return (
        isinstance(detokenizer, FastIncrementalDetokenizer)
        and not detokenizer.stop
        and (logprobs is None or logprobs.num_logprobs is None)
        and state.stream_interval == 1
        and not state.streaming_input
        and not envs.VLLM_COMPUTE_NANS_IN_LOGITS
    )
