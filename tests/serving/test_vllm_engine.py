from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from time import perf_counter

import pytest
import pytest_asyncio
from prometheus_client import REGISTRY

from serving.drain import LONGEST_RETRY_S
from serving.engine import Engine, EngineDead, FinishReason, Prompt, TokenLogprobs
from serving.messages import Load, Message, Sampling
from tests.serving.asking import (
    CONTEXT,
    QUEUE,
    Recorder,
    answer,
    begin,
    chat,
    engine_processes,
    greedy,
    idle,
    refusal,
    rendered,
    running,
    smollm2,
)

PARIS = "What is the capital of France?"

pytestmark = [
    pytest.mark.asyncio(loop_scope="package"),
    # vLLM and what it imports warn of each other's deprecations.
    pytest.mark.filterwarnings("default"),
]


def tokens(prompt: Prompt) -> list[int]:
    """Those of a rendered prompt."""
    ids: list[int] = prompt.content.input["prompt_token_ids"]
    return ids


async def test_answers_at_temperature_0(engine: Engine) -> None:
    """The model that the default configuration serves knows the capital of France."""
    sink = await answer(engine, chat(PARIS, greedy(24)))
    assert "Paris" in sink.text()
    assert sink.reasons == {0: "stop"}
    assert sink.accepted_calls == 1


async def test_context_length_is_the_configured_one(engine: Engine) -> None:
    """`max_model_len` reaches the engine under vLLM's own name."""
    assert engine.context_length == CONTEXT


async def test_max_tokens_ends_a_choice(engine: Engine) -> None:
    """A choice that reaches max_tokens ends for its length, and as many tokens are counted."""
    sink = await answer(engine, chat("Count from one to twenty.", greedy(7)))
    assert sink.reasons == {0: "length"}
    assert sink.tokens == 7


async def test_choices_are_seeded_one_by_one(engine: Engine) -> None:
    """Choice i of n has the text that seed + i gives alone."""
    together = await answer(engine, chat("Invent a name.", Sampling(max_tokens=8, n=3, seed=11)))
    alone = await answer(engine, chat("Invent a name.", Sampling(max_tokens=8, seed=13)))
    assert len({together.text(choice) for choice in range(3)}) > 1
    assert together.text(2) == alone.text()


async def test_seeds_wrap_at_int64(engine: Engine) -> None:
    """After the largest seed comes the smallest."""
    together = await answer(engine, chat("Invent a name.", Sampling(max_tokens=8, n=2, seed=2**63 - 1)))
    alone = await answer(engine, chat("Invent a name.", Sampling(max_tokens=8, seed=-(2**63))))
    assert together.text(1) == alone.text()


@pytest.mark.parametrize("seed", [0, -1, 42])
async def test_same_seed_same_text(engine: Engine, seed: int) -> None:
    """A seed makes an answer repeatable; -1 is a seed like any other."""
    sampling = Sampling(max_tokens=12, temperature=1.5, seed=seed)
    first = await answer(engine, chat("Invent a name.", sampling))
    second = await answer(engine, chat("Invent a name.", sampling))
    assert first.text() == second.text()


async def test_greedy_choices_are_equal(engine: Engine) -> None:
    """At temperature 0, or with a top_p of 0, all choices of a request are the same text."""
    cold = await answer(engine, chat("Count from one to twenty.", greedy(6, n=2)))
    narrow = await answer(engine, chat("Count from one to twenty.", Sampling(max_tokens=6, top_p=0.0, n=2)))
    assert {cold.text(0), cold.text(1), narrow.text(0), narrow.text(1)} == {cold.text(0)}


async def test_stop_string_across_tokens(engine: Engine) -> None:
    """The text before a stop string that begins in one token and ends in another is complete, and nothing
    of the stop string is heard."""
    whole = await answer(engine, chat("Count from one to twenty.", greedy(32)))
    words = [piece for piece in whole.pieces[0] if piece]
    stop = words[4][-1:] + words[5] + words[6][:1]
    sink = await answer(engine, chat("Count from one to twenty.", greedy(32, stop=(stop,))))
    assert sink.text() == whole.text()[: whole.text().index(stop)]
    assert sink.reasons == {0: "stop"}
    assert sink.tokens < 32


async def test_cancel_frees_the_engine(engine: Engine) -> None:
    """A cancelled request leaves neither a running sequence nor a block of the KV cache behind, and its sink
    hears nothing more. Cancelling again, or what never was, does nothing."""
    sink = await begin(engine, chat("Tell me a long story.", greedy(1500, n=2, ignore_eos=True), "to cancel"))
    await sink.until(lambda sink: len(sink.pieces) == 2)
    assert engine.load().running == 2
    engine.cancel("to cancel")
    calls = sink.calls
    engine.cancel("to cancel")
    engine.cancel("never seen")
    await idle(engine)
    assert sink.calls == calls
    assert not sink.errors


async def test_cancelling_the_caller_cancels_the_request(engine: Engine) -> None:
    """Whoever waits in `generate` and is cancelled leaves nothing running."""
    request = chat("Tell me a long story.", greedy(1500, n=8, ignore_eos=True), "dropped")
    prompts = await engine.render(request)
    waiting = asyncio.create_task(engine.generate(request, prompts, Recorder()))
    await asyncio.sleep(0)  # let it begin
    waiting.cancel()
    await asyncio.wait([waiting])
    engine.cancel("dropped")  # where it was quick enough to return
    await answer(engine, chat(PARIS, greedy(1), "after"))
    await idle(engine)


async def test_failing_sink_fails_alone(engine: Engine) -> None:
    """A sink that raises loses its own request and no other."""

    class Broken(Recorder):
        def put(
            self,
            choice: int,
            text: str,
            token_ids: Sequence[int],
            finish_reason: FinishReason | None,
            logprobs: Sequence[TokenLogprobs] = (),
        ) -> None:
            raise RuntimeError("no room")

    broken = await begin(engine, chat(PARIS, greedy(200, ignore_eos=True), "broken"), Broken())
    sound = await answer(engine, chat(PARIS, greedy(24), "sound"))
    assert "Paris" in sound.text()
    assert [str(error) for error in broken.errors] == ["no room"]
    await idle(engine)


@pytest.mark.parametrize(
    ("sampling", "param"),
    [
        (Sampling(max_tokens=4, logit_bias={49152: 1.0}), "logit_bias"),
        (Sampling(max_tokens=4, stop_token_ids=(10**6,)), "stop_token_ids"),
        (Sampling(max_tokens=4, min_tokens=5), "min_tokens"),
    ],
)
async def test_refusals_name_the_parameter(engine: Engine, sampling: Sampling, param: str) -> None:
    """What only the engine can know to be wrong is refused before acceptance, naming the parameter."""
    refused = await refusal(engine, chat(PARIS, sampling))
    assert (refused.status, refused.param) == (400, param)
    assert param in refused.message
    assert engine.load() == Load()


async def test_full_queue_refuses_before_acceptance(engine: Engine) -> None:
    """Where vLLM is given a limit of its own, a request over it is refused whole, to be tried again when as
    much may have ended: sooner where more does."""
    too_many = chat(PARIS, greedy(1, n=QUEUE + 1), "too many")
    before = await refusal(engine, too_many)
    assert before.status == 503
    await answer(engine, chat(PARIS, greedy(1, n=QUEUE), "just enough"))
    for number in range(4):
        await answer(engine, chat(PARIS, greedy(1, n=QUEUE), f"again {number}"))
    after = await refusal(engine, too_many)
    assert before.retry_after is not None
    assert after.retry_after is not None
    assert 1 <= after.retry_after < before.retry_after <= LONGEST_RETRY_S


async def test_request_id_is_one_requests_own(engine: Engine) -> None:
    """While a request runs its id is taken, so that a cancel means one request."""
    sink = await begin(engine, chat("Tell me a long story.", greedy(1500, ignore_eos=True), "taken"))
    with pytest.raises(ValueError, match="'taken' is being generated already"):
        await begin(engine, chat(PARIS, greedy(1), "taken"))
    engine.cancel("taken")
    await idle(engine)
    assert not sink.errors


async def test_logit_bias_steers(engine: Engine) -> None:
    """A bias of 100 on one token makes it the only one."""
    sink = await answer(engine, chat(PARIS, greedy(3, logit_bias={1000: 100.0})))
    word = sink.pieces[0][0]
    assert word
    assert sink.text() == word * 3


async def test_repeated_prompt_is_cached(engine: Engine) -> None:
    """Prompt tokens that the prefix cache held are reported; a prompt shorter than a block has none."""
    long = "word " * 300
    await answer(engine, chat(long, greedy(1), "first"))
    second = await answer(engine, chat(long, greedy(1), "second"))
    short = await answer(engine, chat("Hi", greedy(1), "third"))
    assert second.cached_tokens >= 128
    assert short.cached_tokens == 0


async def test_concurrent_requests_get_their_own_text(engine: Engine) -> None:
    """Eight requests in one batch get the texts they get alone; a near tie may flip one of them."""
    lands = ("France", "Italy", "Spain", "Japan", "Egypt", "Peru", "India", "Greece")
    questions = [f"What is the capital of {land}?" for land in lands]
    alone = [(await answer(engine, chat(question, greedy(8)))).text() for question in questions]
    assert len(set(alone)) == len(lands)
    together = await asyncio.gather(
        *(answer(engine, chat(question, greedy(8), f"at once {question}")) for question in questions)
    )
    assert sum(sink.text() == text for sink, text in zip(together, alone, strict=True)) >= 7


async def test_render_counts_every_token(engine: Engine) -> None:
    """A prompt somewhat longer than the context is counted exactly, so that a refusal can say both
    numbers."""
    some = await rendered(engine, chat(" word" * 100, greedy(1)))
    many = await rendered(engine, chat(" word" * 5000, greedy(1)))
    assert many.length - some.length == 4900
    assert many.length > engine.context_length


async def test_render_refuses_a_huge_prompt_without_stalling(engine: Engine) -> None:
    """A megabyte of one character is refused with the context's length, and the loop goes on meanwhile."""
    longest_pause = 0.0

    async def watch() -> None:
        nonlocal longest_pause
        while True:
            before = perf_counter()
            await asyncio.sleep(0.01)
            longest_pause = max(longest_pause, perf_counter() - before)

    watching = asyncio.create_task(watch())
    refused = await refusal(engine, chat("a" * 1_000_000, greedy(1)))
    watching.cancel()
    assert (refused.param, refused.code) == ("messages", "context_length_exceeded")
    assert str(CONTEXT) in refused.message
    assert longest_pause < 1


async def test_developer_speaks_as_system(engine: Engine) -> None:
    """A template that knows no developer gets the developer's words from the system."""
    developer, system = [
        await rendered(engine, chat([Message(role, "Be brief."), Message("user", "Hi")], greedy(1)))
        for role in ("developer", "system")
    ]
    assert tokens(developer) == tokens(system)


async def test_template_that_refuses(engine: Engine) -> None:
    """What a chat template says against the messages reaches the client as a refusal of `messages`."""
    refused = await refusal(engine, chat([Message("user", "Hi"), Message("tool", "42")], greedy(1)))
    assert (refused.status, refused.param) == (400, "messages")
    assert "no tools here" in refused.message


async def test_vllm_metrics_stay_on(engine: Engine) -> None:
    """The counters that vLLM keeps are in the process's Prometheus registry, under the model's name, and
    count every token."""

    def counted(metric: str) -> float:
        labels = {"engine": "0", "model_name": "smollm2"}
        return REGISTRY.get_sample_value(f"vllm:{metric}", labels) or 0.0

    expected = {
        "generation_tokens_total": 9,
        "time_to_first_token_seconds_count": 1,
        "inter_token_latency_seconds_count": 8,
        "request_generation_tokens_sum": 9,
        "e2e_request_latency_seconds_count": 1,
        "iteration_tokens_total_count": 9,
    }
    before = {metric: counted(metric) for metric in expected}
    latency = counted("inter_token_latency_seconds_sum")
    began = perf_counter()
    sink = await answer(engine, chat("Count from one to twenty.", greedy(9)))
    await idle(engine)
    took = perf_counter() - began
    assert {metric: counted(metric) - before[metric] for metric in expected} == expected
    assert sink.tokens == 9
    assert 0 < counted("inter_token_latency_seconds_sum") - latency < took


async def test_the_configuration_wins_over_our_defaults(engine: Engine, folder: Path) -> None:
    """JSON is compact unless the configuration says that it need not be, which changes nothing else; its own
    logits processors stay beside ours."""
    # They import vLLM, which the engine's making has given its environment.
    from serving import penalties  # noqa: PLC0415
    from serving.vllm_engine import configuration, engine_arguments  # noqa: PLC0415

    ours = engine_arguments(folder, smollm2(folder)).structured_outputs_config
    assert (ours.backend, ours.disable_any_whitespace) == ("xgrammar", True)
    loose = smollm2(folder, structured_outputs_config={"disable_any_whitespace": False})
    outputs = engine_arguments(folder, loose).structured_outputs_config
    assert (outputs.backend, outputs.disable_any_whitespace) == ("xgrammar", False)
    theirs = smollm2(
        folder,
        structured_outputs_config={"backend": "guidance"},
        logits_processors=["some.module:Processor"],
    )
    config = configuration(theirs)
    outputs = config.structured_outputs_config
    assert (outputs.backend, outputs.disable_any_whitespace) == ("guidance", True)
    assert config.model_config.logits_processors == ["some.module:Processor", penalties.processor(config)]


@pytest_asyncio.fixture(scope="module", loop_scope="package")
async def mortal(folder: Path) -> AsyncIterator[Engine]:
    """An engine of its own for what ends it. It guesses tokens ahead, so that vLLM's V1 runner takes no
    logits processor."""
    guessing = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    async with running(smollm2(folder, speculative_config=guessing)) as engine:
        yield engine


async def test_penalty_is_refused_where_it_cannot_be_applied(mortal: Engine) -> None:
    """An additive repetition penalty is refused by an engine that would ignore it; no other penalty is."""
    refused = await refusal(mortal, chat(PARIS, greedy(8, repetition_penalty=0.5)))
    assert (refused.status, refused.param) == (400, "repetition_penalty")
    assert "speculative" in refused.message
    sink = await answer(mortal, chat(PARIS, greedy(8, repetition_factor=1.1, presence_penalty=0.1)))
    assert sink.text()


async def test_death_of_the_engine_core_is_noticed(mortal: Engine) -> None:
    """When the engine core is killed, the engine says that it has died, each request in flight fails once,
    new ones are not taken, and no process is left after `close`."""
    dying = asyncio.create_task(mortal.died())
    sink = await begin(mortal, chat("Tell me a long story.", greedy(1500, n=2, ignore_eos=True)))
    await sink.until(lambda sink: len(sink.pieces) == 2)
    assert not dying.done()

    # The youngest of this process's own.
    *_, core = [process for process in engine_processes() if process.ppid() == os.getpid()]
    core.kill()
    async with asyncio.timeout(10):
        assert isinstance(await dying, EngineDead)
    await sink.until(lambda sink: bool(sink.errors))
    assert [type(error) for error in sink.errors] == [EngineDead]
    with pytest.raises(EngineDead):
        await begin(mortal, chat(PARIS, greedy(1), "late"))
    assert isinstance(await mortal.died(), EngineDead)
