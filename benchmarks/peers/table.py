"""The figures of all turns in one table, and the targets beside them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.peers.turns import Spread, Turns
from benchmarks.rows import Row, shown

OURS = "trunkline"
FLOOR = "bare"

WHOLE_POINTS = ("whole", "whole256")
"""A server's most requests per second may be at either."""

JUDGED = 5
"""Rounds, of both sides, below which no target is judged."""

Cell = Callable[[Turns, str], str]


@dataclass(frozen=True, slots=True)
class Section:
    """Some columns, with a line for each peer."""

    title: str
    columns: Mapping[str, Cell]


def _plain(point: str, figure: str, scale: float = 1.0) -> Cell:
    def cell(turns: Turns, peer: str) -> str:
        value = turns.middle(peer, point, figure)
        return "-" if value is None else shown(value * scale)

    return cell


def _percentiles(point: str, name: str) -> Cell:
    figures = (f"median_{name}_ms", f"p95_{name}_ms", f"p99_{name}_ms")

    def cell(turns: Turns, peer: str) -> str:
        values = [turns.middle(peer, point, figure) for figure in figures]
        return " / ".join(_brief(value) for value in values if value is not None) or "-"

    return cell


def _generator(point: str) -> Cell:
    def cell(turns: Turns, peer: str) -> str:
        busy, waited = (turns.middle(peer, point, f"generator_{name}_share") for name in ("cpu", "waited"))
        lags = (turns.middle(peer, point, f"p99_{name}_lag_ms") for name in ("loop", "send"))
        if busy is None:
            return "-"
        late = max((lag for lag in lags if lag is not None), default=0.0)
        return f"{busy:.0%} / " + ("-" if waited is None else f"{waited:.0%}") + f" / {late:.1f}"

    return cell


def _brief(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _to_ours(figure: str, *points: str) -> Cell:
    """Where there are several points, each peer is taken at its best."""

    def cell(turns: Turns, peer: str) -> str:
        ratio = turns.ratio_of_most(peer, OURS, points, figure)
        return "-" if ratio is None else f"{ratio.middle:.2f} {_range(ratio)}"

    return cell


def _range(spread: Spread) -> str:
    return f"({spread.low:.2f} to {spread.high:.2f} in {spread.rounds})"


def _at(points: Sequence[str], cell: Callable[[str], Cell]) -> dict[str, Cell]:
    return {point: cell(point) for point in points}


WHOLE = Section(
    "whole answers of one token",
    {
        "requests/s": _plain("whole", "request_throughput"),
        "256 at a time": _plain("whole256", "request_throughput"),
        "CPU us each": _plain("whole", "cpu_us_per_request"),
        "engine core": _plain("whole", "cpu_us_per_request/engine core"),
        "ms, p50 / p95 / p99": _percentiles("whole", "e2el"),
    },
)

MEMORY = Section(
    "resident memory",
    {
        "idle MB": _plain("idle", "idle_bytes", 1e-6),
        "kB per connection": _plain("idle", "connection_bytes", 1e-3),
        "kB per stream": _plain("1024", "stream_bytes", 1e-3),
        "router, idle MB": _plain("idle", "idle_bytes/router", 1e-6),
        "router, kB per connection": _plain("idle", "connection_bytes/router", 1e-3),
        "router, kB per stream": _plain("1024", "stream_bytes/router", 1e-3),
    },
)

RATIOS = Section(
    "over Trunkline's: median (least to most in so many rounds)",
    {
        "CPU/token, 64": _to_ours("cpu_us_per_token", "64"),
        "tokens/s, 256": _to_ours("output_throughput", "256"),
        "tokens/s, 1024": _to_ours("output_throughput", "1024"),
        "CPU, whole": _to_ours("cpu_us_per_request", "whole"),
        "requests/s, whole": _to_ours("request_throughput", *WHOLE_POINTS),
    },
)


def _sections(streams: Sequence[str]) -> Iterator[Section]:
    loads = (*streams, "half")
    yield Section(
        "CPU us per streamed token, all processes", _at(loads, lambda at: _plain(at, "cpu_us_per_token"))
    )
    yield Section("of it the engine core", _at(loads, lambda at: _plain(at, "cpu_us_per_token/engine core")))
    yield Section("tokens/s", _at(loads, lambda at: _plain(at, "output_throughput")))
    yield Section("TTFT ms, p50 / p95 / p99", _at(("first", *loads), lambda at: _percentiles(at, "ttft")))
    yield Section("ITL ms, p50 / p95 / p99", _at(loads, lambda at: _percentiles(at, "itl")))
    yield WHOLE
    yield MEMORY
    closed = ("first", *streams, *WHOLE_POINTS)
    yield Section(
        "% of the time that the accelerator was at work",
        _at(closed, lambda at: _plain(at, "busy_share", 100.0)),
    )
    yield Section(
        "% of its time with work that the accelerator waited for the host",
        _at(loads, lambda at: _plain(at, "late_share", 100.0)),
    )
    yield Section(
        "load generator, of a core / waited for one / ms late at p99",
        _at((*loads, *WHOLE_POINTS), _generator),
    )
    yield RATIOS


def table(turns: Turns, titles: Mapping[str, str]) -> str:
    """All of it: medians over the rounds, a line for each peer in each section, and what is to be doubted."""
    blocks = ["\n".join(_lines(section, turns, titles)) for section in _sections(turns.streams)]
    blocks.append("\n".join("! " + doubt for doubt in turns.doubts()))
    return "\n\n".join(block for block in blocks if block)


def _lines(section: Section, turns: Turns, titles: Mapping[str, str]) -> Iterator[str]:
    cells = {peer: [cell(turns, peer) for cell in section.columns.values()] for peer in turns.peers}
    kept = [at for at in range(len(section.columns)) if any(line[at] != "-" for line in cells.values())]
    if not kept:
        return
    heads = list(section.columns)
    widths = [max(len(heads[at]), *(len(line[at]) for line in cells.values())) for at in kept]
    first = max(len(section.title), *(len(titles[peer]) for peer in cells))
    for title, line in [(section.title, heads), *((titles[peer], line) for peer, line in cells.items())]:
        columns = (f"{line[at]:>{width}}" for at, width in zip(kept, widths, strict=True))
        yield f"{title:{first}}   {'   '.join(columns)}"


# ---- the targets ---------------------------------------------------------------------------------------


def targets(turns: Turns, *, real: bool = False) -> list[Row]:
    """Each target of which there are figures. `real`: the model was, which has a target of its own."""
    if real:
        ratio = turns.ratio(OURS, "vllm-python", "32", "output_throughput")
        row = _row("7. tokens/s of SmolLM2 at 32 streams, over vllm-python", ratio, "x", at_least=1.0)
        return [] if row is None else [row]
    rows = [
        *_cpu_per_token(turns),
        *_throughput(turns),
        *_time_to_first_token(turns),
        *_growth(turns),
        *_whole(turns),
    ]
    return [row for row in rows if row is not None]


def _cpu_per_token(turns: Turns) -> Iterator[Row | None]:
    for other, limit in {"vllm-rust": 1.0, "vllm-python": 0.4, "ray-serve-llm": 0.15}.items():
        ratio = turns.ratio(OURS, other, "64", "cpu_us_per_token")
        yield _row(f"1. CPU per token at 64 streams, over {other}", ratio, "x", at_most=limit)


def _throughput(turns: Turns) -> Iterator[Row | None]:
    for point in ("256", "1024"):
        for other, limit in {"vllm-rust": 1.0, "vllm-python": 2.0, "ray-serve-llm": 5.0}.items():
            ratio = turns.ratio(OURS, other, point, "output_throughput")
            yield _row(f"2. tokens/s at {point} streams, over {other}", ratio, "x", at_least=limit)


def _time_to_first_token(turns: Turns) -> Iterator[Row | None]:
    alone = turns.difference(OURS, FLOOR, "first", "median_ttft_ms")
    yield _row("3. TTFT p50 of one stream, beyond the bare engine's", alone, "ms", at_most=1.5)
    loaded = turns.difference(OURS, FLOOR, "half", "p99_ttft_ms")
    yield _row("3. TTFT p99 at half load, beyond the bare engine's", loaded, "ms", at_most=8.0)


def _growth(turns: Turns) -> Iterator[Row | None]:
    grown = turns.rises(OURS, "64", "1024", "cpu_us_per_token")
    yield _row("4. CPU per token at 1,024 streams, over that at 64", grown, "x", at_most=1.0)
    held = turns.each(OURS, "1024", "stream_bytes/router").values()
    spread = Spread.of(value / 1e3 for value in held)
    yield _row("4. router's memory per active stream", spread, "kB", at_most=20.0)


def _whole(turns: Turns) -> Iterator[Row | None]:
    for other, limit in {"vllm-rust": 1.0, "vllm-python": 0.5}.items():
        ratio = turns.ratio(OURS, other, "whole", "cpu_us_per_request")
        yield _row(f"5. CPU per whole request, over {other}", ratio, "x", at_most=limit)
    for other, limit in {"vllm-rust": 1.0, "vllm-python": 2.0}.items():
        ratio = turns.ratio_of_most(OURS, other, WHOLE_POINTS, "request_throughput")
        yield _row(f"5. whole requests/s, over {other}", ratio, "x", at_least=limit)


def _row(
    name: str,
    spread: Spread | None,
    unit: str,
    *,
    at_most: float = float("inf"),
    at_least: float = float("-inf"),
) -> Row | None:
    if spread is None:
        return None
    wanted = f"at least {at_least:g}" if at_most == float("inf") else f"at most {at_most:g}"
    name = f"{name} {_range(spread)}"
    if spread.rounds < JUDGED:
        return Row(name, spread.middle, unit, f"{wanted}, judged from {JUDGED} rounds on")
    return Row(name, spread.middle, unit, wanted, at_least <= spread.middle <= at_most)
