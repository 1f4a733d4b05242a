"""The floor: vLLM's AsyncLLM in the load generator's own process, with no HTTP and no server around it.

`python -m benchmarks.peers.bare ENGINE REPORT` makes the engine, says `{}` when it is ready, and measures one
point for each line of JSON that it reads, `{"name": "64", "rate": null}`, and answers with a line. `{}` asks
for the warm-up. It ends where its input does. `Bare` speaks with it.

Rendering by the chat template and tokenizing are in every request, as in a server, and so are vLLM's own
statistics. Its process's CPU time is the engine's front half and the load generator's, which is small here:
it reads no sockets.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import IO, Any

import uvloop

from benchmarks.answer import Answer
from benchmarks.client import Target
from benchmarks.load import Plan, Stream, Turns
from benchmarks.peers.launch import ENGINE_CORE, ROOT, Answering, Session, environment, tail
from benchmarks.peers.measure import Measured, Measurement
from benchmarks.peers.peer import PeerFailed
from benchmarks.peers.settings import ENGINES, Engine
from benchmarks.server import kill_session

NAME = "bare"
TITLE = "AsyncLLM in process, vLLM"

NOWHERE = Target("in process", 0)

STOP_S = 30.0
"""Seconds that its end may take before what is left is killed."""


class Bare:
    """The process of the bare engine, as the one that measures sees it."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log

    def warm_up(self) -> Measurement:
        """See `Measured.warm_up`. Raises PeerFailed."""
        return Measurement(**self._ask({}))

    def at(self, name: str, rate: float | None) -> Measurement:
        """See `Measured.at`. Raises PeerFailed."""
        return Measurement(**self._ask({"name": name, "rate": rate}))

    def wait_ready(self) -> None:
        """Return when the engine is there. Raises PeerFailed."""
        self._answer()

    def _ask(self, question: object) -> Any:
        assert self._process.stdin is not None  # noqa: S101 - it is a pipe
        with suppress(BrokenPipeError):  # it has ended, as the missing answer says
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None  # noqa: S101 - it is a pipe
        line = self._process.stdout.readline()
        if not line:
            raise PeerFailed(f"the bare engine has ended; {self._log} ends:\n{tail(self._log)}")
        return json.loads(line)


@contextmanager
def running(engine: Engine, folder: Path) -> Iterator[Bare]:
    """The bare engine, ready in the block and gone after it, its log in `folder`. Raises PeerFailed."""
    log = folder / "bare.log"
    command = [sys.executable, "-m", "benchmarks.peers.bare", engine.name, str(folder / "report.json")]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            cwd=ROOT,
            env=environment(),
            start_new_session=True,
        )
    try:
        bare = Bare(process, log)
        bare.wait_ready()
        yield bare
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=STOP_S)
    finally:
        kill_session(process.pid)
        process.wait()


# ---- within its process --------------------------------------------------------------------------------


class EngineStream:
    """Requests to the engine, one at a time, each a stream of its own."""

    def __init__(self, llm: Any, plan: Plan) -> None:
        from vllm import SamplingParams  # noqa: PLC0415 - slow, and after the environment is set
        from vllm.renderers import ChatParams  # noqa: PLC0415
        from vllm.sampling_params import RequestOutputKind  # noqa: PLC0415

        work = plan.workload
        self._llm = llm
        self._prompt = work.prompt
        self._template = ChatParams(chat_template_kwargs={"add_generation_prompt": True, "tokenize": False})
        self._params = SamplingParams(
            temperature=0.0,
            max_tokens=work.max_tokens,
            ignore_eos=work.ignore_eos,
            output_kind=RequestOutputKind.FINAL_ONLY if work.whole else RequestOutputKind.DELTA,
        )

    async def ask(self, turns: Turns) -> bool:
        for number, answer in turns:
            await self._one(number, answer)
        return True

    async def _one(self, number: int, answer: Answer) -> None:
        conversation = [{"role": "user", "content": f"{number:08d} {self._prompt}"}]
        _, (prompt,) = await self._llm.renderer.render_chat_async([conversation], self._template)
        tokens = 0
        async for output in self._llm.generate(prompt, self._params.clone(), f"{id(self)}-{number}"):
            (choice,) = output.outputs
            tokens += len(choice.token_ids)
            if choice.text:
                answer.chunks.append(perf_counter())
        answer.ended = perf_counter()
        answer.prompt_tokens = len(prompt["prompt_token_ids"])
        answer.completion_tokens = tokens

    def close(self) -> None:
        """Nothing is held between requests."""


async def _serve(engine: Engine, report: Path, output: IO[str]) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: PLC0415 - slow, and after the environment is set
    from vllm.usage.usage_lib import UsageContext  # noqa: PLC0415
    from vllm.utils.gc_utils import freeze_gc_heap  # noqa: PLC0415
    from vllm.v1.engine.async_llm import AsyncLLM  # noqa: PLC0415

    arguments = AsyncEngineArgs(**engine.model_arguments(), **engine.arguments(report))
    llm = AsyncLLM.from_engine_args(arguments, usage_context=UsageContext.OPENAI_API_SERVER)

    server = Answering(NOWHERE, report, [Session(os.getpid(), "server", ENGINE_CORE)])

    def streams_of(plan: Plan) -> list[Stream]:
        return [EngineStream(llm, plan) for _ in range(plan.streams)]

    measured = Measured(server, streams_of)
    try:
        freeze_gc_heap()  # as vLLM's servers do: what a start leaves is not walked through again
        _say({}, output)
        while line := await asyncio.to_thread(sys.stdin.readline):
            asked = json.loads(line)
            _say(asdict(await (measured.at(**asked) if asked else measured.warm_up())), output)
    finally:
        llm.shutdown()


def _say(answer: object, output: IO[str]) -> None:
    output.write(json.dumps(answer) + "\n")
    output.flush()


def _main(engine: Engine, report: Path) -> None:
    # vLLM writes to standard output; the answers keep it to themselves.
    with os.fdopen(os.dup(1), "w") as output:
        os.dup2(2, 1)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
        uvloop.run(_serve(engine, report, output))


if __name__ == "__main__":
    _main(ENGINES[sys.argv[1]], Path(sys.argv[2]))
