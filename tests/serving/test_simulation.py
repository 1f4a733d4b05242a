from __future__ import annotations

import asyncio
import gc
import json
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
from prometheus_client import REGISTRY, CollectorRegistry
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.inputs.engine import tokens_input
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM

from serving.engine import Engine
from serving.messages import ResponseFormat
from serving.settings import EngineSettings, SimulationSettings
from serving.simulation.accelerator import Accelerator, Shape, work
from serving.simulation.answers import PROSE
from serving.simulation.executor import SimulatedExecutor
from serving.simulation.metrics import SimulationMetrics
from serving.vllm_engine import configuration
from tests.serving import replayed
from tests.serving.asking import answer, chat, engine_processes, greedy, idle, running, text

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


class Replay:
    """vLLM with an accelerator that takes no time and says ANSWERS."""

    def __init__(self, config: VllmConfig) -> None:
        others = set(engine_processes())
        self.llm = AsyncLLM.from_vllm_config(config, disable_log_stats=False)
        self.processes = set(engine_processes()) - others
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
    settings = replayed.settings(folder, ANSWERS, **ARGUMENTS)
    assert settings.simulation is not None
    ahead = settings.simulation.model_copy(update={"async_scheduling": request.param == "a step ahead"})
    replay = Replay(configuration(settings.model_copy(update={"simulation": ahead})))
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


def memory(folder: Path, simulation: SimulationSettings, **arguments: Any) -> int:
    """Bytes of the KV cache, the first thing that an engine core asks for."""
    settings = EngineSettings(
        source=str(folder), accelerator="simulated", simulation=simulation, engine_args=arguments
    )
    room: int
    (room,) = SimulatedExecutor(configuration(settings)).determine_available_memory()
    return room


L4 = SimulationSettings(device="L4")

# What is not modelled → how the model or the settings come to it → what is said.
NOT_MODELLED: dict[str, tuple[dict[str, Any], SimulationSettings, dict[str, Any], str]] = {
    "sliding windows": ({"sliding_window": 128}, SimulationSettings(step_ms=1), {}, "model sliding windows$"),
    "drafts": (
        {},
        SimulationSettings(step_ms=1),
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
        "model speculative decoding$",
    ),
    "data parallelism": ({}, SimulationSettings(step_ms=1), {"data_parallel_size": 2}, "data parallelism$"),
    "another kind of layer": ({"hidden_act": "gelu"}, L4, {}, "hidden_act is 'gelu', not silu"),
    "more than the memory": (
        {"num_hidden_layers": 3000, "hidden_size": 2304},
        L4,
        {},
        "1 x L4 cannot hold the model: its weights take",
    ),
}


@pytest.mark.parametrize("kind", NOT_MODELLED)
def test_what_is_not_modelled_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    """Rather than a wrong figure there is none."""
    config, simulation, arguments, said = NOT_MODELLED[kind]
    with pytest.raises(ValueError, match=said):
        memory(replayed.folder(tmp_path, **config), simulation, **arguments)


def test_weights_leave_the_rest_of_the_memory_to_the_cache(tmp_path: Path) -> None:
    """The KV cache has what the device has beside the weights, all devices together; what is given, where it
    is given; and room for a million tokens where nobody says what there is."""
    folder = replayed.folder(tmp_path)
    weights = 2 * 134_515_008
    assert memory(folder, L4, gpu_memory_utilization=0.5) == pytest.approx(12e9 - weights, abs=1e6)
    assert memory(folder, L4, kv_cache_memory_bytes=123_456_789) == 123_456_789
    million = 2**20 * 30 * 2 * 3 * 64 * 2
    assert million < memory(folder, SimulationSettings(step_ms=1)) < 1.001 * million


# ---- time ---------------------------------------------------------------------------------------------

LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
    "max_position_embeddings": 131_072,
}
DEVICES_OF_ONE = 8
CHUNK = 8192
KV_BYTES = 80 * 2 * 128 * 2
"""Of a token on one of the eight: one head's keys and values in each layer, two bytes a number."""
LABELS = {"model": "llama"}


class Timed:
    """A model of 70 billion parameters on eight H200."""

    def __init__(self, engine: Engine, registry: CollectorRegistry, shape: Shape) -> None:
        self.engine = engine
        self.shape = shape
        self._accelerator = Accelerator(
            "H200", shape, devices=DEVICES_OF_ONE, weight_bytes=2, kv_bytes=KV_BYTES
        )
        self._registry = registry

    def figure(self, name: str) -> float:
        """What a scrape says of the accelerator."""
        value = self._registry.get_sample_value(f"trunkline_simulated_{name}_total", LABELS)
        assert value is not None
        return value

    async def busy_s(self, prompt: list[int], max_tokens: int) -> float:
        """How long the accelerator works for a request that is alone."""
        before = self.figure("busy_seconds")
        await answer(self.engine, text(tuple(prompt), sampling=greedy(max_tokens)))
        await idle(self.engine)
        return self.figure("busy_seconds") - before

    def step_s(self, computed: int, added: int) -> float:
        """What a step for one sequence is to take."""
        return self._accelerator.step_s(work([computed], [added]))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def timed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Timed]:
    """One for all of its tests."""
    folder = replayed.folder(tmp_path_factory.mktemp("large"), **LLAMA_70B)
    settings = EngineSettings(
        name="llama",
        source=str(folder),
        accelerator="simulated",
        simulation=SimulationSettings(device="H200"),
        engine_args={"tensor_parallel_size": DEVICES_OF_ONE, "max_num_batched_tokens": CHUNK},
    )
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    shape = Shape(80, 8192, 28672, 64, 8, 128, vocabulary, tied=False)
    registry = CollectorRegistry()
    metrics = SimulationMetrics(LABELS["model"], registry)
    async with running(metrics.reporting(settings)) as engine:
        yield Timed(engine, registry, shape)


@on_the_engines_loop
async def test_steps_take_what_the_device_would(timed: Timed) -> None:
    """A long prompt takes a step for each chunk and each further token one step, each for as long as eight
    devices would be at it; found in the prefix cache, the prompt takes hardly anything."""
    prompt = [1000 + token % 5000 for token in range(2 * CHUNK + 5)]
    chunks = timed.step_s(0, CHUNK) + timed.step_s(CHUNK, CHUNK) + timed.step_s(2 * CHUNK, 5)
    decode = timed.step_s(len(prompt), 1) + timed.step_s(len(prompt) + 1, 1)
    began = asyncio.get_running_loop().time()
    assert await timed.busy_s(prompt, 3) == pytest.approx(chunks + decode, abs=1e-4)
    assert asyncio.get_running_loop().time() - began >= chunks + decode
    again = timed.step_s(2 * CHUNK, 5) + decode
    assert await timed.busy_s(prompt, 3) == pytest.approx(again, abs=1e-4)
    assert again < chunks / 5


@on_the_engines_loop
async def test_the_host_plans_ahead(timed: Timed) -> None:
    """While a step runs, the host has the next one ready: of a long answer's steps most miss no deadline."""
    steps, late = timed.figure("steps"), timed.figure("late_steps")
    await answer(timed.engine, text((1, 2, 3), sampling=greedy(40)))
    await idle(timed.engine)
    assert timed.figure("steps") - steps == 40
    assert timed.figure("late_steps") - late < 20


@on_the_engines_loop
async def test_sequences_share_steps(timed: Timed) -> None:
    """Sixty-four sequences take about as many steps as one, and each has as many tokens as it may have. Where
    no answers are given they say prose, which is the same for the same seed."""
    steps = timed.figure("steps")
    prompts = [(7, 8, number) for number in range(64)]
    sink = await answer(timed.engine, text(*prompts, sampling=greedy(20, seed=0)))
    await idle(timed.engine)
    assert timed.figure("steps") - steps < 40
    assert {len(tokens) for tokens in sink.token_ids.values()} == {20}
    assert {sink.text(choice) for choice in range(64)} == {sink.text()}
    assert sink.text().startswith(PROSE[0])
    other = await answer(timed.engine, text(prompts[0], sampling=greedy(20, seed=2)))
    assert other.text().startswith(PROSE[2][:60])


@on_the_engines_loop
async def test_prose_that_is_bent_to_a_grammar_ends(timed: Timed) -> None:
    """Prose as JSON is an object that ends by itself, long before the request's bound."""
    request = chat("Say it in JSON.", greedy(100), response_format=ResponseFormat())
    sink = await answer(timed.engine, request)
    assert isinstance(json.loads(sink.text()), dict)
    assert sink.reasons == {0: "stop"}
