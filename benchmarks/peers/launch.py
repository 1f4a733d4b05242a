"""A peer's command: started in a session of its own, awaited, told apart into shares, taken down.

Only processes of that session are ever looked at or ended.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.client import Client, Target
from benchmarks.peers.peer import MODEL, PeerFailed, Share
from benchmarks.processes import Process, session
from benchmarks.server import ServerFailed, kill_session
from benchmarks.workload import Workload

ROOT = Path(__file__).parents[2]

START_S = 600.0
"""Seconds that a start may take."""

ASK_S = 30.0
"""Seconds that one answer may take during the start."""

KNOCK_S = 0.2
"""Seconds between two requests during the start."""

STOP_S = 60.0
"""Seconds that an end may take before what is left is killed."""

ENGINE_CORE = {"VLLM::EngineCore": "engine core", "VLLM::Worker": "workers"}
"""What vLLM calls the processes of its scheduler and, where the model is real, of the model."""

_TAIL = 3000
_FOREIGN = ("PYTHON", "VLLM_", "RAY_", "RAYLLM_", "LITELLM_")


@dataclass(frozen=True, slots=True)
class Session:
    """The processes of one started command."""

    leader: int
    rest: str
    """The share of those that no name tells apart."""
    names: Mapping[str, str] = field(default_factory=dict)
    """How names begin, and the share of such processes."""

    def share(self, process: Process) -> str:
        """The name of the share that a process belongs to."""
        found = (share for start, share in self.names.items() if process.name.startswith(start))
        return next(found, self.rest)


@dataclass(frozen=True, slots=True)
class Answering:
    """A `Running` made of one session or several."""

    target: Target
    report: Path
    sessions: Sequence[Session]

    def shares(self) -> Sequence[Share]:
        shares: dict[str, list[Process]] = {}
        for started in self.sessions:
            for process in session(started.leader):
                shares.setdefault(started.share(process), []).append(process)
        return [Share(name, processes) for name, processes in shares.items()]


def environment(**more: str) -> dict[str, str]:
    """This process's environment and `more`.

    Without what a developer's shell may tell Python, vLLM or Ray: byte code is cached, hashes are random.
    """
    ours = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    quiet = {"VLLM_NO_USAGE_STATS": "1", "RAY_USAGE_STATS_ENABLED": "0", "DO_NOT_TRACK": "1"}
    return {**ours, **quiet, "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1", **more}


@contextmanager
def launched(
    command: Sequence[str | Path], target: Target, log: Path, environment: Mapping[str, str]
) -> Iterator[int]:
    """A server that answers at `target` in the block and is gone after it. Yields its session's id.

    It runs in the log's folder. Raises PeerFailed where it does not start, or ends by itself.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            env=environment,
            start_new_session=True,
        )
    try:
        wait_answering(target, process, log)
        yield process.pid
        _check_alive(process, log)
    finally:
        _end(process)


def wait_answering(target: Target, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when a chat completion of one token succeeds. Raises PeerFailed."""
    request = Workload(MODEL, "Hello.", max_tokens=1, whole=True).requests(target)[0]
    deadline = time.monotonic() + START_S
    while (failure := asyncio.run(_failure(target, request))) is not None:
        _check_alive(process, log)
        if time.monotonic() > deadline:
            raise PeerFailed(f"it did not answer within {START_S:g} s: {failure}; {log} ends:\n{tail(log)}")
        time.sleep(KNOCK_S)


async def _failure(target: Target, request: bytes) -> str | None:
    client = Client(target)
    try:
        answer = await client.ask(request, stream=False, limit=ASK_S)
    finally:
        client.close()
    return None if answer.failure is None else str(answer.failure)


def _check_alive(process: subprocess.Popen[bytes], log: Path) -> None:
    if (status := process.poll()) is not None:
        raise PeerFailed(f"it ended by itself with status {status}; {log} ends:\n{tail(log)}")


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
    try:
        kill_session(process.pid)
    except ServerFailed as error:
        raise PeerFailed(str(error)) from error
    process.wait()


def tail(log: Path) -> str:
    """The end of a log, to be shown with what went wrong."""
    return log.read_bytes()[-_TAIL:].decode(errors="replace") if log.exists() else "(there is no log)"
