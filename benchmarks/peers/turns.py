"""What was measured, turn by turn: a turn is one fresh start of one peer, in one round of all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Self

from benchmarks.peers.measure import Measurement, saturation
from serving.simulation.timeline import HOST_BOUND


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

    def most(self, peer: str, points: Sequence[str], figure: str) -> dict[int, float]:
        """The most that a figure of a peer is at any of some points, in each round that has it."""
        found: dict[int, float] = {}
        for point in points:
            for number, value in self.each(peer, point, figure).items():
                found[number] = max(value, found.get(number, value))
        return found

    def ratio(self, peer: str, other: str, point: str, figure: str) -> Spread | None:
        """One peer's figure over another's, within each round that has both."""
        return _over(self.each(peer, point, figure), self.each(other, point, figure))

    def ratio_of_most(self, peer: str, other: str, points: Sequence[str], figure: str) -> Spread | None:
        """The same, of each peer at the point at which its figure is the most in that round."""
        return _over(self.most(peer, points, figure), self.most(other, points, figure))

    def difference(self, peer: str, other: str, point: str, figure: str) -> Spread | None:
        """One peer's figure less another's, within each round that has both."""
        first, second = self.each(peer, point, figure), self.each(other, point, figure)
        return Spread.of(first[number] - second[number] for number in first if number in second)

    def rises(self, peer: str, low: str, high: str, figure: str) -> Spread | None:
        """A peer's figure at one point over that at another, within each round."""
        return _over(self.each(peer, high, figure), self.each(peer, low, figure))

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
                for kind, example in point.failures.items():
                    yield f"{where}, {name}: answers failed, {kind}: {example}"
        whole = {peer: sum(turn.failure is None for turn in self._of(peer)) for peer in self.peers}
        most = max(whole.values(), default=0)
        for peer, rounds in whole.items():
            if rounds < most:
                yield f"{peer}: measured in {rounds} of {most} rounds"
            yield from self._limits(peer)

    def _limits(self, peer: str) -> Iterator[str]:
        """Where what was measured was bounded by something else than it is taken for."""
        measured = [item for turn in self._of(peer) for item in turn.points.items()]
        rounds = Counter(name for name, _ in measured)
        bounded = Counter(name for name, point in measured if point.bounded)
        if bounded:
            found = (f"{name} ({count} of {rounds[name]} rounds)" for name, count in bounded.items())
            yield f"{peer}: bounded by the load generator at {', '.join(found)}"
        busy = {point: self.middle(peer, point, "busy_share") for point in self.streams}
        idle = {point: share for point, share in busy.items() if share is not None and share < 1 - HOST_BOUND}
        if idle:
            found = (f"{point} ({share:.0%} of the time at work)" for point, share in idle.items())
            yield f"{peer}: the host was the limit, not the accelerator, at {', '.join(found)}"

    def _of(self, peer: str) -> Iterator[Turn]:
        return (turn for turn in self._turns if turn.peer == peer)


def _over(above: Mapping[int, float], below: Mapping[int, float]) -> Spread | None:
    return Spread.of(above[number] / below[number] for number in above if below.get(number))
