from __future__ import annotations

import asyncio
import gc
import json
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.inputs.engine import tokens_input
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM

from serving.simulation.replay import ReplayExecutor, permitted
from serving.vllm_engine import engine_arguments
from tests.serving import replayed

NUMBERED = [f"Answer {number}: " + " ".join([str(number)] * 40) for number in range(50)]
MARKED = "<think>Trains? é😀</think><tool_call>\n{}\n</tool_call><|im_start|>"
OBJECT = '{"city": "Paris", "lines": [1, 2]}'
ANSWERS = [*NUMBERED, MARKED, OBJECT]
MARKED_SEED, OBJECT_SEED = 50, 51

BLOCK = 16
STEP_TOKENS = 64
ARGUMENTS = {
    "max_model_len": 512,
    "max_num_seqs": 64,
    "max_num_batched_tokens": STEP_TOKENS,
    "enable_chunked_prefill": True,
    "structured_outputs_config": {"disable_any_whitespace": False},
    "block_size": BLOCK,
    # A ninth of what fifty answers and their prompts need.
    "num_gpu_blocks_override": 48,
}
PROMPT = list(range(1000, 1030))

# vLLM and what it imports warn of each other's deprecations.
pytestmark = pytest.mark.filterwarnings("default")
on_the_engines_loop = pytest.mark.asyncio(loop_scope="module")


def configuration(folder: Path, answers: list[str], **arguments: Any) -> VllmConfig:
    """What a model's entry in the configuration comes to."""
    settings = replayed.settings(folder, answers, **arguments)
    return engine_arguments(folder, settings).create_engine_config(UsageContext.OPENAI_API_SERVER)


def processes() -> set[psutil.Process]:
    """This process's children and theirs, without Python's own."""
    children = psutil.Process().children(recursive=True)
    return {child for child in children if "resource_tracker" not in " ".join(child.cmdline())}


class Replay:
    """A vLLM that replays ANSWERS."""

    def __init__(self, config: VllmConfig) -> None:
        others = processes()
        self.llm = AsyncLLM.from_vllm_config(config, disable_log_stats=False)
        self.processes = processes() - others
        self.tokenizer: Any = self.llm.get_tokenizer()

    async def generate(self, request: str, prompt: list[int] = PROMPT, **sampling: Any) -> RequestOutput:
        """A request's whole output, with special tokens visible in it."""
        params = SamplingParams(
            **{"max_tokens": 200, "skip_special_tokens": False} | sampling,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        (output,) = [output async for output in self.llm.generate(tokens_input(prompt), params, request)]
        return output

    async def answer(self, request: str, **sampling: Any) -> CompletionOutput:
        """The one choice of a request."""
        (choice,) = (await self.generate(request, **sampling)).outputs
        return choice

    def preemptions(self) -> float:
        """How often a request was preempted so far."""
        labels = {"engine": "0", "model_name": "replayed"}
        return REGISTRY.get_sample_value("vllm:num_preemptions_total", labels) or 0.0

    async def close(self) -> None:
        """End, and see that no process stays."""
        await asyncio.to_thread(self.llm.shutdown, 2.0)
        assert not psutil.wait_procs(self.processes, timeout=20)[1]
        # vLLM leaves its ZMQ context to the collector, which warns of it; in another file that were an error.
        del self.llm
        gc.collect()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer and without weights."""
    return replayed.folder(tmp_path_factory.mktemp("model"))


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["step by step", "a step ahead"])
async def replay(request: pytest.FixtureRequest, folder: Path) -> AsyncIterator[Replay]:
    """The engine without and with async scheduling, of which no answer shows anything."""
    config = configuration(folder, ANSWERS, **ARGUMENTS)
    # The CPU platform turns it off whatever the arguments say; what acts on it is made later.
    config.scheduler_config.async_scheduling = request.param == "a step ahead"
    replay = Replay(config)
    yield replay
    await replay.close()


@on_the_engines_loop
async def test_answer_comes_back_exactly(replay: Replay) -> None:
    """An answer's text comes back with its special tokens, as the tokens that the model's tokenizer makes of
    it, ended by EOS."""
    choice = await replay.answer("exact", seed=MARKED_SEED)
    assert choice.text == MARKED
    assert list(choice.token_ids) == [*replay.tokenizer.encode(MARKED), replay.tokenizer.eos_token_id]
    assert replay.tokenizer.convert_tokens_to_ids("<think>") == choice.token_ids[0]
    assert choice.finish_reason == "stop"


@on_the_engines_loop
async def test_choices_replay_consecutive_answers(replay: Replay) -> None:
    """Choice i of a request replays the answer at seed + i, modulo their number."""
    last = len(ANSWERS) - 1
    output = await replay.generate("choices", n=3, seed=last + 7 * len(ANSWERS))
    assert [choice.text for choice in output.outputs] == [OBJECT, NUMBERED[0], NUMBERED[1]]


@on_the_engines_loop
async def test_first_answer_without_a_seed(replay: Replay) -> None:
    """A request without a seed replays the first answer."""
    assert (await replay.answer("no seed")).text == NUMBERED[0]


@on_the_engines_loop
async def test_stop_string_cuts(replay: Replay) -> None:
    """A stop string that begins in one token and ends in another cuts what is replayed."""
    choice = await replay.answer("stop", seed=OBJECT_SEED, stop=['is", "li'])
    assert (choice.text, choice.finish_reason) == ('{"city": "Par', "stop")


@on_the_engines_loop
async def test_max_tokens_cuts(replay: Replay) -> None:
    """After max_tokens tokens an answer is cut."""
    choice = await replay.answer("max", seed=3, max_tokens=5)
    assert NUMBERED[3].startswith(choice.text)
    assert (len(choice.token_ids), choice.finish_reason) == (5, "length")


@on_the_engines_loop
async def test_only_eos_follows_an_answer(replay: Replay) -> None:
    """A request that ignores EOS reads nothing but EOS after its answer."""
    choice = await replay.answer("endless", seed=OBJECT_SEED, ignore_eos=True, max_tokens=60)
    tokens = replay.tokenizer.encode(OBJECT)
    assert list(choice.token_ids) == tokens + [replay.tokenizer.eos_token_id] * (60 - len(tokens))


@on_the_engines_loop
async def test_long_prompt_comes_in_chunks_and_from_the_cache(replay: Replay) -> None:
    """A prompt of several steps has the same answer computed as from the prefix cache."""
    prompt = list(range(2000, 2000 + 3 * STEP_TOKENS + 5))
    first = await replay.generate("cold", prompt=prompt, seed=7)
    second = await replay.generate("warm", prompt=prompt, seed=8)
    assert (first.outputs[0].text, first.num_cached_tokens) == (NUMBERED[7], 0)
    assert (second.outputs[0].text, second.num_cached_tokens) == (NUMBERED[8], 3 * STEP_TOKENS)


@on_the_engines_loop
async def test_preempted_requests_get_their_answers(replay: Replay) -> None:
    """Fifty requests at once for which the KV cache is too small each get their own answer."""
    before = replay.preemptions()
    choices = await asyncio.gather(
        *(replay.answer(f"many {seed}", seed=seed, prompt=[3000 + seed, *PROMPT]) for seed in range(50))
    )
    assert [choice.text for choice in choices] == NUMBERED
    assert replay.preemptions() > before


@on_the_engines_loop
@pytest.mark.parametrize("seed", [4, MARKED_SEED])
async def test_grammar_bends_an_answer(replay: Replay, seed: int) -> None:
    """An answer that is no JSON becomes JSON under a grammar for it, and ends by itself."""
    grammar = StructuredOutputsParams(json_object=True)
    choice = await replay.answer("bent", seed=seed, structured_outputs=grammar)
    assert isinstance(json.loads(choice.text), dict)
    assert choice.finish_reason == "stop"


@on_the_engines_loop
async def test_grammar_asks_for_what_a_schema_requires(replay: Replay) -> None:
    """Under a schema, an answer that is no JSON becomes JSON of that schema."""
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "price": {"type": "number"},
            "stops": {"type": "array", "items": {"type": "integer"}, "minItems": 2},
        },
        "required": ["name", "price", "stops"],
    }
    choice = await replay.answer("schema", seed=4, structured_outputs=StructuredOutputsParams(json=schema))
    said = json.loads(choice.text)
    assert said.keys() >= {"name", "price", "stops"}
    assert len(said["stops"]) >= 2
    assert choice.finish_reason == "stop"


@on_the_engines_loop
async def test_grammar_leaves_what_it_allows(replay: Replay) -> None:
    """An answer that is JSON stays as it is under a grammar for JSON."""
    grammar = StructuredOutputsParams(json_object=True)
    assert (await replay.answer("left", seed=OBJECT_SEED, structured_outputs=grammar)).text == OBJECT


def assert_likeliest(token: int, place: dict[int, Logprob] | None, count: int) -> None:
    """One place has `count` tokens, of which this one is the first and the likeliest."""
    assert place is not None
    assert (len(place), next(iter(place)), place[token].rank) == (count, token, 1)
    assert -0.2 < place[token].logprob < 0
    assert sum(math.exp(entry.logprob) for entry in place.values()) < 1


@on_the_engines_loop
async def test_logprobs(replay: Replay) -> None:
    """Each request has as many log-probs as it asked for, also beside one that asked for others. At every
    position of answer and prompt its own token comes first and is the likeliest."""
    few, many, none = await asyncio.gather(
        replay.generate("few", seed=MARKED_SEED, logprobs=0),
        replay.generate("many", seed=OBJECT_SEED, logprobs=5, prompt_logprobs=2),
        replay.generate("none", seed=1),
    )
    assert none.outputs[0].logprobs is None
    for output, count in ((few, 1), (many, 5)):
        choice = output.outputs[0]
        for token, place in zip(choice.token_ids, choice.logprobs or (), strict=True):
            assert_likeliest(token, place, count)
    assert many.prompt_logprobs is not None
    assert many.prompt_logprobs[0] is None
    for token, place in zip(PROMPT[1:], many.prompt_logprobs[1:], strict=True):
        assert_likeliest(token, place, 2)


@on_the_engines_loop
async def test_no_worker_runs(replay: Replay) -> None:
    """An engine core has no process beside it, and refuses what only a worker could do."""
    assert len(replay.processes) == 1
    with pytest.raises(Exception, match="'load_model' is for workers"):
        await replay.llm.collective_rpc("load_model")
    assert (await replay.answer("after", seed=2)).text == NUMBERED[2]


WORDS = 3


@given(
    allowed=st.sets(st.integers(0, 32 * WORDS - 1)),
    token=st.integers(0, 32 * WORDS - 1),
    closing=st.lists(st.integers(0, 32 * WORDS - 1), max_size=4),
)
def test_permitted(allowed: set[int], token: int, closing: list[int]) -> None:
    """A token stays if a grammar allows it, or allows nothing; else the first closing one comes that it
    allows, or the lowest of all."""
    bits = np.zeros(32 * WORDS, dtype=np.uint8)
    bits[list(allowed)] = 1
    mask = np.packbits(bits, bitorder="little").view("<i4")
    expected = [candidate for candidate in (token, *closing, *sorted(allowed)) if candidate in allowed]
    assert permitted(token, mask, closing) == (expected[0] if expected else token)


def test_refuses_models_that_it_does_not_model(tmp_path: Path) -> None:
    """A model whose layers need other blocks than plain attention does is refused, by what it has."""
    folder = replayed.folder(tmp_path, sliding_window=128)
    with pytest.raises(ValueError, match="does not model sliding windows"):
        ReplayExecutor(configuration(folder, ["Hi."]))


def test_refuses_to_replay_nothing(folder: Path) -> None:
    """Without an answer there is nothing to replay."""
    with pytest.raises(ValueError, match="answers"):
        ReplayExecutor(configuration(folder, []))
