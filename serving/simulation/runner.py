"""What vLLM's model runner would do, without a model: from a step of the scheduler to the step's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from vllm.config import ModelConfig
from vllm.sampling_params import SamplingParams
from vllm.tokenizers.registry import cached_tokenizer_from_config
from vllm.v1.core.sched.output import GrammarOutput, NewRequestData, SchedulerOutput
from vllm.v1.outputs import LogprobsLists, LogprobsTensors, ModelRunnerOutput

from serving.simulation.answers import Prose, Written
from serving.simulation.sampler import logprobs, permitted

CONSTRAINED = 16
"""Tokens after which prose that is bent to a grammar wants to end. It would go on in a string for ever."""

_CLOSING = ('"', "}", "]")
"""Tokens that bring JSON to its end. The lowest that is allowed often adds one more character to a string."""


class Runner:
    """Knows of each request its answer and the length of its prompt; the rest stands in each step.

    A token depends on its request and its position alone. So nothing is counted here, and a request that is
    preempted and computed again, or planned for the next step before this one's token is known (async
    scheduling), gets the tokens that it would have got alone.
    """

    def __init__(self, model: ModelConfig, answers: Sequence[str] | None) -> None:
        """Without written `answers` it says prose."""
        tokenizer: Any = cached_tokenizer_from_config(model)
        self._longest = model.max_model_len
        self._source = Prose(tokenizer, self._longest) if answers is None else Written(answers, tokenizer)
        self._eos: int = tokenizer.eos_token_id
        vocabulary = tokenizer.get_vocab()
        self._closing = [self._eos, *(vocabulary[piece] for piece in _CLOSING if piece in vocabulary)]
        self._vocabulary = model.get_vocab_size()
        self._answers: dict[str, tuple[Sequence[int], int]] = {}
        """The answer of each request, and the length of its prompt."""
        self._logprobs: dict[str, int] = {}
        """How many log-probs each request wants that wants any."""
        self._prompts: dict[str, tuple[list[int], int]] = {}
        """The prompts whose log-probs are wanted and still to come, and how many."""

    def update(self, step: SchedulerOutput) -> None:
        """Forget what is finished and keep what is new."""
        for request_id in step.finished_req_ids:
            self._answers.pop(request_id, None)
            self._logprobs.pop(request_id, None)
            self._prompts.pop(request_id, None)
        for new in step.scheduled_new_reqs:
            self._keep(new)

    def output(self, step: SchedulerOutput, grammar: GrammarOutput | None) -> ModelRunnerOutput:
        """The step's tokens, as the grammar of their request allows them, with log-probs where wanted."""
        request_ids, tokens = self._reached(step)
        places = dict(zip(request_ids, range(len(request_ids)), strict=True))
        if grammar is not None:
            self._bend(tokens, places, grammar)
        output = ModelRunnerOutput(request_ids, places, tokens)
        if self._logprobs:
            output.logprobs = self._logprobs_of(request_ids, tokens)
        if self._prompts:
            output.prompt_logprobs_dict = self._prompt_logprobs_of(request_ids, tokens)
        return output

    def _keep(self, new: NewRequestData) -> None:
        sampling = _sampling(new)
        longest = sampling.max_tokens or self._longest
        if sampling.structured_outputs is not None:
            longest = min(longest, CONSTRAINED)
        answer = self._source.answer(sampling.seed, longest)
        self._answers[new.req_id] = answer, new.prompt_len
        if sampling.num_logprobs is not None:
            self._logprobs[new.req_id] = self._width(sampling.num_logprobs)
        if sampling.prompt_logprobs is not None and new.prompt_token_ids is not None:
            self._prompts[new.req_id] = new.prompt_token_ids, self._width(sampling.prompt_logprobs)

    def _reached(self, step: SchedulerOutput) -> tuple[list[str], list[list[int]]]:
        """The requests of a step, each with its token; with none where a part of what it has is still to be
        computed after this step.

        Runs through every stream's every token, so nothing is called on the way.
        """
        answers, scheduled, eos = self._answers, step.num_scheduled_tokens, self._eos
        request_ids: list[str] = []
        tokens: list[list[int]] = []
        for new in step.scheduled_new_reqs:
            answer, prompt = answers[new.req_id]
            # vLLM's second model runner gets a resumed request as a new one, with its output so far.
            output = max(0, len(new.prefill_token_ids or ()) - prompt)
            at = new.num_computed_tokens + scheduled[new.req_id] - prompt
            request_ids.append(new.req_id)
            tokens.append([answer[at] if at < len(answer) else eos] if at >= output else [])
        cached = step.scheduled_cached_reqs
        for request_id, computed, output in zip(
            cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens, strict=True
        ):
            answer, prompt = answers[request_id]
            at = computed + scheduled[request_id] - prompt
            request_ids.append(request_id)
            tokens.append([answer[at] if at < len(answer) else eos] if at >= output else [])
        return request_ids, tokens

    def _bend(self, tokens: list[list[int]], places: dict[str, int], grammar: GrammarOutput) -> None:
        constrained = grammar.structured_output_request_ids
        for request_id, mask in zip(constrained, grammar.grammar_bitmask, strict=True):
            row = tokens[places[request_id]]
            row[:] = [permitted(token, mask, self._closing) for token in row]

    def _logprobs_of(self, request_ids: list[str], tokens: list[list[int]]) -> LogprobsLists | None:
        """As many for each request as the one that wants most; vLLM cuts the others'. A request without a
        token in this step has a row that nobody reads.
        """
        counts = [self._logprobs[request_id] for request_id in request_ids if request_id in self._logprobs]
        if not counts:
            return None
        chosen = np.array([row[0] if row else 0 for row in tokens])
        return LogprobsLists(*logprobs(chosen, max(counts), self._vocabulary))

    def _prompt_logprobs_of(
        self, request_ids: list[str], tokens: list[list[int]]
    ) -> dict[str, LogprobsTensors | None]:
        """Those of each request that wants them, with its first token."""
        found: dict[str, LogprobsTensors | None] = {}
        for request_id, row in zip(request_ids, tokens, strict=True):
            if row and request_id in self._prompts:
                prompt, count = self._prompts.pop(request_id)
                rows = logprobs(np.array(prompt[1:], np.int64), count, self._vocabulary)
                ids, likelihoods, ranks = map(torch.from_numpy, rows)
                found[request_id] = LogprobsTensors(ids, likelihoods, ranks)
        return found

    def _width(self, count: int) -> int:
        """How many log-probs a request means; -1 is one for each token that there is."""
        return self._vocabulary if count == -1 else count


def _sampling(request: NewRequestData) -> SamplingParams:
    assert request.sampling_params is not None  # noqa: S101 - only pooling has none, and is refused
    return request.sampling_params
