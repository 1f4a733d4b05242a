"""The router's request types are its own, so that it loads no vLLM. Here they are held against vLLM's."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest

from router.protocol import MAX_LOGIT_BIAS, MAX_STOP, MAX_STOP_TOKEN_IDS, ChatRequest
from router.unserved import UNSERVED_IN_CHAT
from serving.messages import Sampling

SCHEMA = ChatRequest.model_json_schema()["properties"]

OURS_ALONE = {"metadata"}
"""OpenAI's, which vLLM ignores."""

WITHOUT_EFFECT = {"priority", "request_id"}
"""They change no answer."""

NOT_OF_THIS_API = {
    *("watermarking", "length_penalty", "spaces_between_special_tokens", "truncation_side"),
    *("logprob_token_ids", "add_special_tokens", "media_io_kwargs", "mm_processor_kwargs", "mm_payload"),
    *("return_mm_kwargs", "session_id", "return_tokens_as_token_ids", "return_token_ids"),
    *("return_token_offsets", "return_prompt_text", "routed_experts_prompt_start", "cache_salt"),
    *("kv_transfer_params", "ec_transfer_params", "vllm_xargs", "repetition_detection", "stream_interval"),
    "thinking_token_budget",
}
"""vLLM's own extensions, ignored here as everything that the API does not know."""

REFUSED_BY_VLLM: list[tuple[str, Any]] = [("top_p", 0), ("repetition_penalty", -2), ("repetition_penalty", 0)]
"""Good values here that vLLM has no like of: its top_p starts above 0, and its repetition penalty is
multiplicative and positive. The engine translates both."""


@pytest.fixture(scope="module")
def vllm_protocol() -> Any:
    """The module of vLLM's chat completion types, whose import warns of torch's deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("vllm.entrypoints.openai.chat_completion.protocol")


def values(name: str) -> list[Any]:
    """What the document says is good for a parameter: its examples, its default and both ends."""
    schema = SCHEMA[name]
    bounds = [branch.get(end) for branch in schema["anyOf"] for end in ("minimum", "maximum")]
    return [*schema["examples"], schema["default"], *(bound for bound in bounds if bound is not None)]


TOGETHER: dict[str, dict[str, Any]] = {
    "stream_options": {"stream": True},
    "top_logprobs": {"logprobs": True},
    "tool_choice": {"tools": [{"type": "function", "function": {"name": "get_weather"}}]},
}
"""What some parameters need beside them."""

COMMON = [
    (name, value)
    for name in sorted(SCHEMA.keys() - OURS_ALONE - {"model", "messages"})
    for value in values(name)
]


def sampling_params(protocol: Any, **parameters: Any) -> Any:
    """What vLLM makes of a request, up to the parameters of its engine."""
    asked = protocol.ChatCompletionRequest(
        model="m", messages=[{"role": "user", "content": "hello"}], **parameters
    )
    limit = parameters.get("max_completion_tokens") or parameters.get("max_tokens") or 24
    return asked.to_sampling_params(max_tokens=limit, default_sampling_params={})


def test_every_parameter_of_vllm_is_decided_on(vllm_protocol: Any) -> None:
    """Each parameter that vLLM takes is served here, refused by name, or knowingly ignored; one that a new
    version adds fails this test until it is decided on."""
    theirs = set(vllm_protocol.ChatCompletionRequest.model_fields)
    decided = [SCHEMA.keys() - OURS_ALONE, UNSERVED_IN_CHAT.keys() & theirs, WITHOUT_EFFECT, NOT_OF_THIS_API]
    assert set().union(*decided) == theirs
    assert sum(map(len, decided)) == len(theirs)


@pytest.mark.parametrize(("name", "value"), [pair for pair in COMMON if pair not in REFUSED_BY_VLLM])
def test_what_is_good_here_is_good_for_vllm(vllm_protocol: Any, name: str, value: Any) -> None:
    """Every parameter that vLLM also has is of the same type and within its range."""
    sampling_params(vllm_protocol, **TOGETHER.get(name, {}), **{name: value})


@pytest.mark.parametrize(("name", "value"), REFUSED_BY_VLLM)
def test_what_vllm_has_no_like_of_is_known(vllm_protocol: Any, name: str, value: Any) -> None:
    """The few values that are good here alone are refused by vLLM: the engine has to translate them."""
    assert (name, value) in COMMON
    refusal = importlib.import_module("vllm.exceptions").VLLMValidationError
    with pytest.raises(refusal, match=name):
        sampling_params(vllm_protocol, **{name: value})


def test_defaults_are_vllms(vllm_protocol: Any) -> None:
    """A request that gives nothing is sampled as vLLM would, but for our additive penalty's neutral 0."""
    theirs = sampling_params(vllm_protocol)
    ours = Sampling(max_tokens=24)
    known = {name: name for name in Sampling.__struct_fields__} | {"repetition_factor": "repetition_penalty"}
    different = {
        name
        for name, theirs_name in known.items()
        if (getattr(ours, name) or None) != (_plain(getattr(theirs, theirs_name)) or None)
    }
    assert different == {"repetition_penalty"}


def _plain(value: Any) -> Any:
    """A list of vLLM's as a tuple of ours."""
    return tuple(value) if isinstance(value, list) else value


def test_limits_fit_vllms(vllm_protocol: Any) -> None:
    """What is let through fits the fixed arrays of vLLM's GPU runner, which fails when they run over, and
    leaves room for the model's own stop tokens."""
    runner = importlib.import_module("vllm.v1.worker.gpu.sample.logit_bias")
    assert runner.MAX_NUM_LOGIT_BIAS_TOKENS >= MAX_LOGIT_BIAS
    assert runner.MAX_NUM_STOP_TOKEN_IDS >= 2 * MAX_STOP_TOKEN_IDS
    sampling_params(vllm_protocol, stop=["x"] * MAX_STOP)
