"""Both ways from the engine core's outputs to a sink, beside each other: vLLM's own, and the shorter one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreRequest,
    FinishReason,
)
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.stats import IterationStats, PrefillStats

from serving.engine import TokenLogprobs
from serving.source import resolve
from serving.vllm_outputs import Outputs
from serving.vllm_streams import Choice, Stream
from tests.serving.asking import chat, greedy
from tests.serving.replayed import SMOLLM2

CHOICES = 2
NOW = 1000.0

PROMPTS = {
    "a text": ("The way é", None),
    "a text of special tokens": ("<|im_start|>", None),
    "tokens, the last the first of a character's": ("The 🚂", -1),
}
"""A text, and up to where its tokens are the prompt; None: they are all of it, and known to be a text's."""


@cache
def tokenizer() -> Any:
    """SmolLM2's."""
    return AutoTokenizer.from_pretrained(resolve(SMOLLM2, print))


def ids(text: str) -> list[int]:
    """Its tokens."""
    tokens: list[int] = tokenizer()(text)["input_ids"]
    return tokens


# Special ones, parts of characters, words, any.
tokens = st.deferred(
    lambda: st.sampled_from([0, 1, 2, *ids("🚂é rail way")]) | st.integers(0, len(tokenizer()) - 1)
)

PREEMPTED = [EngineCoreEvent(EngineCoreEventType.PREEMPTED, 3.0)]
SCHEDULED = [
    EngineCoreEvent(EngineCoreEventType.QUEUED, 1.0),
    EngineCoreEvent(EngineCoreEventType.SCHEDULED, 2.0),
]

answers = st.tuples(
    st.lists(st.tuples(st.lists(tokens, max_size=3), st.sampled_from([None, None, PREEMPTED])), max_size=6),
    st.none() | st.sampled_from(FinishReason),
    st.none() | st.integers(0, 5),
)
"""Of one choice: what each step brings, why it ends if it does, how many tokens of its prompt were cached."""

REMOTE = {"kv_transfer_params": {"do_remote_prefill": True, "remote_prefill_cached_tokens": 3}}
"""What a KV connector tells of a prompt that another engine has computed."""

samplings = st.fixed_dictionaries(
    {},
    optional={
        "stop": st.sampled_from([["rail"], ["zz", "\n"]]),
        "skip_special_tokens": st.just(False),
        "spaces_between_special_tokens": st.just(False),
        "extra_args": st.just(REMOTE),
    },
)


class Heard:
    """A sink that keeps every call, in order."""

    def __init__(self) -> None:
        self.cached_tokens = -1
        self.calls: list[Any] = []

    def accepted(self) -> None:
        raise AssertionError

    def prompt_logprobs(self, prompt: int, first: str, logprobs: Sequence[TokenLogprobs]) -> None:
        raise AssertionError

    def put(self, choice: int, text: str, token_ids: Sequence[int], *others: Any) -> None:
        said = [*others, ()][:2]
        self.calls.append((self.cached_tokens, choice, text, list(token_ids), *said))

    def fail(self, error: Exception) -> None:
        self.calls.append(repr(error))


class Way:
    """One request of CHOICES choices, and an output processor that it goes through."""

    def __init__(self, processor: OutputProcessor, prompt: str, sampling: dict[str, Any]) -> None:
        self.processor = processor
        self.heard = Heard()
        self.told: list[Any] = []
        stream = Stream(
            chat("?", greedy(9, n=CHOICES)),
            self.heard,
            tokenizer(),
            constrained_by=None,
            finished=lambda request: self.told.append(("finished", request)),
            cancel=lambda request: self.told.append(("cancel", request)),
        )
        text, last = PROMPTS[prompt]
        # The same object for all choices, as they come from one request.
        params = SamplingParams(max_tokens=9, output_kind=RequestOutputKind.DELTA, **sampling)
        for index in range(CHOICES):
            queue: Any = Choice(stream, index)
            asked = EngineCoreRequest(str(index), ids(text)[:last], None, params, None, 1.0, None, None, None)
            asked.external_req_id = "chat-1"
            processor.add_request(asked, text if last is None else None, None, index, queue)

    def step(self, at: float, outputs: list[EngineCoreOutput]) -> None:
        """One engine step; what it says to vLLM's metrics is kept."""
        stats = IterationStats()  # type: ignore[no-untyped-call]
        stats.iteration_timestamp = NOW + at
        processed = self.processor.process_outputs(outputs, at, stats, weight_version="1")
        self.told.append((processed.reqs_to_abort, vars(stats)))

    def end(self) -> None:
        """Abort what has not ended."""
        self.told.append(self.processor.abort_requests(["chat-1"], internal=False))
        self.told.append((self.processor.request_states, dict(self.processor.external_req_ids)))


def steps(told: Sequence[Any]) -> list[list[EngineCoreOutput]]:
    """What each engine step brings of the choices."""
    steps: list[list[EngineCoreOutput]] = [[] for _ in range(7)]
    for index, (pieces, reason, cached) in enumerate(told):
        outputs = [EngineCoreOutput(str(index), list(piece), events=events) for piece, events in pieces]
        if outputs:
            outputs[0].events = SCHEDULED
            if cached is not None:
                outputs[0].prefill_stats = PrefillStats(num_prompt_tokens=5, num_cached_tokens=cached)
            outputs[-1].finish_reason = reason
        for step, output in zip(steps, outputs, strict=False):
            step.append(output)
    return steps


def heard_by(processor: OutputProcessor, told: Sequence[Any], prompt: str, sampling: Any) -> Way:
    """A request whose answers are `told`, gone through this processor."""
    way = Way(processor, prompt, sampling)
    for number, step in enumerate(steps(told)):
        way.step(10.0 + number, step)
    way.end()
    return way


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(told=st.tuples(*[answers] * CHOICES), prompt=st.sampled_from([*PROMPTS]), sampling=samplings)
def test_it_tells_what_vllm_tells(told: Any, prompt: str, sampling: dict[str, Any]) -> None:
    """Whatever the engine core makes of a request's choices, and however they end, its sink hears the same as
    by vLLM's own way, vLLM's metrics are told the same, and nothing of the request is left."""
    theirs = heard_by(OutputProcessor(tokenizer(), log_stats=True), told, prompt, sampling)
    ours = heard_by(Outputs(tokenizer(), log_stats=True), told, prompt, sampling)
    assert ours.heard.calls == theirs.heard.calls
    assert ours.told == theirs.told
    assert ours.told[-1] == ({}, {})


@pytest.mark.parametrize(
    ("sampling", "shorter"),
    [
        ({}, True),
        ({"logprobs": 1}, False),
        ({"prompt_logprobs": 1}, False),
        ({"stop": ["a"]}, False),
        ({"extra_args": REMOTE}, False),
    ],
    ids=["text", "logprobs", "logprobs of the prompt", "a stop string", "a prompt computed elsewhere"],
)
def test_only_what_is_plain_goes_the_shorter_way(sampling: dict[str, Any], *, shorter: bool) -> None:
    """A request of which text alone is wanted has a decoder of its own, any other has none."""
    processor = Outputs(tokenizer(), log_stats=True)
    Way(processor, "a text", sampling)
    queues: list[Any] = [state.queue for state in processor.request_states.values()]
    assert [queue.decoder is not None for queue in queues] == [shorter] * CHOICES
