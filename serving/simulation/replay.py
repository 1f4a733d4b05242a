"""An executor for vLLM that replays written answers: everything of vLLM but the accelerator.

Scheduler, block manager, prefix cache, grammars, tokenizer and output path are vLLM's own, and what they do
(chunked prefill, preemption, prefix hits, stop strings, max_tokens) happens. There are no weights and no
worker process: a folder with a config.json and a tokenizer is model enough. What a model or its sampler would
do does not happen: temperature, penalties, biases and min_tokens change nothing.

It is chosen by vLLM's own arguments:

    engine_args:
      distributed_executor_backend: serving.simulation.replay.ReplayExecutor
      kv_cache_memory_bytes: 268435456
      additional_config: {replay: {answers: ["Paris.", "Lyon."]}}
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from functools import cached_property
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.tasks import SupportedTask
from vllm.tokenizers.registry import cached_tokenizer_from_config
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.core.sched.output import GrammarOutput, NewRequestData, SchedulerOutput
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, LogprobsLists, LogprobsTensors, ModelRunnerOutput

from serving.settings import Settings

_CLOSING = ('"', "}", "]")
"""Tokens that bring JSON to its end. The lowest that is allowed often adds one more character to a string."""

_T = TypeVar("_T")


class ReplaySettings(Settings):
    """What stands under `replay` in vLLM's `additional_config`."""

    answers: list[str] = Field(
        min_length=1,
        description="What is replayed: the seed of a request, modulo their number, is the place of its answer"
        " among them, from 0; without a seed it is the first.",
    )


class Answers:
    """Where tokens come from: written answers, in the model's own tokens, each ended by EOS."""

    def __init__(self, settings: ReplaySettings, tokenizer: Any) -> None:
        self.eos: int = tokenizer.eos_token_id
        self._answers: list[list[int]] = [
            tokenizer.encode(answer, add_special_tokens=False) for answer in settings.answers
        ]

    def token(self, sampling: SamplingParams, position: int) -> int:
        """The token at one position of a request's answer. After the answer's end all are EOS, of which only
        a request that ignores EOS sees more than one.
        """
        answer = self._answers[(sampling.seed or 0) % len(self._answers)]
        return answer[position] if position < len(answer) else self.eos


class ReplayExecutor(Executor):
    """Replays answers where another executor would run a model.

    The life of a step: the scheduler says how many tokens of which requests are to be computed.
    `execute_model` keeps what it says of new requests, forgets finished ones, and works out which output
    position each request has reached. `sample_tokens` asks the token source for the tokens at these
    positions, bends them to a grammar where a request has one, and adds log-probs where one wants them. The
    scheduler appends the tokens, ends what is finished, and plans the next step.

    A token depends on its request and its position alone. So nothing is counted here, and a request that is
    preempted and computed again, or planned for the next step before this one's token is known (async
    scheduling), gets the tokens that it would have got alone.
    """

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        return True

    def _init_executor(self) -> None:
        _refuse_what_is_not_modelled(self.vllm_config)
        tokenizer: Any = cached_tokenizer_from_config(self.model_config)
        settings: Any = self.vllm_config.additional_config
        self._source = Answers(ReplaySettings.model_validate(settings.get("replay", {})), tokenizer)
        self._closing = [self._source.eos, *_known(tokenizer, _CLOSING)]
        self._vocabulary = self.model_config.get_vocab_size()
        self._requests: dict[str, NewRequestData] = {}
        self._positions: dict[str, int | None] = {}

    def get_kv_cache_specs(self) -> list[dict[str, KVCacheSpec]]:
        model, cache = self.model_config, self.cache_config
        spec = FullAttentionSpec(
            block_size=cache.block_size,
            num_kv_heads=model.get_num_kv_heads(self.parallel_config),
            head_size=model.get_head_size(),
            dtype=kv_cache_dtype_str_to_dtype(cache.cache_dtype, model),
        )
        return [{f"layers.{layer}": spec for layer in range(model.get_num_layers(self.parallel_config))}]

    def get_supported_kv_cache_layouts(self) -> list[list[str]]:
        return [["LBNHC"]]

    def set_kv_cache_layout(self, layout_name: str) -> None:
        """Nothing is laid out."""

    def determine_available_memory(self) -> list[int]:
        size = self.cache_config.kv_cache_memory_bytes
        if size is None:
            raise ValueError(
                "kv_cache_memory_bytes: missing; there is no device whose memory could be measured"
            )
        return [size]

    def initialize_from_config(self, kv_cache_configs: list[KVCacheConfig]) -> None:
        """Blocks are counted, and no tensor stands behind them."""

    def compile_or_warm_up_model(self) -> None:
        """There is no model."""

    @cached_property
    def supported_tasks(self) -> tuple[SupportedTask, ...]:
        return ("generate",)

    # The flag may come by place or by name: the signature is vLLM's.
    def execute_model(self, scheduler_output: SchedulerOutput, non_block: bool = False) -> Any:  # noqa: FBT001, FBT002
        """None where `sample_tokens` is to follow, as vLLM has it."""
        for request_id in scheduler_output.finished_req_ids:
            self._requests.pop(request_id, None)
        self._requests |= {new.req_id: new for new in scheduler_output.scheduled_new_reqs}
        self._positions = dict(self._reached(scheduler_output))
        return _result(None if self._positions else EMPTY_MODEL_RUNNER_OUTPUT, non_block=non_block)

    def sample_tokens(self, grammar_output: GrammarOutput | None, non_block: bool = False) -> Any:  # noqa: FBT001, FBT002
        masks = _masks(grammar_output)
        tokens = [
            [] if position is None else [self._token(request_id, position, masks.get(request_id))]
            for request_id, position in self._positions.items()
        ]
        output = ModelRunnerOutput(
            req_ids=list(self._positions),
            req_id_to_index={request_id: index for index, request_id in enumerate(self._positions)},
            sampled_token_ids=tokens,
            logprobs=self._logprobs(tokens),
            prompt_logprobs_dict=dict(self._prompt_logprobs()),
        )
        return _result(output, non_block=non_block)

    def _reached(self, step: SchedulerOutput) -> Iterator[tuple[str, int | None]]:
        """Each request of a step with the output position of its token; None where a part of its tokens is
        still to be computed after this step.
        """
        for request_id, computed, known in self._progress(step):
            end = computed + step.num_scheduled_tokens[request_id]
            yield request_id, end - self._requests[request_id].prompt_len if end >= known else None

    def _progress(self, step: SchedulerOutput) -> Iterator[tuple[str, int, int]]:
        """Each request of a step: its tokens that were computed before, and all it has, prompt and output."""
        for new in step.scheduled_new_reqs:
            # vLLM's second model runner gets a resumed request as a new one, with its output so far.
            yield new.req_id, new.num_computed_tokens, max(new.prompt_len, len(new.prefill_token_ids or ()))
        cached = step.scheduled_cached_reqs
        for request_id, computed, output in zip(
            cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens, strict=True
        ):
            yield request_id, computed, self._requests[request_id].prompt_len + output

    def _token(self, request_id: str, position: int, mask: NDArray[np.int32] | None) -> int:
        token = self._source.token(_sampling(self._requests[request_id]), position)
        return token if mask is None else permitted(token, mask, self._closing)

    def _logprobs(self, tokens: list[list[int]]) -> LogprobsLists | None:
        """As many for each request as the one that wants most; vLLM cuts the others'. A request without a
        token in this step has a row that nobody reads.
        """
        wanted = [_sampling(self._requests[request_id]).num_logprobs for request_id in self._positions]
        counts = [self._width(count) for count in wanted if count is not None]
        if not counts:
            return None
        chosen = np.array([row[0] if row else 0 for row in tokens])
        return LogprobsLists(*logprobs(chosen, max(counts), self._vocabulary))

    def _prompt_logprobs(self) -> Iterator[tuple[str, LogprobsTensors]]:
        """Those of each request that wants them, with its first token."""
        for request_id, position in self._positions.items():
            request = self._requests[request_id]
            count = _sampling(request).prompt_logprobs
            if count is not None and position == 0 and request.prompt_token_ids is not None:
                tokens = np.array(request.prompt_token_ids[1:], np.int64)
                ids, likelihoods, ranks = map(
                    torch.from_numpy, logprobs(tokens, self._width(count), self._vocabulary)
                )
                yield request_id, LogprobsTensors(ids, likelihoods, ranks)

    def _width(self, count: int) -> int:
        """How many log-probs a request means; -1 is one for each token that there is."""
        return self._vocabulary if count == -1 else count

    def collective_rpc(self, method: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"collective_rpc: {method!r} is for workers, and a replay has none")

    def check_health(self) -> None:
        """What has no parts cannot lose one."""

    def shutdown(self) -> None:
        """Nothing is held."""


def permitted(token: int, mask: NDArray[np.int32], closing: list[int]) -> int:
    """The token, if a grammar allows it; else what ends the answer soonest, as far as one can tell: the first
    of `closing` that is allowed; else the allowed token with the lowest id.

    `mask` has a bit for each token of the vocabulary, the lowest first, in words of 32. Where it allows
    nothing the token stays, and the grammar refuses it, which ends this request alone.
    """
    for candidate in (token, *closing):
        if mask[candidate // 32] >> candidate % 32 & 1:
            return candidate
    words = np.flatnonzero(mask)
    if not words.size:
        return token
    word = int(mask[words[0]])
    return 32 * int(words[0]) + (word & -word).bit_length() - 1


def logprobs(
    tokens: NDArray[np.int64], count: int, vocabulary: int
) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int32]]:
    """Log-probs of a model that is rather sure: nine parts in ten for the token, nine in ten of the rest for
    the next id, and so on.

    Returns ids and log-probs [tokens, 1 + count], the token's own and then the `count` likeliest, the token
    among them; and the tokens' ranks [tokens], which are 1.
    """
    ranks = np.array([1, *range(1, count + 1)])
    ids = (tokens[:, None] + ranks - 1) % vocabulary
    likelihoods = np.tile(np.log(0.9) + (ranks - 1) * np.log(0.1), (len(tokens), 1))
    return ids.astype(np.int32), likelihoods.astype(np.float32), np.ones(len(tokens), np.int32)


def _masks(grammar: GrammarOutput | None) -> dict[str, NDArray[np.int32]]:
    if grammar is None:
        return {}
    return dict(zip(grammar.structured_output_request_ids, grammar.grammar_bitmask, strict=True))


def _sampling(request: NewRequestData) -> SamplingParams:
    assert request.sampling_params is not None  # noqa: S101 - only pooling has none, and is refused
    return request.sampling_params


def _known(tokenizer: Any, pieces: tuple[str, ...]) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[piece] for piece in pieces if piece in vocabulary]


def _result(value: _T, *, non_block: bool) -> _T | Future[_T]:
    if not non_block:
        return value
    future: Future[_T] = Future()
    future.set_result(value)
    return future


def _refuse_what_is_not_modelled(config: VllmConfig) -> None:
    model = config.model_config
    present = {
        "speculative decoding": config.speculative_config is not None,
        "pooling": model.runner_type != "generate",
        "layers with a state": model.has_inner_state,
        "latent attention": model.use_mla,
        "sliding windows": model.get_sliding_window() is not None,
    }
    if any(present.values()):
        found = ", ".join(name for name in present if present[name])
        raise ValueError(f"engine_args: the replay executor does not model {found}")
