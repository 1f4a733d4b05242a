"""The comparison of peers as far as it needs none: arithmetic, record, rounds, what is measured of one."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from benchmarks.client import Target
from benchmarks.peers import __main__ as command
from benchmarks.peers import measure
from benchmarks.peers.comparison import Comparison
from benchmarks.peers.measure import POINTS, Figures, Measured, Measurement
from benchmarks.peers.peer import Peer, PeerFailed, Running, Share
from benchmarks.peers.plot import plot
from benchmarks.peers.rounds import Rounds
from benchmarks.peers.settings import SIMULATED
from benchmarks.peers.table import table, targets
from benchmarks.peers.turns import Spread, Turn, Turns
from benchmarks.processes import read
from benchmarks.result import Commit, Machine
from benchmarks.rows import table as rows_table
from tests.benchmarks.peer import Asked, chunk, event, usage
from tests.benchmarks.peer import Peer as Server

TITLES = {"trunkline": "Trunkline", "vllm-rust": "Rust", "bare": "Bare"}


def measured(**figures: float | None) -> Measurement:
    """A measurement of these figures."""
    return Measurement(dict(figures), failures={}, bounded=False)


def turn(peer: str, number: int, **points: Figures) -> Turn:
    """A peer's part of a round, with these points by name, an underscore before each."""
    named = {name.removeprefix("_"): measured(**figures) for name, figures in points.items()}
    return Turn(peer, number, named)


def cost(peer: str, *each: float) -> list[Turn]:
    """Turns in which a token at 64 streams cost this much."""
    return [turn(peer, number, _64={"cpu_us_per_token": value}) for number, value in enumerate(each, start=1)]


# ---- arithmetic ----------------------------------------------------------------------------------------


def test_ratios_are_taken_within_rounds() -> None:
    """A machine that is slow in one round is slow for all: the ratio's median and spread are over the rounds
    that have both peers, not a ratio of medians."""
    turns = Turns([*cost("trunkline", 10, 100, 12, 5), *cost("vllm-rust", 10, 50, 8)])
    assert turns.middle("trunkline", "64", "cpu_us_per_token") == 11
    assert turns.ratio("trunkline", "vllm-rust", "64", "cpu_us_per_token") == Spread(1.5, 1.0, 2.0, 3)
    assert turns.difference("trunkline", "vllm-rust", "64", "cpu_us_per_token") == Spread(4, 0, 50, 3)
    assert turns.ratio("trunkline", "litellm", "64", "cpu_us_per_token") is None
    assert turns.ratio("trunkline", "vllm-rust", "256", "cpu_us_per_token") is None


def test_half_of_saturation_is_of_the_first_round_that_says_it() -> None:
    """The rate is half of the most that the first round with such a point shows, and stays what it is."""
    slow = turn("trunkline", 1, _64={"request_throughput": 900.0})
    first = turn("trunkline", 2, _256={"request_throughput": 80.0}, _1024={"request_throughput": 100.0})
    later = turn("trunkline", 3, _1024={"request_throughput": 500.0})
    assert Turns([slow]).rate("trunkline") is None
    assert Turns([slow, first, later]).rate("trunkline") == 50.0


def test_each_target_is_judged_by_the_median() -> None:
    """A target of which there are figures is a row, met where its median over the rounds is."""
    rows = targets(Turns([*cost("trunkline", 9, 9, 9, 30, 8), *cost("vllm-rust", *[10] * 5)]))
    assert [(row.promise, row.met) for row in rows] == [("at most 1", True)]
    assert rows[0].value == pytest.approx(0.9)
    assert "(0.80 to 3.00 in 5)" in rows[0].name
    (row,) = targets(Turns([*cost("trunkline", *[11] * 5), *cost("vllm-rust", *[10] * 5)]))
    assert row.met is False


def test_no_target_is_judged_by_few_rounds() -> None:
    """Where fewer than five rounds have both sides, a target is neither met nor missed, and says so."""
    turns = Turns([*cost("trunkline", *[9] * 6), *cost("vllm-rust", *[10] * 4)])
    (row,) = targets(turns)
    assert row.value == pytest.approx(0.9)
    assert row.met is None
    assert row.promise == "at most 1, judged from 5 rounds on"
    assert "in 4)" in row.name
    assert rows_table([row]).splitlines()[1].endswith("judged from 5 rounds on")


def test_whole_requests_are_compared_at_each_ones_best() -> None:
    """A server that gives most whole answers per second at 256 at a time is taken there, one that does at 64
    is taken there, round by round."""

    def whole(peer: str, number: int, few: float, many: float) -> Turn:
        return turn(peer, number, whole={"request_throughput": few}, whole256={"request_throughput": many})

    ours = [whole("trunkline", number, few=100, many=120) for number in range(1, 6)]
    theirs = [whole("vllm-rust", number, few=130, many=90 + 10 * number) for number in range(1, 6)]
    (row,) = targets(Turns([*ours, *theirs]))
    assert row.name == "5. whole requests/s, over vllm-rust (0.86 to 0.92 in 5)"
    assert row.value == pytest.approx(120 / 130)
    assert row.met is False
    assert " 1.08 (1.08 to 1.17 in 5)" in table(Turns([*ours, *theirs]), TITLES)


def test_the_table_says_what_is_to_be_doubted() -> None:
    """Each peer has a line in each section that has figures, and what spoils a figure stands below."""
    first, second = cost("trunkline", 10)[0], cost("vllm-rust", 20)[0]
    first.points["64"] = replace(first.points["64"], bounded=True, failures={"status 503": "busy"})
    second.failure = "it ended by itself\nand more"
    text = table(Turns([first, second]), TITLES)
    assert [line.split() for line in text.splitlines()[1:3]] == [["Trunkline", "10"], ["Rust", "20"]]
    assert "2.00 (2.00 to 2.00 in 1)" in text
    assert "TTFT" not in text
    assert text.splitlines()[-4:] == [
        "! round 1, trunkline, 64: answers failed, status 503: busy",
        "! round 1, vllm-rust: it ended by itself",
        "! trunkline: bounded by the load generator at 64 (1 of 1 rounds)",
        "! vllm-rust: measured in 0 of 1 rounds",
    ]


def test_where_the_host_was_the_limit_is_to_be_doubted() -> None:
    """Under a load that never runs out an accelerator works all the time: one that did not has waited for its
    host, and the line says at which numbers of streams, by the median over the rounds."""
    shares = [(0.99, 0.97, 0.2), (0.98, 0.5, 0.3), (0.999, 0.99, 0.4)]
    turns = [
        turn(
            "trunkline",
            number,
            first={"busy_share": 0.9},
            _1={"busy_share": one},
            _64={"busy_share": some},
            _1024={"busy_share": many},
            half={"busy_share": 0.5},
        )
        for number, (one, some, many) in enumerate(shares, start=1)
    ]
    text = table(Turns(turns), TITLES)
    (doubt,) = [line for line in text.splitlines() if line.startswith("!")]
    assert (
        doubt == "! trunkline: the host was the limit, not the accelerator, at 1024 (30% of the time at work)"
    )
    assert ["Trunkline", "90", "99", "97", "30"] in [line.split() for line in text.splitlines()]


# ---- the record ----------------------------------------------------------------------------------------


def comparison(*turns: Turn) -> Comparison:
    """The record of these turns."""
    return Comparison(
        name="peers",
        started=datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC),
        command="first",
        commit=Commit("0" * 40, dirty=False),
        machine=Machine.here(),
        workload={"engine": "simulated"},
        peers={name: {"title": title, "version": "1"} for name, title in TITLES.items()},
        turns=list(turns),
    )


def test_a_record_is_read_as_it_was_saved(tmp_path: Path) -> None:
    """Saved over an older state of itself and read back it is the same, and a picture can be drawn of it."""
    path = tmp_path / "peers.json"
    comparison().save(path)
    record = comparison(turn("trunkline", 1, _64={"cpu_us_per_token": 10.0, "median_ttft_ms": None}))
    record.save(path)
    assert Comparison.read(path) == record
    assert [file.name for file in tmp_path.iterdir()] == ["peers.json"]
    plot(record, tmp_path / "peers.svg")
    assert "Trunkline" in (tmp_path / "peers.svg").read_text()


def test_only_figures_that_belong_together_are_joined() -> None:
    """A run goes on with one of the same commit, machine and workload, and no other."""
    before, now = comparison(turn("trunkline", 1)), replace(comparison(), command="second")
    joined = before.goes_on(now)
    assert (joined.command, joined.turns) == ("first; second", before.turns)
    with pytest.raises(ValueError, match="commit was"):
        before.goes_on(replace(now, commit=Commit("1" * 40, dirty=False)))
    with pytest.raises(ValueError, match="workload was"):
        before.goes_on(replace(now, workload={"engine": "smollm2"}))


# ---- rounds --------------------------------------------------------------------------------------------


@dataclass
class Failing:
    """A peer that never starts, and notes that it was to."""

    name: str
    started: list[str]
    title: str = ""
    version: str = ""

    def prepare(self, cache: Path) -> None:
        """Nothing is needed."""

    def running(self, folder: Path) -> AbstractContextManager[Running]:
        self.started.append(self.name)
        raise PeerFailed(f"{self.name} does not start")


def test_each_round_begins_with_the_next_peer_and_lacks_none() -> None:
    """The order rotates, a peer that fails does not end the round, and going on takes what is missing."""
    started: list[str] = []
    peers: dict[str, Peer | None] = {name: Failing(name, started) for name in ("a", "b", "c")}
    turns: list[Turn] = []
    assert len(list(Rounds(SIMULATED, peers, ["64"], turns).take(4))) == 12
    assert "".join(started) == "abc" + "bca" + "cab" + "abc"
    assert turns[0].failure == "a does not start"
    for each in turns:
        each.failure = None if each.round < 4 else each.failure
    started.clear()
    list(Rounds(SIMULATED, peers, ["64"], turns).take(4))
    assert "".join(started) == "abc"
    assert len(turns) == 12


# ---- one server ----------------------------------------------------------------------------------------


@dataclass
class Answering:
    """This process as a server, which is one share, and a modelled accelerator's report."""

    target: Target
    report: Path
    others: Sequence[Share] = field(default_factory=list)

    def shares(self) -> Sequence[Share]:
        own = read(os.getpid())
        assert own is not None
        return [Share("server", [own]), *self.others]


async def test_a_point_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A measurement has the generator's figures, CPU and memory by share, for how much of the run the
    accelerator was at work, and how long it waited for its host; of the warm-up nothing is in it."""
    report = tmp_path / "report.json"

    async def answer(asked: Asked) -> None:
        length, counts = asked.body["max_tokens"], len(server.asked) > POINTS["16"].warm_up
        report.write_text(json.dumps({"busy_s": 5.0 + 0.15 * counts, "late_s": 1.0 + 0.05 * counts}))
        last = event({"choices": [], "usage": usage(7, length)})
        await asked.stream(chunk("text"), chunk(None, "length"), last, event(b"[DONE]"))

    server = Server(answer)
    await server.start()
    monkeypatch.setitem(measure.POINTS, "8", replace(POINTS["16"], streams=8, duration=0.3))
    monkeypatch.setattr(measure, "IDLE_CONNECTIONS", 8)
    subject = Measured(Answering(Target("127.0.0.1", server.port), report))
    monkeypatch.setattr(measure, "WARM_UP", replace(measure.WARM_UP, duration=0.1))
    idle = await subject.warm_up()
    report.write_text(json.dumps({"busy_s": 2.0, "late_s": 0.0}))
    server.asked.clear()
    found = await subject.at("8", None)
    await server.stop()
    assert idle.figures["idle_bytes"] == idle.figures["idle_bytes/server"]
    assert (idle.figures["idle_bytes"] or 0) > 1e7
    assert idle.figures["connection_bytes"] == idle.figures["connection_bytes/server"]
    assert server.connections >= 8 + 16 + 8
    assert found.failures == {}
    figures = found.figures
    assert (figures["completed"] or 0) % 8 == 0
    assert figures["late_share"] == pytest.approx(0.25)
    assert figures["busy_share"] == pytest.approx(0.15 / (figures["duration"] or 0))
    assert (figures["cpu_us_per_token"] or 0) > 0
    assert figures["cpu_us_per_request"] == pytest.approx((figures["cpu_us_per_token"] or 0) * 128)
    assert not found.bounded, "the server is the generator's own process, which cannot be told apart"


# ---- the command ---------------------------------------------------------------------------------------


def test_any_number_of_streams_is_a_point() -> None:
    """Points are those of the list, or a number of streams above 0."""
    assert measure.point("32").streams == 32
    assert measure.point("half").rated
    for name in ("0", "-1", "fast", ""):
        with pytest.raises(ValueError, match="is no point"):
            measure.point(name)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--points fast", "'fast' is no point"),
        ("--show /nonexistent.json", "No such file"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    options: str, words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Options that make no run end the command in a sentence, before anything is started."""
    assert command.main([*options.split(), "--results", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())
