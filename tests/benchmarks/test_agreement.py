"""The comparison of generators as far as it needs no server: what is compared, and when the two agree."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from benchmarks.agreement import FAST, SLOW, Agreement, Figures, _parser, chosen
from benchmarks.result import Commit, Machine


def agreement(ours: list[Figures], theirs: list[Figures]) -> Agreement:
    """What a run leaves in which both said this, round by round."""
    return Agreement(
        name="agreement",
        started=datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC),
        command="test",
        commit=Commit(None, dirty=True),
        machine=Machine.here(),
        workload={},
        figures=list(ours[0]),
        ours=ours,
        theirs=theirs,
    )


def each_round(values: list[float]) -> list[Figures]:
    """One figure, round by round."""
    return [{"output_throughput": value} for value in values]


@pytest.mark.parametrize(
    ("ours", "theirs", "ratio", "agree"),
    [
        ([100.0], [100.0], 1.0, True),
        ([104.0], [100.0], 1.04, True),
        ([106.0], [100.0], 1.06, False),
        ([94.0], [100.0], 0.94, False),
        # Fast rounds and slow ones: each is compared with its own.
        ([100.0, 50.0, 10.0], [100.0, 50.0, 20.0], 1.0, True),
    ],
)
def test_two_agree_within_five_percent(
    ours: list[float], theirs: list[float], ratio: float, *, agree: bool
) -> None:
    """A figure agrees where the median of the ratios within the rounds is within 5% of 1; each one's own
    median stands beside it."""
    told = agreement(each_round(ours), each_round(theirs))
    other, mine, compared = told.rows
    assert compared.value == pytest.approx(ratio)
    assert compared.met == agree
    assert (mine.met, other.met) == (None, None)
    assert (mine.value, other.value) == (sorted(ours)[len(ours) // 2], sorted(theirs)[len(theirs) // 2])


def test_the_record_has_every_round(tmp_path: Path) -> None:
    """The file has what both said in each round and the ratios; the table has a line for each."""
    rounds: list[Figures] = [
        {"mean_tpot_ms": 5.0, "mean_itl_ms": 5.1},
        {"mean_tpot_ms": 5.2, "mean_itl_ms": 5.3},
    ]
    told = agreement(rounds, rounds)
    written = json.loads(told.write(tmp_path).read_text())
    assert (written["ours"], written["theirs"]) == (rounds, rounds)
    assert [row["met"] for row in written["ratios"]] == [None, None, True] * 2
    assert told.table().count("\n") == 6


@pytest.mark.parametrize(
    ("options", "streams", "requests"),
    [
        ("", SLOW.streams, SLOW.requests),
        ("--fast", FAST.streams, FAST.requests),
        ("--streams 3 --fast", 3, FAST.requests),
        ("--requests 7", SLOW.streams, 7),
    ],
)
def test_options_choose_the_load(options: str, streams: int, requests: int) -> None:
    """`--fast` compares where servers are compared; numbers that are given hold instead of its own."""
    load = chosen(_parser().parse_args(options.split()))
    assert (load.streams, load.requests) == (streams, requests)
    assert load.engine.step_ms == (5 if "--fast" in options else 50)
    assert load.requests % load.streams == 0 or "--" in options


def test_the_time_to_the_first_token_is_compared_where_it_can_agree() -> None:
    """With short steps it is left out, as most of it is each client's own; all else of it is in both."""
    assert set(SLOW.figures) > set(FAST.figures)
    assert not any("ttft" in name for name in FAST.figures)
    assert any("ttft" in name for name in SLOW.figures)
    for figure in ("output_throughput", "mean_tpot_ms", "mean_itl_ms", "median_e2el_ms"):
        assert figure in FAST.figures
