"""What a token costs the router when streams are spread over many models: `python -m benchmarks.many_models`.

Two servers stand beside each other, one with a single echo model and one with many. They are loaded in turns,
with the same number of streams to each model. A model that costs the router something for being there, and
not for its tokens, shows in the ratio.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import uvloop

from benchmarks.load import Plan, run
from benchmarks.peers.turns import Spread
from benchmarks.processes import NoProcess, Watch
from benchmarks.result import RESULTS, Commit, Machine, Outcome, Record
from benchmarks.rows import Row, table
from benchmarks.server import Server, ServerFailed, serving
from benchmarks.workload import Workload

MANY = 16

PACE = 50
"""Tokens per second of a stream."""

TOKENS = 200
"""Of an answer: 4 seconds."""

PROMPT = "so many words that each of them returns a few times"


@dataclass(frozen=True, slots=True)
class Round:
    """The router's CPU microseconds per token with one model and with many."""

    one: float
    many: float


@dataclass(frozen=True, slots=True)
class ManyModels(Record):
    """All rounds."""

    rounds: Sequence[Round]

    @property
    def rows(self) -> list[Row]:
        """The figures beside the target."""
        ratio = Spread.of(each.many / each.one for each in self.rounds)
        assert ratio is not None  # noqa: S101 - there is a round at least
        name = f"with {MANY} models, over that with 1 ({ratio.low:.2f} to {ratio.high:.2f})"
        return [
            Row("router's CPU per token with 1 model", median(each.one for each in self.rounds), "us"),
            Row(f"with {MANY} models", median(each.many for each in self.rounds), "us"),
            Row(name, ratio.middle, "x", "at most 1", ratio.middle <= 1.0),
        ]

    def shown(self) -> Mapping[str, object]:
        return {
            "rounds": [asdict(each) for each in self.rounds],
            "promises": [asdict(row) for row in self.rows],
        }

    def table(self) -> str:
        return table(self.rows)


def configuration(models: int, folder: Path) -> Path:
    """The file of a deployment of so many echo models."""
    path = folder / f"echo-{models}.yaml"
    paced = {"engine": "echo", "engine_args": {"tokens_per_second": PACE}}
    path.write_text(json.dumps({"models": [{"name": name, **paced} for name in _names(models)]}))
    return path


def _names(models: int) -> list[str]:
    return [f"echo-{number}" for number in range(models)]


async def router_cost(server: Server, models: int, streams: int, seconds: float) -> float:
    """CPU microseconds of the router per token, at so many streams to each model. Raises ServerFailed."""
    plans = [
        Plan(
            server.target,
            Workload(name, PROMPT, TOKENS),
            streams,
            duration=seconds,
            expect_tokens=True,
        )
        for name in _names(models)
    ]
    watch = Watch([server.router.pid])
    results: list[Outcome] = await asyncio.gather(*(run(plan) for plan in plans))
    spent = sum(line.cpu_seconds or 0.0 for line in watch.spent())
    for result in results:
        if result.failures:
            raise ServerFailed(f"answers failed: {result.failures}")
    return spent / sum(result.figures["total_output_tokens"] or 0 for result in results) * 1e6


def measure(options: argparse.Namespace, folder: Path) -> list[Round]:
    """One round after another on both servers."""
    rounds = []
    with serving(configuration(1, folder)) as one, serving(configuration(MANY, folder)) as many:
        for _ in range(options.rounds):
            costs = [
                uvloop.run(router_cost(server, models, options.streams, options.seconds))
                for server, models in ((one, 1), (many, MANY))
            ]
            rounds.append(Round(*costs))
            print(f"{costs[0]:.1f} us with one, {costs[1]:.1f} us with {MANY}", file=sys.stderr, flush=True)
    return rounds


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. 0: the target was met. 1: it was not. 2: it could not run."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    started, commit = datetime.now(UTC), Commit.here()
    try:
        with TemporaryDirectory(prefix="bench-") as folder:
            rounds = measure(options, Path(folder))
    except (ServerFailed, NoProcess, OSError) as error:
        print(f"benchmarks.many_models: {error}", file=sys.stderr)
        return 2
    record = ManyModels(
        name="many-models",
        started=started,
        command=shlex.join(["python", "-m", "benchmarks.many_models", *arguments]),
        commit=commit,
        machine=Machine.here(),
        workload={
            "models": MANY,
            "streams_per_model": options.streams,
            "tokens_per_second": PACE,
            "max_tokens": TOKENS,
        },
        rounds=rounds,
    )
    print(f"{record.table()}\n\nwritten to {record.write(options.results)}")
    return 0 if all(row.met is not False for row in record.rows) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.many_models",
        description=f"Starts trunkline serve with one echo model and with {MANY}, loads both in turns, and "
        "prints what a token costs the router. Exit status: 0 if it costs no more with many, 1 if it does, 2 "
        "if it could not run.",
    )
    add = parser.add_argument
    add("--streams", type=int, default=16, metavar="N", help="to each model (%(default)s)")
    add("--seconds", type=float, default=12.0, metavar="S", help="of each load (%(default)s)")
    add("--rounds", type=int, default=5, metavar="N", help="loads of each server (%(default)s)")
    where = "folder of the result (benchmarks/results)"
    add("--results", type=Path, default=RESULTS, metavar="DIR", help=where)
    return parser


if __name__ == "__main__":
    sys.exit(main())
