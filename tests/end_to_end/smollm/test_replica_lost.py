from __future__ import annotations

import asyncio
import time

import psutil
import pytest

from tests.end_to_end.client import ask, asking, chat
from tests.end_to_end.conftest import Report
from tests.end_to_end.server import START_S, Server, until
from tests.end_to_end.smollm import ECHO, PARIS, QUEUE_S, SMOLLM

ENGINE_CORE = ("VLLM::EngineCore", "spawn_main")
"""What the command line of an engine holds: vLLM's title for it, or, where that cannot be set (after
a change to the first variable of its environment), what it was started as."""


@pytest.mark.parametrize("victim", ["actor", "EngineCore"])
async def test_a_lost_engine_ends_its_streams_and_comes_back(
    server: Server, victim: str, report: Report
) -> None:
    """When a replica's process, or its engine's alone, is killed in mid-stream, each of its streams ends with
    an error event and none hangs; requests wait for the queue time and get 503; everything of the dead
    replica is gone before the new engine starts; the first request after that is answered; and the other
    model notices nothing."""
    (actor,) = server.replicas(SMOLLM).values()
    dead = [actor, *actor.children(recursive=True)]
    core = engine_core(server, actor)
    bodies = [
        chat(SMOLLM, f"Tell me story {number}.", max_tokens=3000, ignore_eos=True, stream=True)
        for number in range(8)
    ]
    async with asyncio.TaskGroup() as tasks:
        echo = tasks.create_task(ask(server, chat(ECHO, "a b c", max_tokens=300, stream=True)))
        streams = [await opened(server, body, tasks) for body in bodies]
        (actor if victim == "actor" else core).kill()
        killed_at = time.perf_counter()
        all_gone = tasks.create_task(asyncio.to_thread(gone, dead))
        ends = [await stream for stream in streams]
        refused = await ask(server, chat(SMOLLM, PARIS))
    for code, done, ended_at in ends:
        assert code == "replica_lost"
        assert not done
        assert ended_at - killed_at < 10
    ended = max(ended_at for _, _, ended_at in ends) - killed_at
    report(f"{victim} killed: its streams ended after", f"{ended:.2f} s (promised: 2)")

    assert refused.status == 503
    assert refused.error["code"] == "no_replica"
    assert int(refused.headers["retry-after"]) >= 1
    assert QUEUE_S <= refused.seconds < QUEUE_S + 5
    assert echo.result().text() == " ".join(["a b c"] * 100)

    await asyncio.to_thread(until, lambda: server.states()[SMOLLM] == "ready", START_S, "a new replica")
    report(f"{victim} killed: ready again after", f"{time.perf_counter() - killed_at:.1f} s")
    answer = await ask(server, chat(SMOLLM, PARIS, temperature=0))
    assert answer.status == 200
    assert "Paris" in answer.text()
    (successor,) = server.replicas(SMOLLM).values()
    assert all_gone.result() < engine_core(server, successor).create_time()


async def opened(
    server: Server, body: dict[str, object], tasks: asyncio.TaskGroup
) -> asyncio.Task[tuple[str, bool, float]]:
    """A stream that has begun: a task for the error, whether [DONE] came, and when it ended."""
    begun = asyncio.Event()

    async def read() -> tuple[str, bool, float]:
        async with asking(server, body) as exchange:
            await exchange.first()
            begun.set()
            await exchange.end()
        return exchange.error["code"], exchange.done, exchange.ended_at

    task = tasks.create_task(read())
    await begun.wait()
    return task


def engine_core(server: Server, replica: psutil.Process) -> psutil.Process:
    """The process in which a replica's engine runs."""
    # psutil's own `children` leaves out what looks older than its parent after the clock was set.
    children = [process for process in server.processes() if process.ppid() == replica.pid]
    commands = {process: " ".join(process.cmdline()) for process in children}
    cores = [process for process, command in commands.items() if any(map(command.count, ENGINE_CORE))]
    assert len(cores) == 1, list(commands.values())
    return cores[0]


def gone(processes: list[psutil.Process]) -> float:
    """When the last of them was gone, in Unix seconds."""
    until(
        lambda: not any(alive(process) for process in processes), 60, "the end of a dead replica's processes"
    )
    return time.time()


def alive(process: psutil.Process) -> bool:
    """Whether a process lives; a dead one that nobody has asked for does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
