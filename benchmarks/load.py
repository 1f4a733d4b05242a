"""The load generator: `python -m benchmarks.load --help`.

Closed loop: each stream sends its next request when its last answer has ended, so what the server sees is its
own speed. The figures of a server that answers slowly are those of a server that was asked less.

Open loop: requests are due at moments that do not depend on the answers, and every latency counts from the
moment a request was due. A server that falls behind is asked no less.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import random
import resource
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Protocol

import uvloop

from benchmarks.answer import Answer
from benchmarks.client import BadTarget, Client, Target
from benchmarks.figures import GeneratorCost, count_failures, figures
from benchmarks.lag import lagging
from benchmarks.processes import NoProcess, Watch, listeners
from benchmarks.result import RESULTS, Commit, Machine, Outcome, Result
from benchmarks.workload import Requests, Workload

FAILURE_PAUSE = 0.1
"""Seconds a stream waits after a failed request: a server that refuses is not to be asked in a tight loop."""

OPEN_LOOP_STREAMS = 1024
"""Requests that may be in flight at once in an open loop, unless told otherwise."""

_OTHER_FILES = 64
"""Open files of this process that are not its streams' sockets."""


class BadPlan(ValueError):
    """The options do not make a run; the words say why."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run against which server, and which processes are looked at meanwhile."""

    target: Target
    workload: Workload
    streams: int
    """Requests in flight at once; in an open loop at most, those due beyond them waiting for one to end."""
    requests: int | None = None
    duration: float | None = None
    """Seconds after which no round of requests begins, one for each stream; in an open loop no request. What
    has begun ends. One of `requests` and `duration` is set."""
    rate: float | None = None
    """Requests per second in an open loop; None for a closed one."""
    seed: int = 0
    """Of the moments at which the requests of an open loop are due."""
    warm_up: int = 0
    """Requests sent before the run in a closed loop, which do not count."""
    timeout: float = 300.0
    """Seconds for one answer."""
    expect_tokens: bool = False
    """An answer of other than max_tokens tokens has failed."""
    server_pids: tuple[int, ...] = ()

    def described(self) -> dict[str, object]:
        """For the result: what a reader needs to run it again."""
        work = self.workload
        loop = {"loop": "open", "rate": self.rate, "seed": self.seed} if self.rate else {"loop": "closed"}
        until = {"requests": self.requests} if self.requests is not None else {"duration": self.duration}
        return {
            **loop,
            "model": work.model,
            "streams": self.streams,
            **until,
            "warm_up": self.warm_up,
            "max_tokens": work.max_tokens,
            "whole": work.whole,
            "ignore_eos": work.ignore_eos,
            "prompt": work.prompt,
        }


Turns = Iterator[tuple[int, Answer]]
"""The numbers of requests to send, each with the answer to fill in, which begins when its turn is taken."""


class Stream(Protocol):
    """Where one request at a time is asked."""

    async def ask(self, turns: Turns) -> bool:
        """Send one request after another, each as soon as the last answer is whole, and fill in the answers.

        None after one that has failed; tells whether none has. Raises nothing.
        """

    def close(self) -> None:
        """Let go of what is held. Idempotent."""


class HttpStream:
    """A connection to the plan's target."""

    def __init__(self, plan: Plan, requests: Requests) -> None:
        self._client = Client(plan.target)
        self._plan = plan
        self._requests = requests

    async def ask(self, turns: Turns) -> bool:
        in_bytes = ((self._requests[number], answer) for number, answer in turns)
        whole, limit = self._plan.workload.whole, self._plan.timeout
        return await self._client.converse(in_bytes, stream=not whole, limit=limit)

    def close(self) -> None:
        self._client.close()


def over_http(plan: Plan) -> list[Stream]:
    """The streams of a plan to its target."""
    requests = plan.workload.requests(plan.target)
    return [HttpStream(plan, requests) for _ in range(plan.streams)]


async def run(
    plan: Plan,
    streams_of: Callable[[Plan], Sequence[Stream]] = over_http,
    begins: Callable[[], object] = lambda: None,
) -> Outcome:
    """Carry out the plan. `begins` is called where its warm-up has ended and what counts begins.

    Raises NoProcess where a server process to measure is not there.
    """
    streams = streams_of(plan)
    try:
        await _closed_loop(streams, iter(range(plan.warm_up)))
        watch = Watch(plan.server_pids)
        begins()
        with lagging() as lag:
            cpu, clock = time.process_time(), perf_counter()
            if plan.rate is None:
                answers = await _closed_loop(streams, _numbers(plan, clock))
            else:
                answers = await _open_loop(streams, _arrivals(plan, plan.rate, clock))
            duration, cpu = perf_counter() - clock, time.process_time() - cpu
        processes = watch.spent()
    finally:
        for stream in streams:
            stream.close()
    for answer in answers:
        _check_length(plan, answer)
    generator = GeneratorCost.of(cpu, duration, answers, lag)
    return Outcome(figures(answers, duration), count_failures(answers), generator, processes)


def _numbers(plan: Plan, started: float) -> Iterator[int]:
    """The requests to send, those of the warm-up not among them; ends when the run is to end.

    By duration it ends with a whole round: where streams keep step with each other, a part of one would be
    answered by a server that has less to do, and how much of one there is would be chance.
    """
    end = math.inf if plan.duration is None else started + plan.duration
    for sent in itertools.count():
        if sent == plan.requests or (sent % plan.streams == 0 and perf_counter() >= end):
            return
        yield plan.warm_up + sent


def _arrivals(plan: Plan, rate: float, started: float) -> Iterator[tuple[int, float]]:
    """Each request with the moment at which it is due: a Poisson process, the same one for the same seed."""
    source = random.Random(plan.seed)
    due = started
    for number in itertools.count(plan.warm_up):
        due += source.expovariate(rate)
        if number - plan.warm_up == plan.requests or (plan.duration and due >= started + plan.duration):
            return
        yield number, due


async def _closed_loop(streams: Sequence[Stream], numbers: Iterator[int]) -> list[Answer]:
    answers: list[Answer] = []

    def turns() -> Turns:
        for number in numbers:
            answer = Answer(perf_counter())
            answers.append(answer)
            yield number, answer

    async def one_after_another(stream: Stream) -> None:
        while not await stream.ask(turns()):  # noqa: ASYNC110 - the pause is meant
            await asyncio.sleep(FAILURE_PAUSE)

    async with asyncio.TaskGroup() as group:
        for stream in streams:
            group.create_task(one_after_another(stream))
    return answers


async def _open_loop(streams: Sequence[Stream], arrivals: Iterator[tuple[int, float]]) -> list[Answer]:
    answers: list[Answer] = []
    free = asyncio.LifoQueue[Stream]()  # the last one used first: no more connections than are needed
    for stream in reversed(streams):
        free.put_nowait(stream)

    async def one(stream: Stream, number: int, due: float) -> None:
        answer = Answer(due, lag=perf_counter() - due)
        answers.append(answer)
        await stream.ask(iter([(number, answer)]))
        free.put_nowait(stream)

    async with asyncio.TaskGroup() as group:
        for number, due in arrivals:
            await _until(due)
            group.create_task(one(await free.get(), number, due))
    return answers


async def _until(moment: float) -> None:
    # uvloop wakes to the millisecond, early or late, so what is left may be slept in pieces.
    while (left := moment - perf_counter()) > 0:  # noqa: ASYNC110 - no event but the time's passing
        await asyncio.sleep(left)


def _check_length(plan: Plan, answer: Answer) -> None:
    wanted, got = plan.workload.max_tokens, answer.completion_tokens
    if plan.expect_tokens and got != wanted:
        answer.fail("wrong length", f"{got} tokens where {wanted} were asked for", answer.ended)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. 0: every answer was good. 1: some failed. 2: it could not run. 130: interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    try:
        plan = _plan(options)
        allow_files(plan.streams + _OTHER_FILES)
        options.results.mkdir(parents=True, exist_ok=True)
        started, commit = datetime.now(UTC), Commit.here()
        outcome = uvloop.run(run(plan))
    except (BadTarget, BadPlan, NoProcess, OSError) as error:
        print(f"benchmarks.load: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    result = Result(
        name=options.name or plan.workload.model,
        started=started,
        command=shlex.join(["python", "-m", "benchmarks.load", *arguments]),
        commit=commit,
        machine=Machine.here(),
        workload=plan.described(),
        outcome=outcome,
    )
    print(f"{result.table()}\n\nwritten to {result.write(options.results)}")
    return 1 if outcome.failures else 0


def allow_files(wanted: int) -> None:
    """Let this process have `wanted` files open. Raises BadPlan where the system's hard limit is lower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and wanted > hard:
        raise BadPlan(
            f"{wanted} open files are needed, one for each stream; the hard limit (ulimit -Hn) is {hard}"
        )
    if wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _plan(options: argparse.Namespace) -> Plan:
    for name in ("streams", "requests", "duration", "rate", "max_tokens", "timeout"):
        value = getattr(options, name)
        if value is not None and not value > 0:  # so that "nan" is refused too
            raise BadPlan(f"--{name.replace('_', '-')} is {value}; more than 0 is needed")
    if options.warm_up < 0:
        raise BadPlan(f"--warm-up is {options.warm_up}; at least 0 is needed")
    streams = options.streams or (1 if options.rate is None else OPEN_LOOP_STREAMS)
    if options.rate is None and options.requests is not None and options.requests < streams:
        raise BadPlan(f"--requests {options.requests} would leave some of --streams {streams} without work")
    pids = [*options.server_pid, *(pid for port in options.server_port for pid in listeners(port))]
    return Plan(
        target=Target.parse(options.url),
        workload=Workload(
            model=options.model,
            prompt=options.prompt,
            max_tokens=options.max_tokens,
            whole=options.whole,
            ignore_eos=options.ignore_eos,
        ),
        streams=streams,
        requests=options.requests,
        duration=options.duration,
        rate=options.rate,
        seed=options.seed,
        warm_up=options.warm_up,
        timeout=options.timeout,
        expect_tokens=options.expect_tokens,
        server_pids=tuple(pids),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load",
        description="Loads a chat completions server on this machine, in a closed loop (each stream sends "
        "its next request when its last answer has ended) or at a rate. Prints a table, leaves a JSON file.",
    )
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="the server; loopback addresses only (%(default)s)")
    add("--model", required=True, help="the model's name")
    at_most = f"requests in flight at once (1; at a rate at most {OPEN_LOOP_STREAMS})"
    add("--streams", type=int, metavar="N", help=at_most)
    add("--rate", type=float, metavar="R", help="open loop: so many requests a second, at random moments")
    add("--seed", type=int, default=0, metavar="N", help="of the moments of an open loop (%(default)s)")
    until = parser.add_mutually_exclusive_group(required=True)
    until.add_argument("--requests", type=int, metavar="N", help="send so many requests in all")
    until.add_argument(
        "--duration", type=float, metavar="S", help="begin rounds of requests for so many seconds"
    )
    add("--warm-up", type=int, default=0, metavar="N", help="requests sent before, not counted (%(default)s)")
    add("--max-tokens", type=int, default=128, metavar="N", help="of each answer (%(default)s)")
    add(
        "--prompt", default="Tell me about the history of the railway.", help="the user message (%(default)s)"
    )
    add("--whole", action="store_true", help="ask for whole answers, not streams")
    add("--ignore-eos", action="store_true", help="ask for max_tokens tokens, whatever the model says")
    add("--expect-tokens", action="store_true", help="an answer of other than max_tokens tokens has failed")
    add("--timeout", type=float, default=300.0, metavar="S", help="for one answer (%(default)s)")
    pids = "measure this process and its descendants; may be repeated"
    add("--server-pid", type=int, action="append", default=[], metavar="PID", help=pids)
    ports = "measure the processes that listen on this port and their descendants; may be repeated"
    add("--server-port", type=int, action="append", default=[], metavar="PORT", help=ports)
    add("--name", help="of the result file (the model's)")
    add(
        "--results",
        type=Path,
        default=RESULTS,
        metavar="DIR",
        help="folder of the result file (benchmarks/results)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
