"""What was promised as a time or a size, measured: `python -m benchmarks.promises --help`.

Starts `trunkline serve` on this machine, prints each figure beside its promise, and takes everything down.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import uvloop

from benchmarks import points
from benchmarks.load import BadPlan
from benchmarks.processes import NoProcess
from benchmarks.result import RESULTS, Commit, Machine, Record
from benchmarks.rows import Row, table
from benchmarks.server import Server, ServerFailed, serving
from benchmarks.workload import Workload

ROOT = Path(__file__).parents[1]
LOCAL = Path("deploy/local.yaml")
ECHO_ALONE = Path("benchmarks/echo.yaml")


@dataclass(frozen=True, slots=True)
class Point:
    """Something that is promised: how it is measured, and on which server."""

    config: Path
    measure: Callable[[Server], Coroutine[Any, Any, list[Row]]]
    workload: Mapping[str, object]

    @property
    def sentence(self) -> str:
        """What is measured."""
        return (self.measure.__doc__ or "").partition("\n")[0]


def _work(workload: Workload, **more: object) -> dict[str, object]:
    return {**asdict(workload), **more}


POINTS = {
    "start": Point(LOCAL, points.start, {}),
    "router": Point(LOCAL, points.router, {"idle_s": points.IDLE_S}),
    "batching": Point(
        LOCAL, points.batching, _work(points.BATCH, streams=points.BATCHED, alone=points.ALONE)
    ),
    "cancel": Point(LOCAL, points.cancel, _work(points.LEFT, clients=points.LEAVERS, at_once=1)),
    "loss": Point(LOCAL, points.loss, _work(points.LOST, streams=points.LOST_STREAMS)),
    "router-alone": Point(ECHO_ALONE, points.router, {"idle_s": points.IDLE_S}),
    "scale": Point(
        ECHO_ALONE,
        points.scale,
        _work(points.MANY, streams=points.MANY_STREAMS, unpaced_requests=points.FAST_REQUESTS),
    ),
}
"""By the name that --only takes, those of one server together."""


@dataclass(frozen=True, slots=True)
class Report(Record):
    """Every figure that was measured, and the promises."""

    rows: Sequence[Row]
    load_average: float
    """Of the machine, over the minute before the run: what else was going on."""

    @property
    def kept(self) -> bool:
        """Whether every promise was."""
        return all(row.met is not False for row in self.rows)

    def shown(self) -> Mapping[str, object]:
        return {"load_average": self.load_average, "promises": [asdict(row) for row in self.rows]}

    def table(self) -> str:
        return table(self.rows)


def measure(names: Sequence[str]) -> Iterator[list[Row]]:
    """Start each server that these points need, and measure them on it, saying what is being done."""
    for config, group in itertools.groupby(names, key=lambda name: POINTS[name].config):
        _say(f"starting trunkline serve {config}")
        with serving(ROOT / config) as server:
            for name in group:
                point = POINTS[name]
                _say(f"{name}: {point.sentence}")
                rows = uvloop.run(point.measure(server))
                yield [replace(row, name=f"{name}: {row.name}") for row in rows]
    _say("everything is taken down")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. 0: every promise was kept. 1: some were not. 2: it could not run. 130: interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is taken down then, too
    names = [name for name in POINTS if name in (options.only or POINTS)]
    started, commit, load_average = datetime.now(UTC), Commit.here(), os.getloadavg()[0]
    rows: list[Row] = []
    try:
        options.results.mkdir(parents=True, exist_ok=True)
        for measured in measure(names):
            rows += measured
    except (ServerFailed, NoProcess, BadPlan, OSError) as error:
        print(f"{table(rows)}\n\nbenchmarks.promises: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    report = Report(
        name="promises",
        started=started,
        command=shlex.join(["python", "-m", "benchmarks.promises", *arguments]),
        commit=commit,
        machine=Machine.here(),
        workload={name: {"config": str(POINTS[name].config), **POINTS[name].workload} for name in names},
        rows=rows,
        load_average=load_average,
    )
    print(f"{report.table()}\n\nwritten to {report.write(options.results)}")
    return 0 if report.kept else 1


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:13} {point.sentence}" for name, point in POINTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.promises",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Starts trunkline serve on free ports of 127.0.0.1, measures each time and size that\n"
        "was promised, prints it beside its promise, writes a JSON result, and takes everything down.\n\n"
        + listed,
        epilog="Exit status: 0 if every promise was kept, 1 if one was not, 2 if it could not run.",
    )
    parser.add_argument("--only", nargs="+", choices=POINTS, metavar="NAME", help="measure these alone")
    where = "folder of the result file (benchmarks/results)"
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help=where)
    return parser


if __name__ == "__main__":
    sys.exit(main())
