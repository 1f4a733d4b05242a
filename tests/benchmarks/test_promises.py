"""The command that measures promises, as far as it needs no server: figures, table, result, help."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest

from benchmarks import promises
from benchmarks.promises import POINTS, ROOT, Report
from benchmarks.result import Commit, Machine
from benchmarks.rows import Row, shown, table, under, whole

KEPT = under("time", 7.99, "s", 8)
BROKEN = under("time", 8.0, "s", 8)
UNPROMISED = Row("speed", 12_345.6, "tokens/s")


def report(*rows: Row) -> Report:
    """What a run leaves that gave these rows."""
    return Report(
        name="promises",
        started=datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC),
        command="test",
        commit=Commit(None, dirty=True),
        machine=Machine.here(),
        workload={"cancel": {"clients": 10}},
        rows=rows,
        load_average=0.5,
    )


def test_a_promise_is_judged_by_its_figure() -> None:
    """A figure is kept below its limit, a count when it is everything; one without a promise is neither."""
    assert (KEPT.met, BROKEN.met, UNPROMISED.met) == (True, False, None)
    assert (whole("streams", 16, 16).met, whole("streams", 15, 16).met) == (True, False)
    assert (report(KEPT, UNPROMISED).kept, report(KEPT, BROKEN).kept) == (True, False)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.123, "0.12"), (10.06, "10.1"), (1234.5, "1,234")],
)
def test_figures_have_three_digits(value: float, text: str) -> None:
    """What is below 100 is shown with decimals, what is above with its whole part."""
    assert shown(value) == text


def test_the_table_shows_each_figure_beside_its_promise() -> None:
    """A line for each figure: name, figure, unit, promise, and whether it was kept, in columns."""
    assert table([KEPT, BROKEN, UNPROMISED]).splitlines() == [
        "       figure           promised  met",
        "time     7.99 s         under 8   yes",
        "time        8 s         under 8   NO",
        "speed  12,346 tokens/s",
    ]


def test_a_result_has_every_figure(tmp_path: Path) -> None:
    """The file names when, how and on what machine, and has each row as it was judged."""
    path = report(KEPT, BROKEN).write(tmp_path)
    assert path.name == "2024-05-06-070809-promises.json"
    result = json.loads(path.read_text())
    assert result["workload"] == {"cancel": {"clients": 10}}
    assert result["machine"]["cores"] >= 1
    assert result["load_average"] == 0.5
    assert [(row["name"], row["value"], row["met"]) for row in result["promises"]] == [
        ("time", 7.99, True),
        ("time", 8.0, False),
    ]


def test_every_point_stands_in_the_readme() -> None:
    """The README's table names each point that --only takes, in order, with the server it is measured on."""
    text = (ROOT / "benchmarks" / "README.md").read_text()
    assert re.findall(r"^\| `([\w-]+)` \| (?:`|the same)", text, re.MULTILINE) == list(POINTS)
    assert all((ROOT / point.config).exists() for point in POINTS.values())


def test_an_unknown_point_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """--only refuses what is not a point, and names those that are."""
    with pytest.raises(SystemExit, match="2"):
        promises.main(["--only", "speed"])
    said = capsys.readouterr().err
    assert "invalid choice: 'speed'" in said
    assert all(name in said for name in POINTS)
