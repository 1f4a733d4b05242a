"""Every peer measured beside Trunkline: `python -m benchmarks.peers --help`."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.load import OPEN_LOOP_STREAMS, BadPlan, allow_files
from benchmarks.peers import bare
from benchmarks.peers.catalog import cache_folder, peers
from benchmarks.peers.comparison import Comparison
from benchmarks.peers.measure import POINTS, point
from benchmarks.peers.peer import Peer, PeerFailed
from benchmarks.peers.plot import plot
from benchmarks.peers.rounds import Rounds
from benchmarks.peers.servers import VLLM
from benchmarks.peers.settings import ENGINES, SIMULATED, Engine
from benchmarks.peers.table import JUDGED
from benchmarks.result import RESULTS, Commit, Machine
from serving.source import SourceError

REAL_POINTS = ("32",)
"""What is measured of the real model unless told otherwise: it takes its time."""

_OTHER_FILES = 256


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. 0: no target was missed. 1: one was, or a peer failed. 2: it could not run.
    130: interrupted; what was measured is kept.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are taken down then, too
    try:
        if options.show:
            return _show(Comparison.read(options.show), options.show)
        return _measure(options, shlex.join(["python", "-m", "benchmarks.peers", *arguments]))
    except (BadPlan, PeerFailed, SourceError, OSError, ValueError) as error:
        print(f"benchmarks.peers: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _measure(options: argparse.Namespace, command: str) -> int:
    engine = ENGINES[options.model]
    points = options.points or list(POINTS if engine is SIMULATED else REAL_POINTS)
    for name in points:
        point(name)
    allow_files(OPEN_LOOP_STREAMS + _OTHER_FILES)
    chosen = _prepared(engine, options.peers, options.cache)
    record = _record(engine, chosen, command)
    path = options.results / f"{record.started:%Y-%m-%d-%H%M%S}-{record.name}.json"
    if options.resume:
        record, path = Comparison.read(options.resume).goes_on(record), options.resume
    try:
        for _ in Rounds(engine, chosen, points, record.turns).take(options.rounds):
            record.save(path)
    finally:
        if record.turns:
            record.save(path)
    return _show(record, path)


def _prepared(engine: Engine, names: Sequence[str], cache: Path) -> dict[str, Peer | None]:
    known = peers(engine)
    chosen = {name: known.get(name) for name in _names() if name in names}
    for peer in chosen.values():
        if peer is not None:
            peer.prepare(cache)
    return chosen


def _names() -> list[str]:
    """Of all that can be measured, ours first and the floor after it."""
    ours, *others = peers()
    return [ours, bare.NAME, *others]


def _record(engine: Engine, chosen: Mapping[str, Peer | None], command: str) -> Comparison:
    floor = {"title": bare.TITLE, "version": VLLM}
    return Comparison(
        name="peers" if engine is SIMULATED else f"peers-{engine.name}",
        started=datetime.now(UTC),
        command=command,
        commit=Commit.here(),
        machine=Machine.here(),
        workload={
            "engine": engine.name,
            "engine_args": engine.arguments(Path("report.json")),
            "points": {name: asdict(each) for name, each in POINTS.items()},
        },
        peers={
            name: floor if peer is None else {"title": peer.title, "version": peer.version}
            for name, peer in chosen.items()
        },
        turns=[],
    )


def _show(record: Comparison, path: Path) -> int:
    """Print the table and the targets, and draw the picture beside the record."""
    picture = path.with_suffix(".svg")
    plot(record, picture)
    print(f"{record.table()}\n\nin {path} and {picture}")
    whole = all(turn.failure is None for turn in record.turns)
    return 0 if whole and all(row.met is not False for row in record.rows) else 1


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:6} {each.sentence}" for name, each in POINTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measures Trunkline and its peers with one engine and one load generator, in rounds,\n"
        "each server started anew for each. Prints a table and the targets, and leaves a JSON file and a\n"
        f"picture.\n\nPeers: {', '.join(_names())}.\n\nPoints:\n{listed}",
        epilog=f"A target is judged from {JUDGED} rounds on.\n\nExit status: 0 if none was missed, 1 if one"
        " was or a peer failed, 2 if it could not run.",
    )
    add = parser.add_argument
    add("--peers", nargs="+", choices=_names(), default=_names(), metavar="NAME", help="these alone")
    add("--points", nargs="+", metavar="NAME", help="these alone; any number of streams is a point too")
    add("--rounds", type=int, default=JUDGED, metavar="N", help="in all (%(default)s)")
    add("--model", choices=ENGINES, default=SIMULATED.name, help="the engine (%(default)s)")
    go_on = "go on with a run of the same commit: the turns that its rounds lack, and further rounds"
    add("--continue", dest="resume", type=Path, metavar="FILE", help=go_on)
    add("--show", type=Path, metavar="FILE", help="measure nothing; show what a run has left")
    cached = "folder of the peers' environments (%(default)s)"
    add("--cache", type=Path, default=cache_folder(), metavar="DIR", help=cached)
    where = "folder of the result (benchmarks/results)"
    add("--results", type=Path, default=RESULTS, metavar="DIR", help=where)
    return parser


if __name__ == "__main__":
    sys.exit(main())
