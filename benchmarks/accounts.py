"""What accounts cost: `python -m benchmarks.accounts`.

Two servers with the same simulated engine stand beside each other, one that asks for keys and keeps a ledger
in a file, and one that does not. They are loaded in turns, with many streams at once and with one after
another.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import uvloop
import yaml

from benchmarks.load import Plan, run
from benchmarks.peers.turns import Spread
from benchmarks.processes import NoProcess, Watch, session
from benchmarks.result import RESULTS, Commit, Machine, Record
from benchmarks.rows import Row, table
from benchmarks.server import Server, ServerFailed, serving
from benchmarks.workload import Workload

SIMULATED = Path("deploy/simulated.yaml")
MODEL = "simulated"
PROMPT = "Tell me what a train driver sees from the window on a long journey through the night."

STREAMS, TOKENS = 64, 128
FEW_TOKENS = 8
"""Of an answer where the time to the first one counts."""

WARM_UP = 64

MORE_CPU, MORE_MS = 1.03, 1.0
"""What was promised: CPU per token over that without accounts, and milliseconds of TTFT p50 beyond it."""


@dataclass(frozen=True, slots=True)
class Load:
    """One server's figures in one round."""

    cpu_us_per_token: float
    """Of all its processes, at STREAMS streams."""
    router_us_per_token: float
    ttft_ms: float
    """The median of one stream after another."""


@dataclass(frozen=True, slots=True)
class Round:
    """Both servers' figures, taken in turns."""

    off: Load
    on: Load


@dataclass(frozen=True, slots=True)
class AccountsCost(Record):
    """All rounds."""

    rounds: Sequence[Round]

    @property
    def rows(self) -> list[Row]:
        """The figures beside the promises."""
        cpu = self._spread(lambda each: each.on.cpu_us_per_token / each.off.cpu_us_per_token)
        router = self._spread(lambda each: each.on.router_us_per_token / each.off.router_us_per_token)
        ttft = self._spread(lambda each: each.on.ttft_ms - each.off.ttft_ms)
        return [
            Row("CPU per token without accounts", median(r.off.cpu_us_per_token for r in self.rounds), "us"),
            Row("with them", median(r.on.cpu_us_per_token for r in self.rounds), "us"),
            Row(
                f"over that without ({cpu.low:.3f} to {cpu.high:.3f} in {len(self.rounds)})",
                cpu.middle,
                "x",
                f"at most {MORE_CPU}",
                cpu.middle <= MORE_CPU,
            ),
            Row(
                f"the router's over that without ({router.low:.3f} to {router.high:.3f})", router.middle, "x"
            ),
            Row("TTFT p50 of one stream without accounts", median(r.off.ttft_ms for r in self.rounds), "ms"),
            Row(
                f"beyond that with them ({ttft.low:.2f} to {ttft.high:.2f})",
                ttft.middle,
                "ms",
                f"at most {MORE_MS}",
                ttft.middle <= MORE_MS,
            ),
        ]

    def _spread(self, figure: Callable[[Round], float]) -> Spread:
        spread = Spread.of(map(figure, self.rounds))
        assert spread is not None  # noqa: S101 - there is a round at least
        return spread

    def shown(self) -> Mapping[str, object]:
        return {
            "rounds": [asdict(each) for each in self.rounds],
            "promises": [asdict(row) for row in self.rows],
        }

    def table(self) -> str:
        return table(self.rows)


def configuration(folder: Path, *, enabled: bool) -> Path:
    """The file of the simulated deployment, with accounts or without."""
    config: dict[str, Any] = yaml.safe_load(SIMULATED.read_text())
    path = folder / f"accounts-{enabled}.yaml".lower()
    path.write_text(json.dumps({**config, "accounts": {"enabled": enabled}}))
    return path


async def load(server: Server, seconds: float) -> Load:
    """One server's figures. Raises ServerFailed."""
    watch = Watch([process.pid for process in session(server.pid)])
    router = server.router.pid
    many = await run(
        Plan(server.target, Workload(MODEL, PROMPT, TOKENS), STREAMS, duration=seconds, expect_tokens=True)
    )
    lines = watch.spent()
    few = await run(
        Plan(server.target, Workload(MODEL, PROMPT, FEW_TOKENS), 1, duration=seconds / 2, expect_tokens=True)
    )
    if failures := {**many.failures, **few.failures}:
        raise ServerFailed(f"answers failed: {failures}")
    tokens = many.figures["total_output_tokens"] or 0
    return Load(
        sum(line.cpu_seconds or 0.0 for line in lines) / tokens * 1e6,
        sum(line.cpu_seconds or 0.0 for line in lines if line.pid == router) / tokens * 1e6,
        few.figures["median_ttft_ms"] or 0.0,
    )


async def warm_up(server: Server) -> None:
    """So many answers that are not measured."""
    await run(Plan(server.target, Workload(MODEL, PROMPT, TOKENS), WARM_UP, requests=2 * WARM_UP))


def measure(options: argparse.Namespace, folder: Path) -> list[Round]:
    """One round after another on both servers, each beginning with the other one."""
    rounds = []
    with (
        serving(configuration(folder, enabled=False)) as off,
        serving(configuration(folder, enabled=True)) as on,
    ):
        for server in (off, on):
            uvloop.run(warm_up(server))
        for number in range(options.rounds):
            order = (off, on) if number % 2 else (on, off)
            loads = {server: uvloop.run(load(server, options.seconds)) for server in order}
            rounds.append(Round(loads[off], loads[on]))
            print(f"round {number + 1}: {rounds[-1]}", file=sys.stderr, flush=True)
    return rounds


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. 0: the promises were kept. 1: one was not. 2: it could not run."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    started, commit = datetime.now(UTC), Commit.here()
    try:
        with TemporaryDirectory(prefix="bench-") as folder:
            rounds = measure(options, Path(folder))
    except (ServerFailed, NoProcess, OSError) as error:
        print(f"benchmarks.accounts: {error}", file=sys.stderr)
        return 2
    record = AccountsCost(
        name="accounts",
        started=started,
        command=shlex.join(["python", "-m", "benchmarks.accounts", *arguments]),
        commit=commit,
        machine=Machine.here(),
        workload={"streams": STREAMS, "max_tokens": TOKENS, "prompt": PROMPT, "model": str(SIMULATED)},
        rounds=rounds,
    )
    print(f"{record.table()}\n\nwritten to {record.write(options.results)}")
    return 0 if all(row.met is not False for row in record.rows) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accounts",
        description="Starts trunkline serve with the simulated engine, with accounts and without, loads both"
        " in turns, and prints what accounts cost. Exit status: 0 if no more than was promised, 1 if more, 2"
        " if it could not run.",
    )
    add = parser.add_argument
    add("--seconds", type=float, default=8.0, metavar="S", help="of each load (%(default)s)")
    add("--rounds", type=int, default=7, metavar="N", help="loads of each server (%(default)s)")
    where = "folder of the result (benchmarks/results)"
    add("--results", type=Path, default=RESULTS, metavar="DIR", help=where)
    return parser


if __name__ == "__main__":
    sys.exit(main())
