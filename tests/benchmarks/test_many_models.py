"""The benchmark of many models as far as it needs no server: what is served, and when the target is met."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from benchmarks.many_models import MANY, PACE, ManyModels, Round, configuration
from benchmarks.result import Commit, Machine
from cluster import config


def many_models(*rounds: Round) -> ManyModels:
    """What a run leaves that had these rounds."""
    return ManyModels(
        name="many-models",
        started=datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC),
        command="test",
        commit=Commit(None, dirty=True),
        machine=Machine.here(),
        workload={"models": MANY},
        rounds=rounds,
    )


@pytest.mark.parametrize(
    ("rounds", "ratio", "met"),
    [
        ([Round(10, 10)], 1.0, True),
        ([Round(10, 10.1)], 1.01, False),
        # The machine was slow in the second round, for both: each is compared within its round.
        ([Round(10, 9), Round(20, 18), Round(10, 11)], 0.9, True),
    ],
)
def test_many_models_may_cost_no_more_than_one(rounds: list[Round], ratio: float, *, met: bool) -> None:
    """The target is met where the median over the rounds of the ratios within them is 1 at most."""
    one, many, compared = many_models(*rounds).rows
    assert compared.value == pytest.approx(ratio)
    assert compared.met == met
    assert (one.met, many.met) == (None, None)
    assert one.value == sorted(each.one for each in rounds)[len(rounds) // 2]


def test_the_record_has_every_round(tmp_path: Path) -> None:
    """The file has each round and the target as it was judged, with what it lies between."""
    written = json.loads(many_models(Round(10, 9), Round(10, 12)).write(tmp_path).read_text())
    assert written["rounds"] == [{"one": 10, "many": 9}, {"one": 10, "many": 12}]
    (judged,) = [row for row in written["promises"] if row["met"] is not None]
    assert "(0.90 to 1.20)" in judged["name"]
    assert judged["met"] is False


@pytest.mark.parametrize("models", [1, MANY])
def test_as_many_models_are_served_as_are_loaded(models: int, tmp_path: Path) -> None:
    """The configuration is one that the server takes: so many echo models, each with a name of its own and at
    the same pace."""
    served = config.load(configuration(models, tmp_path)).models
    assert len({model.name for model in served}) == models
    assert {model.engine for model in served} == {"echo"}
    assert all(model.engine_args == {"tokens_per_second": PACE} for model in served)
