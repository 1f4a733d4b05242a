"""How each promise is measured on a running server: one function for each, which gives its figures."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from benchmarks.answer import Answer
from benchmarks.client import Client
from benchmarks.figures import GENERATOR_LIMIT, percentile
from benchmarks.load import Plan, allow_files, run
from benchmarks.processes import NoProcess, Process, descendants, lives, resident
from benchmarks.result import Outcome
from benchmarks.rows import Row, under, whole
from benchmarks.server import RAY_STARTS, RAY_UP, READY, Server, ServerFailed
from benchmarks.workload import Workload

SMOLLM = "smollm2-135m-instruct"
ECHO = "echo"
ENGINE_CORE = "VLLM::EngineCore"

MB = 1e6

STORY = "Tell me a long story about the history of the railway."
BATCH = Workload(model=SMOLLM, prompt=STORY, max_tokens=128, ignore_eos=True)
LEFT = Workload(model=SMOLLM, prompt=STORY, max_tokens=3000, ignore_eos=True)
LOST = Workload(model=SMOLLM, prompt=STORY, max_tokens=1000, ignore_eos=True)
AFTER = Workload(model=SMOLLM, prompt="What is the capital of France?", max_tokens=8, whole=True)
MANY = Workload(model="paced", prompt="so many words that each of them returns a few times", max_tokens=200)
FAST = replace(MANY, model="unpaced")

ALONE = 8
BATCHED = 32
LEAVERS = 10
LOST_STREAMS = 16
MANY_STREAMS = 1000
FAST_REQUESTS = 5000

IDLE_S = 5.0
"""Seconds without a request before a process counts as idle."""

LOOK_S = 0.02
"""Seconds between two looks at /metrics; a look itself takes as long."""

PATIENCE_S = 300.0
"""Seconds for anything to happen at all."""


# ---- start and size ------------------------------------------------------------------------------------


async def start(server: Server) -> list[Row]:
    """How long the whole takes to start."""
    moments = {"Ray is up": RAY_UP, "echo is ready": f"model {ECHO} ready"}
    moments |= {"SmolLM2 is ready": f"model {SMOLLM} ready", "everything answers": READY}
    rows = [Row(f"{name} after", server.said(words) - server.began, "s") for name, words in moments.items()]
    return [*rows, *way_to_the_engine(server), Row("its first answer then takes", await first(server), "s")]


def way_to_the_engine(server: Server) -> Iterator[Row]:
    """The time to SmolLM2's being ready, piece by piece; all but two of them are ours."""
    starts, _ = server.logged(SMOLLM, "engine starts")
    ready, engine = server.logged(SMOLLM, "engine ready")
    ray_starts, ray_up, answers = map(server.said, (RAY_STARTS, RAY_UP, READY))
    pieces = {
        "the command's imports and checks": ray_starts - server.began,
        "Ray's start": ray_up - ray_starts,
        "the replica's process": starts - ray_up,
        "vLLM's import": engine["import_s"],
        "the engine's start": engine["start_s"],
        "the replica's and the router's word of it": answers - ready,
    }
    for name, seconds in pieces.items():
        yield Row(f"of it {name}", seconds, "s")
    ours = answers - server.began - engine["import_s"] - engine["start_s"]
    yield under("all but vLLM's import and the engine's start", ours, "s", 10)


async def first(server: Server) -> float:
    """Seconds until a short request is answered."""
    asked = perf_counter()
    return await answered_again(server) - asked


async def router(server: Server) -> list[Row]:
    """What a router is before its first request, and how long it took to be there."""
    await asyncio.sleep(IDLE_S)
    process = server.router
    if server.answered is None:
        raise ServerFailed("its port answered too late to say when")
    started = server.answered - server.said(RAY_UP)
    return [
        under("resident memory, idle", process.rss_bytes / MB, "MB", 200),
        Row("answers, once Ray is up, after", started, "s", "about 5", started < 5.5),
        Row("answers, once its process began, after", server.answered - process.began, "s"),
    ]


# ---- batching ------------------------------------------------------------------------------------------


async def batching(server: Server) -> list[Row]:
    """Streams at once against one stream alone."""
    one = Plan(server.target, BATCH, streams=1, requests=ALONE, warm_up=1, expect_tokens=True)
    alone = await measured(one)
    together = await measured(replace(one, streams=BATCHED, requests=BATCHED, warm_up=BATCHED))
    times = figure(together, "duration") / (figure(alone, "mean_e2el_ms") / 1000)
    return [
        whole("streams complete", figure(together, "completed"), BATCHED),
        under("time of 32 streams, over that of one", times, "x", 8),
        Row("one stream alone", figure(alone, "output_throughput"), "tokens/s"),
        Row("32 streams at once", figure(together, "output_throughput"), "tokens/s"),
    ]


# ---- a client that leaves ------------------------------------------------------------------------------


async def cancel(server: Server) -> list[Row]:
    """From a client's leaving until its request and its KV blocks are gone from the engine."""
    rows = []
    for name, workload in {"a stream": LEFT, "a whole answer": replace(LEFT, whole=True)}.items():
        seconds = sorted([await freed(server, workload, number) for number in range(LEAVERS)])
        for part, percent in {"p50": 50, "max": 100}.items():
            rows.append(under(f"{name}, until free, {part}", percentile(seconds, percent), "s", 1))
    return rows


async def freed(server: Server, workload: Workload, number: int) -> float:
    """Seconds from the leaving of a client whose answer was being made until nothing was held for it."""
    async with asking(server, workload, [number]) as (asked,):
        await wait(lambda: begun(asked, workload) and all(held(server)), "an answer in the making")
        left = perf_counter()
    return await wait(lambda: not any(held(server)), "an idle engine", LOOK_S) - left


def held(server: Server) -> list[float]:
    """What the engine holds, as /metrics says."""
    return server.gauges(SMOLLM, "trunkline_replica_running", "trunkline_kv_cache_usage_ratio")


# ---- a replica that is lost ----------------------------------------------------------------------------


async def loss(server: Server) -> list[Row]:
    """SIGKILL in mid-stream: of the replica's actor with all that hangs on it, and of EngineCore alone."""
    rows = []
    for victim in ("actor", "EngineCore"):
        rows += [replace(row, name=f"{victim} killed: {row.name}") for row in await lost(server, victim)]
    return rows


async def lost(server: Server, victim: str) -> list[Row]:
    """What follows the death of one process of the replica."""
    actor = server.replica(SMOLLM)
    dead = [actor, *descendants(actor.pid)]
    async with asking(server, LOST, range(LOST_STREAMS)) as streams:
        await wait(lambda: all(begun(stream, LOST) for stream in streams), "every stream's first text")
        killed = perf_counter()
        os.kill(actor.pid if victim == "actor" else engine_core(actor).pid, signal.SIGKILL)
        gone = asyncio.create_task(wait(lambda: not any(map(lives, dead)), "the end of the dead replica"))
        await asyncio.gather(*(stream.task for stream in streams))
    answers = [stream.answer for stream in streams]
    answered = await answered_again(server)
    successor = engine_core(server.replica(SMOLLM)).began - killed
    orphans = await gone - killed
    return [
        whole("streams with an error event", sum(map(ended_with_error, answers)), LOST_STREAMS),
        under("its last stream ended after", max(answer.ended for answer in answers) - killed, "s", 2),
        Row("its processes were gone after", orphans, "s", "before the next", orphans < successor),
        Row("the new engine started after", successor, "s"),
        Row("a request was answered again after", answered - killed, "s"),
    ]


def engine_core(actor: Process) -> Process:
    """The process of a replica's engine."""
    found = [process for process in descendants(actor.pid) if process.name.startswith(ENGINE_CORE)]
    if len(found) != 1:
        raise NoProcess(f"{len(found)} processes of the replica are called {ENGINE_CORE}, expected one")
    return found[0]


def ended_with_error(answer: Answer) -> bool:
    """Whether a stream's last event was an error, as it should be where bytes had gone out."""
    return answer.failure is not None and answer.failure.kind == "error event"


async def answered_again(server: Server) -> float:
    """The moment at which a request had a good answer, asking anew after each refusal."""
    deadline = perf_counter() + PATIENCE_S
    while perf_counter() < deadline:
        async with asking(server, AFTER, [0]) as (asked,):
            answer = await asked.task
        if answer.failure is None:
            return answer.ended
        await asyncio.sleep(0.1)
    raise TimeoutError(f"no request was answered within {PATIENCE_S:g} s: {answer.failure}")


# ---- many streams --------------------------------------------------------------------------------------


async def scale(server: Server) -> list[Row]:
    """A thousand streams at once through one router, at the pace of readers and as fast as it can."""
    allow_files(MANY_STREAMS + 64)
    plan = Plan(server.target, MANY, MANY_STREAMS, requests=MANY_STREAMS, warm_up=50, expect_tokens=True)
    plan = replace(plan, server_pids=(server.pid,))
    paced = await at_once(server, plan)
    fast = await measured(replace(plan, workload=FAST, requests=FAST_REQUESTS))
    rows = [whole("streams complete", figure(fast, "completed"), FAST_REQUESTS), *pace(server, FAST, fast)]
    return [*paced, *(replace(row, name=f"unpaced: {row.name}") for row in rows)]


async def at_once(server: Server, plan: Plan) -> list[Row]:
    """All the streams at once, and the router's memory before, meanwhile and after."""
    router = server.router.pid
    before = resident(router)
    result, peak = await watched(measured(plan), router)
    await asyncio.sleep(IDLE_S)
    after = resident(router)
    return [
        whole("streams complete", figure(result, "completed"), plan.streams),
        whole("streams between first and last token at once", figure(result, "max_streaming"), plan.streams),
        Row("router's memory before any request", before / MB, "MB"),
        Row("router's memory at its peak", peak / MB, "MB"),
        Row("router's memory after", after / MB, "MB"),
        under("router's memory after, over before", after / before, "x", 1.2),
        *pace(server, plan.workload, result),
    ]


def pace(server: Server, workload: Workload, result: Outcome) -> Iterator[Row]:
    """How fast the streams were, and what each process spent on a token."""
    yield Row("all streams together", figure(result, "output_throughput"), "tokens/s")
    yield Row("time to first token, p50", figure(result, "median_ttft_ms") / 1000, "s")
    yield Row("time to first token, p99", figure(result, "p99_ttft_ms") / 1000, "s")
    yield from cpu(result, {"router": server.router.pid, "replica": server.replica(workload.model).pid})


async def watched(work: Coroutine[Any, Any, Outcome], pid: int) -> tuple[Outcome, int]:
    """The result of some work, and the most resident bytes that a process had meanwhile."""
    task = asyncio.create_task(work)
    peak = 0
    while not task.done():
        peak = max(peak, resident(pid))
        await asyncio.wait([task], timeout=0.05)
    return task.result(), peak


def cpu(result: Outcome, processes: Mapping[str, int]) -> Iterator[Row]:
    """CPU time per token, of some processes and of the whole server; and how busy the generator was."""
    tokens = figure(result, "total_output_tokens")
    spent = {line.pid: line.cpu_seconds or 0.0 for line in result.processes}
    for name, pid in processes.items():
        yield Row(f"{name}'s CPU time per token", spent[pid] / tokens * 1e6, "us")
    yield Row("every server process's CPU time per token", sum(spent.values()) / tokens * 1e6, "us")
    share, limit = result.generator.cpu_share * 100, GENERATOR_LIMIT * 100
    yield Row("load generator, of a core", share, "%", f"under {limit:g}", not result.generator.bounded)


# ---- asking and waiting --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Asked:
    """A request under way, and its answer as it grows."""

    task: asyncio.Task[Answer]
    answer: Answer


@asynccontextmanager
async def asking(server: Server, workload: Workload, numbers: Sequence[int]) -> AsyncIterator[list[Asked]]:
    """One client for each of these requests, all under way; those still there leave with the block."""
    requests = workload.requests(server.target)
    clients = [Client(server.target) for _ in numbers]
    asked = []
    for client, number in zip(clients, numbers, strict=True):
        answer = Answer(perf_counter())
        work = client.ask(requests[number], stream=not workload.whole, limit=PATIENCE_S, into=answer)
        asked.append(Asked(asyncio.create_task(work), answer))
    try:
        yield asked
    finally:
        for one in asked:
            one.task.cancel()
        await asyncio.gather(*(one.task for one in asked), return_exceptions=True)
        for client in clients:
            client.close()


def begun(asked: Asked, workload: Workload) -> bool:
    """Whether it has shown text, if it shows any before its end. Raises ServerFailed if it has ended."""
    if asked.task.done():
        raise ServerFailed(f"an answer ended too early: {asked.answer.failure or 'it was whole'}")
    return workload.whole or bool(asked.answer.chunks)


async def wait(condition: Callable[[], bool], what: str, pause: float = 0.01) -> float:
    """When a condition came to hold, looking every `pause` seconds; meanwhile the streams run on.

    Raises TimeoutError after PATIENCE_S seconds, in the words of `what` was waited for.
    """
    deadline = perf_counter() + PATIENCE_S
    while not await asyncio.to_thread(condition):
        if perf_counter() > deadline:
            raise TimeoutError(f"{what}: not within {PATIENCE_S:g} s")
        await asyncio.sleep(pause)
    return perf_counter()


async def measured(plan: Plan) -> Outcome:
    """The result of one run of the load generator."""
    result = await run(plan)
    for kind, failure in result.failures.items():
        print(f"{failure.count} answers failed, {kind}: {failure.example}", file=sys.stderr)
    return result


def figure(result: Outcome, name: str) -> float:
    """A figure that must be there. Raises ServerFailed where no answer was good."""
    value = result.figures[name]
    if value is None:
        raise ServerFailed(f"there is no {name}: {result.figures['failed']} answers failed")
    return value
