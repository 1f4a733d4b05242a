"""The load generator: `python -m benchmarks.load --help`.

Closed loop: each stream sends its next request when its last answer has ended, so what the server sees is its
own speed. The figures of a server that answers slowly are those of a server that was asked less.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import resource
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import uvloop

from benchmarks.answer import Answer
from benchmarks.client import BadTarget, Client, Target
from benchmarks.figures import GeneratorCost, count_failures, figures
from benchmarks.processes import NoProcess, Watch, listeners
from benchmarks.result import RESULTS, Commit, Machine, Result
from benchmarks.workload import Requests, Workload

FAILURE_PAUSE = 0.1
"""Seconds a stream waits after a failed request: a server that refuses is not to be asked in a tight loop."""

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
    """Requests in flight at once."""
    requests: int | None = None
    duration: float | None = None
    """Seconds after which no request begins; those in flight end. One of `requests` and `duration` is set."""
    warm_up: int = 0
    """Requests sent before the run, which do not count."""
    timeout: float = 300.0
    """Seconds for one answer."""
    expect_tokens: bool = False
    """An answer of other than max_tokens tokens has failed."""
    server_pids: tuple[int, ...] = ()

    def described(self) -> dict[str, object]:
        """For the result: what a reader needs to run it again."""
        work = self.workload
        until = {"requests": self.requests} if self.requests is not None else {"duration": self.duration}
        return {
            "loop": "closed",
            "model": work.model,
            "streams": self.streams,
            **until,
            "warm_up": self.warm_up,
            "max_tokens": work.max_tokens,
            "whole": work.whole,
            "ignore_eos": work.ignore_eos,
            "prompt": work.prompt,
        }


async def run(plan: Plan, *, name: str, command: str) -> Result:
    """Carry out the plan. Raises NoProcess where a server process to measure is not there."""
    requests = plan.workload.requests(plan.target)
    clients = [Client(plan.target) for _ in range(plan.streams)]
    try:
        await _closed_loop(plan, clients, requests, iter(range(plan.warm_up)))
        started = datetime.now(UTC)
        watch = Watch(plan.server_pids)
        cpu, clock = time.process_time(), time.perf_counter()
        answers = await _closed_loop(plan, clients, requests, _numbers(plan, clock))
        duration, cpu = time.perf_counter() - clock, time.process_time() - cpu
        processes = watch.spent()
    finally:
        for client in clients:
            client.close()
    return Result(
        name=name,
        started=started,
        command=command,
        commit=Commit.here(),
        machine=Machine.here(),
        workload=plan.described(),
        figures=figures(answers, duration),
        failures=count_failures(answers),
        generator=GeneratorCost.of(cpu, duration, answers),
        processes=processes,
    )


def _numbers(plan: Plan, started: float) -> Iterator[int]:
    """The requests to send, those of the warm-up not among them; ends when the run is to end."""
    end = math.inf if plan.duration is None else started + plan.duration
    for number in itertools.count(plan.warm_up):
        if number - plan.warm_up == plan.requests or time.perf_counter() >= end:
            return
        yield number


async def _closed_loop(
    plan: Plan, clients: Sequence[Client], requests: Requests, numbers: Iterator[int]
) -> list[Answer]:
    answers: list[Answer] = []

    async def one_stream(client: Client) -> None:
        for number in numbers:
            answer = await client.ask(requests[number], stream=not plan.workload.whole, limit=plan.timeout)
            _check_length(plan, answer)
            answers.append(answer)
            if answer.failure is not None:
                await asyncio.sleep(FAILURE_PAUSE)

    async with asyncio.TaskGroup() as group:
        for client in clients:
            group.create_task(one_stream(client))
    return answers


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
        command = shlex.join(["python", "-m", "benchmarks.load", *arguments])
        result = uvloop.run(run(plan, name=options.name or plan.workload.model, command=command))
    except (BadTarget, BadPlan, NoProcess, OSError) as error:
        print(f"benchmarks.load: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    path = result.write(options.results)
    print(f"{result.table()}\n\nwritten to {path}")
    return 1 if result.failures else 0


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
    for name in ("streams", "requests", "duration", "max_tokens", "timeout"):
        value = getattr(options, name)
        if value is not None and not value > 0:  # so that "nan" is refused too
            raise BadPlan(f"--{name.replace('_', '-')} is {value}; more than 0 is needed")
    if options.warm_up < 0:
        raise BadPlan(f"--warm-up is {options.warm_up}; at least 0 is needed")
    if options.requests is not None and options.requests < options.streams:
        raise BadPlan(
            f"--requests {options.requests} would leave some of --streams {options.streams} without work"
        )
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
        streams=options.streams,
        requests=options.requests,
        duration=options.duration,
        warm_up=options.warm_up,
        timeout=options.timeout,
        expect_tokens=options.expect_tokens,
        server_pids=tuple(pids),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load",
        description="Loads a chat completions server on this machine in a closed loop: each stream sends its "
        "next request when its last answer has ended. Prints a table and writes a JSON result.",
    )
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="the server; loopback addresses only (%(default)s)")
    add("--model", required=True, help="the model's name")
    add("--streams", type=int, default=1, metavar="N", help="requests in flight at once (%(default)s)")
    until = parser.add_mutually_exclusive_group(required=True)
    until.add_argument("--requests", type=int, metavar="N", help="send so many requests in all")
    until.add_argument("--duration", type=float, metavar="S", help="begin requests for so many seconds")
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
