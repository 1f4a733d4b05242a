"""Rounds: each peer has a turn in each, and each turn is a fresh start, every point, and the end."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import uvloop

from benchmarks.peers import bare
from benchmarks.peers.measure import Measured, Measurement, point
from benchmarks.peers.peer import Peer, PeerFailed, Running
from benchmarks.peers.settings import Engine
from benchmarks.peers.table import FLOOR, OURS
from benchmarks.peers.turns import Turn, Turns
from benchmarks.processes import NoProcess
from benchmarks.server import ServerFailed


class Subject(Protocol):
    """What is measured in a turn."""

    def warm_up(self) -> Measurement:
        """Load it for the first time, and see what it holds after that."""

    def at(self, name: str, rate: float | None) -> Measurement:
        """Put it under the load of a point. `rate` is for the rated one, in requests per second."""


class Served:
    """A server that answers over HTTP."""

    def __init__(self, server: Running) -> None:
        self._measured = Measured(server)

    def warm_up(self) -> Measurement:
        return uvloop.run(self._measured.warm_up())

    def at(self, name: str, rate: float | None) -> Measurement:
        return uvloop.run(self._measured.at(name, rate))


class Rounds:
    """The turns of some peers, written into a list as they are taken."""

    def __init__(
        self, engine: Engine, peers: Mapping[str, Peer | None], points: Sequence[str], turns: list[Turn]
    ) -> None:
        """`peers` are prepared; the bare engine's name has none."""
        self._engine = engine
        self._peers = peers
        self._points = points
        self._turns = turns

    def take(self, rounds: int) -> Iterator[Turn]:
        """Every turn of rounds 1 to `rounds` that has not been taken, or failed before; each as it ends."""
        for number in range(1, rounds + 1):
            for name in self._order(number):
                taken = {(turn.peer, turn.round): turn for turn in self._turns}.get((name, number))
                if taken is None or taken.failure is not None:
                    if taken is not None:
                        self._turns.remove(taken)
                    yield self._turn(name, number)

    def _order(self, number: int) -> list[str]:
        """Each round begins with the next peer, so that none always has the same one before it."""
        names = list(self._peers)
        start = (number - 1) % len(names)
        return names[start:] + names[:start]

    def _turn(self, name: str, number: int) -> Turn:
        _say(f"round {number}: {name}")
        turn = Turn(name, number, failure="interrupted")
        self._turns.append(turn)
        try:
            with TemporaryDirectory(prefix="bench-") as folder, self._subject(name, Path(folder)) as subject:
                self._measure(subject, turn)
            turn.failure = None
        except (PeerFailed, ServerFailed, NoProcess) as error:
            turn.failure = str(error)
            _say(f"  {error}")
        return turn

    def _measure(self, subject: Subject, turn: Turn) -> None:
        turn.points["idle"] = subject.warm_up()
        for name in self._points:
            rate = self._rate(turn.peer) if point(name).rated else None
            if point(name).rated and rate is None:
                _say(f"  {name}: left out, as nothing says what half of the saturation is")
                continue
            turn.points[name] = subject.at(name, rate)
            _say(f"  {name}: {_brief(turn.points[name])}")

    def _rate(self, peer: str) -> float | None:
        """Half of the peer's own saturation, the same in every round. The bare engine is asked as much as
        Trunkline, so that their times to the first token compare."""
        turns = Turns(self._turns)
        return (turns.rate(OURS) if peer == FLOOR else None) or turns.rate(peer)

    @contextmanager
    def _subject(self, name: str, folder: Path) -> Iterator[Subject]:
        peer = self._peers[name]
        if peer is None:
            with bare.running(self._engine, folder) as subject:
                yield subject
        else:
            with peer.running(folder) as server:
                yield Served(server)


def _brief(measurement: Measurement) -> str:
    figures = measurement.figures
    parts = {
        "us CPU/token": figures.get("cpu_us_per_token"),
        "tokens/s": figures.get("output_throughput"),
        "ms TTFT p50": figures.get("median_ttft_ms"),
        "failed": figures.get("failed") or None,
    }
    text = ", ".join(f"{value:,.1f} {unit}" for unit, value in parts.items() if value is not None)
    return f"{text} (bounded by the load generator)" if measurement.bounded else text


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
