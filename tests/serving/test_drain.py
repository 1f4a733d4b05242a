from __future__ import annotations

import pytest

from serving import drain
from serving.drain import DRAIN_WINDOW_S, LONGEST_RETRY_S, DrainRate


class Clock:
    """Time as the test has it."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that rates are measured with."""
    one = Clock()
    monkeypatch.setattr(drain, "monotonic", one)
    return one


def test_an_estimate_follows_how_fast_work_ends(clock: Clock) -> None:
    """At eight a second, eight take a second and forty take five; where less ends they take longer, and where
    nothing has ended lately nobody knows."""
    rate = DrainRate()
    assert rate.seconds_for(1) == LONGEST_RETRY_S
    for _ in range(80):
        clock.now += 0.125
        rate.freed(1)
    assert [rate.seconds_for(slots) for slots in (1, 8, 40)] == [1, 1, 5]
    clock.now += DRAIN_WINDOW_S - 5
    assert rate.seconds_for(40) > 5
    clock.now += DRAIN_WINDOW_S
    assert rate.seconds_for(1) == LONGEST_RETRY_S


def test_an_estimate_has_an_end(clock: Clock) -> None:
    """Nobody is told to wait for longer than the rate says anything about."""
    rate = DrainRate()
    clock.now += 10
    rate.freed(1)
    assert rate.seconds_for(1000) == LONGEST_RETRY_S
