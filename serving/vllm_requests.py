"""From our words to vLLM's and back: sampling, seeds, refusals.

Import this module only through `serving.engines`, which sets the environment first.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from copy import copy
from functools import lru_cache
from itertools import count
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec
from msgspec.structs import replace
from vllm.exceptions import VLLMClientError, VLLMValidationError
from vllm.inputs import EngineInput, tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.tasks import SupportedTask
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor

from serving.engine import Refusal
from serving.messages import Request, Sampling, Text
from serving.penalties import PENALTY

COUNTED_CONTEXTS = 4
"""Prompts of up to this many context lengths are counted exactly before they are refused; a longer one is
refused as that long at least, and one of very many characters without its tokens being counted at all."""

LEAST_TEMPERATURE = 0.01
"""vLLM raises a lower one to this, with a warning in its log for each request; so it is raised before."""

INSTEAD_OF_MINUS_ONE = (1 << 62) | (1 << 31)
"""vLLM reads the seed -1 as none. This one stands in: no request reaches both by counting up its choices,
nor do they meet where an engine looks at the low 32 bits only."""

KNOWN_SAMPLINGS = 1024
"""Different sampling parameters that are kept."""

LONGEST_KNOWN = 1024
"""Bytes of sampling parameters that are kept: clients may send long stop strings, and many biases."""

to_msgpack = msgspec.msgpack.Encoder().encode
from_msgpack = msgspec.msgpack.Decoder(Sampling).decode

_SAMPLING_FIELDS = frozenset(Sampling.__struct_fields__)


class Rendered(NamedTuple):
    """What vLLM gets of a prompt, and what rendering it has settled."""

    input: EngineInput
    sampling: Mapping[str, Any] = MappingProxyType({})
    """Of vLLM's sampling parameters."""
    reasoning: Mapping[str, Any] = MappingProxyType({})
    """Of vLLM's engine request: how the engine finds where the reasoning ends and a constraint begins."""
    constrained_by: str | None = None
    """The field of the request that has a constraint put on the answer."""


def _sampling_params(sampling: Sampling, **others: Any) -> SamplingParams:
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


class Requests:
    """Makes engine requests for one engine.

    What vLLM checks and works out for sampling parameters it does here once for equal ones: most requests of
    a client have the same.
    """

    def __init__(self, processor: InputProcessor, tasks: tuple[SupportedTask, ...]) -> None:
        self._processor = processor
        self._tasks = tasks
        self._numbers = count()
        self._like = lru_cache(KNOWN_SAMPLINGS)(self._checked)

    def choices(self, request: Request, prompt: Rendered, sampling: Sampling) -> Iterator[EngineCoreRequest]:
        """One for each choice of one prompt; vLLM's own fan-out refuses temperature 0, and its seeds do not
        wrap. `sampling` is the request's, fitted to the prompt. Raises VLLMClientError.
        """
        asked = self._asked(request, prompt, sampling)
        for choice in range(sampling.n):
            child = copy(asked)
            child.external_req_id = request.id
            # Short, as it travels with every token, and never the same: a request that is tried again comes
            # with its first try's id.
            child.request_id = str(next(self._numbers))
            if sampling.seed is not None:
                child.sampling_params = _seeded(asked.sampling_params, sampling.choice_seed(choice))
            yield child

    def _asked(self, request: Request, prompt: Rendered, sampling: Sampling) -> EngineCoreRequest:
        unseeded = sampling if sampling.seed is None else replace(sampling, seed=None)
        if request.logprobs is not None or prompt.sampling or prompt.reasoning:
            params = _sampling_params(unseeded, **_logprobs(request), **prompt.sampling)
            asked = self._process(prompt.input, params)
            for name, value in prompt.reasoning.items():
                setattr(asked, name, value)
            return asked
        known = to_msgpack(unseeded)
        asked = copy((self._like if len(known) <= LONGEST_KNOWN else self._checked)(known))
        content: Any = prompt.input
        asked.prompt_token_ids = content["prompt_token_ids"]
        asked.arrival_time = content.get("arrival_time") or time.time()
        return asked

    def _checked(self, sampling: bytes) -> EngineCoreRequest:
        """A request with this sampling, in MessagePack, and another prompt than the one that it is going to
        have: what is asked of a prompt has been seen to."""
        return self._process(tokens_input([0]), _sampling_params(from_msgpack(sampling)))

    def _process(self, prompt: EngineInput, params: SamplingParams) -> EngineCoreRequest:
        return self._processor.process_inputs("", prompt, params, supported_tasks=self._tasks)


def without_stop(request: EngineCoreRequest) -> EngineCoreRequest:
    """What the engine core is sent of a request. It does not look for stop strings, the detokenizer does; and
    there is one request for each choice."""
    if request.sampling_params is None or not request.sampling_params.stop:
        return request
    sent = copy(request)
    sent.sampling_params = copy(request.sampling_params)
    sent.sampling_params.stop = []
    return sent


def _logprobs(request: Request) -> dict[str, Any]:
    echoed = isinstance(request, Text) and request.echo
    return {"logprobs": request.logprobs, "prompt_logprobs": request.logprobs if echoed else None}


def _seeded(params: SamplingParams | None, seed: int | None) -> SamplingParams:
    assert params is not None  # noqa: S101 - it was made from sampling parameters
    seeded = copy(params)
    seeded.seed = INSTEAD_OF_MINUS_ONE if seed == -1 else seed
    return seeded


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
