"""From our words to vLLM's and back: sampling, seeds, refusals.

Import this module only through `serving.engines`, which sets the environment first.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from vllm.exceptions import VLLMClientError, VLLMValidationError
from vllm.inputs import EngineInput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor

from serving.engine import Refusal
from serving.messages import Sampling
from serving.penalties import PENALTY

COUNTED_CONTEXTS = 4
"""Prompts of up to this many context lengths are counted exactly before they are refused; a longer one is
refused as that long at least, and one of very many characters without its tokens being counted at all."""

LEAST_TEMPERATURE = 0.01
"""vLLM raises a lower one to this, with a warning in its log for each request; so it is raised before."""

INSTEAD_OF_MINUS_ONE = (1 << 62) | (1 << 31)
"""vLLM reads the seed -1 as none. This one stands in: no request reaches both by counting up its choices,
nor do they meet where an engine looks at the low 32 bits only."""

_SAMPLING_FIELDS = frozenset(Sampling.__struct_fields__)


@dataclass(frozen=True, slots=True)
class Rendered:
    """What vLLM gets of a prompt, and what rendering it has settled."""

    input: EngineInput
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Of vLLM's sampling parameters."""
    reasoning: Mapping[str, Any] = field(default_factory=dict)
    """Of vLLM's engine request: how the engine finds where the reasoning ends and a constraint begins."""
    constrained_by: str | None = None
    """The field of the request that has a constraint put on the answer."""


def sampling_params(sampling: Sampling, **others: Any) -> SamplingParams:
    """The same for vLLM, but for the seed, which differs from choice to choice; and `others`, which are
    vLLM's own."""
    likeliest_only = sampling.top_p == 0
    temperature = sampling.temperature
    penalty = sampling.repetition_penalty
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=max(temperature, LEAST_TEMPERATURE) if temperature else 0.0,
        # vLLM has no top_p of 0. It leaves the likeliest token alone, and so does a top_k of 1.
        top_p=1.0 if likeliest_only else sampling.top_p,
        top_k=1 if likeliest_only else sampling.top_k,
        min_p=sampling.min_p,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        repetition_penalty=sampling.repetition_factor,
        logit_bias=sampling.logit_bias or None,
        stop=list(sampling.stop),
        stop_token_ids=list(sampling.stop_token_ids),
        min_tokens=sampling.min_tokens,
        ignore_eos=sampling.ignore_eos,
        extra_args={PENALTY: penalty} if penalty else None,
        output_kind=RequestOutputKind.DELTA,
        skip_clone=True,  # nobody else holds it
        **others,
    )


def choice_request(request: EngineCoreRequest, sampling: Sampling, choice: int) -> EngineCoreRequest:
    """The engine request of one choice, with an id and a seed of its own."""
    seed = sampling.choice_seed(choice)
    params = copy(request.sampling_params)
    assert params is not None  # noqa: S101 - it was made from sampling parameters
    params.seed = INSTEAD_OF_MINUS_ONE if seed == -1 else seed
    child = copy(request)
    child.sampling_params = params
    InputProcessor.assign_request_id(child)
    return child


def sampling_refusal(error: VLLMClientError, otherwise: str | None = None) -> Refusal:
    """What vLLM has against a request, in its words, naming the parameter where it is known, or the one that
    it must be `otherwise`."""
    message = str(error.args[0])
    first_word = message.partition(" ")[0]
    param = getattr(error, "parameter", None) or (first_word if first_word in _SAMPLING_FIELDS else None)
    if param is None and otherwise is not None:
        return Refusal(f"{otherwise}: {message}", param=otherwise)
    return Refusal(message, param=param)


def prompt_refusal(error: VLLMValidationError, context_length: int, param: str) -> Refusal:
    """What vLLM has against a prompt, which comes from the field `param`: its length, or what the chat
    template or the vocabulary says.
    """
    if error.parameter not in {"input_text", "input_tokens"}:
        said = "the model's chat template refuses them: " if param == "messages" else ""
        return Refusal(f"{param}: {said}{error.args[0]}", param=param)
    return Refusal(
        f"{param}: the prompt has more than {COUNTED_CONTEXTS * context_length} tokens, and with at least"
        f" one token of answer it must fit the model's context of {context_length} tokens",
        param=param,
        code="context_length_exceeded",
    )
