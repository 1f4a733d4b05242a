from __future__ import annotations

import gc
from typing import Any
from weakref import ref

import pytest

from serving import garbage


class Knot:
    """Garbage that only a search finds, once it is let go."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _as_before() -> Any:
    """A test run goes on afterwards with the collector as it was."""
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


def test_nothing_is_searched_during_a_start() -> None:
    """However much comes and goes while an actor starts, Python does not look for garbage."""
    with garbage.starting():
        before = [generation["collections"] for generation in gc.get_stats()]
        kept = [Knot() for _ in range(10 * garbage.YOUNG)]
        assert [generation["collections"] for generation in gc.get_stats()] == before
    assert len(kept) == 10 * garbage.YOUNG


def test_what_a_start_left_is_not_searched_again() -> None:
    """What is there when the start is over is no work for later searches."""
    with garbage.starting():
        kept = [Knot() for _ in range(1000)]
    assert not any(type(found) is Knot for found in gc.get_objects())
    assert len(kept) == 1000


def test_garbage_of_later_is_found() -> None:
    """Garbage that comes after the start goes by itself, once there is enough of it."""
    with garbage.starting():
        pass
    first = Knot()
    gone = ref(first)
    del first
    for _ in range(2 * garbage.YOUNG):
        Knot()
    assert gone() is None


def test_a_start_that_fails_leaves_the_search_on() -> None:
    """A start that raises does not leave a process that never looks for garbage."""
    with pytest.raises(ValueError, match="no engine"), garbage.starting():
        raise ValueError("no engine")
    assert gc.isenabled()
