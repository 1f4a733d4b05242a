"""What was measured, turn by turn: a turn is one fresh start of one peer, in one round of all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Self

from benchmarks.peers.measure import Measurement, saturation


@dataclass(slots=True)
class Turn:
    """One peer's part of a round."""

    peer: str
    round: int
    points: dict[str, Measurement] = field(default_factory=dict)
    """By name, `idle` among them: what it held before the first crowd."""
    failure: str | None = None
    """Why it could not be measured, or not to the end."""

    @classmethod
    def parse(cls, told: Mapping[str, Any]) -> Self:
        """The turn that `asdict` gave."""
        points = {name: Measurement(**point) for name, point in told["points"].items()}
        return cls(told["peer"], told["round"], points, told["failure"])


@dataclass(frozen=True, slots=True)
class Spread:
    """The median over rounds, and what it lies between."""

    middle: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread | None:
        """Of no values there is none."""
        found = sorted(values)
        return cls(median(found), found[0], found[-1], len(found)) if found else None


class Turns:
    """All turns of a run, by peer and round."""

    def __init__(self, turns: Sequence[Turn]) -> None:
        self._turns = turns
        self.peers = list(dict.fromkeys(turn.peer for turn in turns))

    @property
    def streams(self) -> list[str]:
        """The points of so many streams in a closed loop, the fewest first."""
        names = {name for turn in self._turns for name in turn.points if name.isdecimal()}
        return sorted(names, key=int)

    def each(self, peer: str, point: str, figure: str) -> dict[int, float]:
        """A figure of a peer in each round that has it."""
        found = {}
        for turn in self._turns:
            if turn.peer == peer and point in turn.points:
                value = turn.points[point].figures.get(figure)
                if value is not None:
                    found[turn.round] = value
        return found

    def middle(self, peer: str, point: str, figure: str) -> float | None:
        """Its median over the rounds."""
        values = self.each(peer, point, figure).values()
        return median(values) if values else None

    def ratio(self, peer: str, other: str, point: str, figure: str) -> Spread | None:
        """One peer's figure over another's, within each round that has both."""
        above, below = self.each(peer, point, figure), self.each(other, point, figure)
        return Spread.of(above[number] / below[number] for number in above if below.get(number))

    def difference(self, peer: str, other: str, point: str, figure: str) -> Spread | None:
        """One peer's figure less another's, within each round that has both."""
        first, second = self.each(peer, point, figure), self.each(other, point, figure)
        return Spread.of(first[number] - second[number] for number in first if number in second)

    def rises(self, peer: str, low: str, high: str, figure: str) -> Spread | None:
        """A peer's figure at one point over that at another, within each round."""
        below, above = self.each(peer, low, figure), self.each(peer, high, figure)
        return Spread.of(above[number] / below[number] for number in above if below.get(number))

    def rate(self, peer: str) -> float | None:
        """Half of what the peer carried through in the first round that says it, in requests per second."""
        for turn in self._turns:
            if turn.peer == peer and (most := saturation(turn.points)) is not None:
                return most / 2
        return None

    def doubts(self) -> Iterator[str]:
        """What a reader must know before believing a figure."""
        for turn in self._turns:
            where = f"round {turn.round}, {turn.peer}"
            if turn.failure is not None:
                yield f"{where}: {turn.failure.splitlines()[0]}"
            for name, point in turn.points.items():
                if point.bounded:
                    yield f"{where}, {name}: bounded by the load generator"
                for kind, example in point.failures.items():
                    yield f"{where}, {name}: answers failed, {kind}: {example}"
