"""Asking an engine, and what it answers."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil

from serving.engine import Engine, FinishReason, Prompt, Refusal, TokenLogprobs
from serving.engines import build_engine
from serving.messages import Chat, Load, Message, Request, Sampling, Text
from serving.settings import EngineSettings

CONTEXT = 2048
QUEUE = 32
ARGUMENTS = {"max_model_len": CONTEXT, "kv_cache_memory_bytes": 256 << 20, "max_num_queued_reqs": QUEUE}


def smollm2(folder: Path, **engine_args: Any) -> EngineSettings:
    """What makes an engine of the model in a folder."""
    return EngineSettings(name="smollm2", source=str(folder), engine_args=ARGUMENTS | engine_args)


class Recorder:
    """A sink that keeps what it hears."""

    def __init__(self) -> None:
        self.cached_tokens = -1
        self.accepted_calls = 0
        self.pieces: dict[int, list[str]] = {}
        self.token_ids: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[TokenLogprobs]] = {}
        self.prompts: dict[int, tuple[str, Sequence[TokenLogprobs]]] = {}
        self.reasons: dict[int, FinishReason] = {}
        self.errors: list[Exception] = []
        self.calls = 0
        self._changed = asyncio.Condition()
        self._notifications: set[asyncio.Task[None]] = set()

    def accepted(self) -> None:
        assert self.calls == 0
        self.accepted_calls += 1

    def prompt_logprobs(self, prompt: int, first: str, logprobs: Sequence[TokenLogprobs]) -> None:
        assert prompt not in self.prompts
        self.prompts[prompt] = (first, logprobs)

    def put(
        self,
        choice: int,
        text: str,
        token_ids: Sequence[int],
        finish_reason: FinishReason | None,
        logprobs: Sequence[TokenLogprobs] = (),
    ) -> None:
        assert self.accepted_calls == 1
        assert self.cached_tokens >= 0
        assert choice not in self.reasons
        self.calls += 1
        self.pieces.setdefault(choice, []).append(text)
        self.token_ids.setdefault(choice, []).extend(token_ids)
        self.logprobs.setdefault(choice, []).extend(logprobs)
        if finish_reason is not None:
            self.reasons[choice] = finish_reason
        self._notify()

    def fail(self, error: Exception) -> None:
        self.errors.append(error)
        self._notify()

    @property
    def tokens(self) -> int:
        """Of all choices."""
        return sum(map(len, self.token_ids.values()))

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


def chat(
    question: str | Sequence[Message], sampling: Sampling, request_id: str = "chat-1", **others: Any
) -> Chat:
    """A request with one message, or these."""
    messages = [Message("user", question)] if isinstance(question, str) else question
    return Chat(id=request_id, model="m", created=1, messages=tuple(messages), sampling=sampling, **others)


def text(
    *prompts: str | tuple[int, ...], sampling: Sampling, request_id: str = "text-1", **others: Any
) -> Text:
    """A text completion request."""
    return Text(id=request_id, model="m", created=1, prompts=prompts, sampling=sampling, **others)


def greedy(max_tokens: int, **others: Any) -> Sampling:
    """Sampling at temperature 0."""
    return Sampling(max_tokens=max_tokens, temperature=0.0, **others)


async def begin(engine: Engine, request: Request, sink: Recorder | None = None) -> Recorder:
    """Ask, and return as soon as the engine has the request."""
    sink = sink or Recorder()
    await engine.generate(request, await engine.render(request), sink)
    return sink


async def answer(engine: Engine, request: Request) -> Recorder:
    """Ask, and wait for the end of every choice."""
    sink = await begin(engine, request)
    return await sink.finished(request.sequences)


async def rendered(engine: Engine, request: Request) -> Prompt:
    """The only prompt of a request."""
    (prompt,) = await engine.render(request)
    return prompt


async def refusal(engine: Engine, request: Request) -> Refusal:
    """What the engine has against a request, of which it has taken nothing."""
    sink = Recorder()
    try:
        await begin(engine, request, sink)
    except Refusal as refused:
        assert not sink.accepted_calls
        return refused
    raise AssertionError("the engine has taken the request")


async def until(condition: Callable[[], bool], seconds: float) -> None:
    """Wait for something that nobody announces."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - no event tells of it
            await asyncio.sleep(0.01)


async def idle(engine: Engine) -> None:
    """Wait until the engine holds nothing."""
    await until(lambda: engine.load() == Load(), 5)


def engine_processes() -> list[psutil.Process]:
    """This process's living children, the oldest first, and theirs, without Python's own."""
    # Not by their ids, which start again from the lowest when there is no higher one.
    children = sorted(psutil.Process().children(recursive=True), key=psutil.Process.create_time)
    commands = [(child, _command(child)) for child in children]
    return [child for child, command in commands if command and "resource_tracker" not in command]


def _command(process: psutil.Process) -> str:
    """How a process was started; nothing of one that is dead, reaped or not."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # a zombie is one of them
        return ""


@asynccontextmanager
async def running(settings: EngineSettings) -> AsyncIterator[Engine]:
    """A started engine, which leaves no process behind when it is closed, even twice."""
    others = engine_processes()
    engine = build_engine(settings)
    await engine.start()
    processes = [process for process in engine_processes() if process not in others]
    assert processes
    try:
        yield engine
    finally:
        processes += [process for process in engine_processes() if process not in (*others, *processes)]
        await engine.close()
        await until(lambda: not psutil.wait_procs(processes, timeout=0)[1], 20)
        await engine.close()
        # vLLM leaves its ZMQ context to the collector, which warns of it; in another file that were an error.
        vars(engine).clear()
        gc.collect()
