"""A run as a picture: what a token costs, how many there are, and how long the first takes, by streams."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.peers.comparison import Comparison
from benchmarks.peers.table import FLOOR, OURS
from benchmarks.peers.turns import Turns

PANELS = {
    "CPU per streamed token (µs, all processes)": "cpu_us_per_token",
    "Tokens per second": "output_throughput",
    "Time to first token, p50 (ms)": "median_ttft_ms",
}

MUTED = "#5b6472"

STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#b8bec8",
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titlepad": 12,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8ebf0",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": "#20262e",
    "svg.hashsalt": "trunkline",  # the same run gives the same file
}

OUR_COLOUR = "#d1495b"
FLOOR_COLOUR = "#9aa3af"
COLOURS = ("#1d6fa5", "#12304e", "#e08e2b", "#a9681a", "#4f9d69", "#7a5ea8")
"""Of the other peers, in their order."""


def plot(record: Comparison, path: Path) -> None:
    """Write the picture, in the format that the path's suffix names."""
    turns, titles = Turns(record.turns), record.titles
    others = [peer for peer in turns.peers if peer not in {OURS, FLOOR}]
    colours = {**dict(zip(others, COLOURS, strict=False)), OURS: OUR_COLOUR, FLOOR: FLOOR_COLOUR}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(13.5, 5.4), facecolor="white")
        panels = figure.subplots(1, len(PANELS))
        for axes, (title, name) in zip(panels, PANELS.items(), strict=True):
            axes.set_title(title)
            for peer in turns.peers:
                _line(axes, turns, peer, name, colours[peer], titles[peer])
            _scales(axes, turns.streams)
        figure.suptitle(_subtitle(record), x=0.012, ha="left", fontsize=10, color=MUTED)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower left", ncols=4, frameon=False, bbox_to_anchor=(0.004, 0.0))
        figure.tight_layout(rect=(0, 0.12, 1, 1), w_pad=3)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _subtitle(record: Comparison) -> str:
    count = max((turn.round for turn in record.turns), default=0)
    machine = f"{record.machine.cores} cores of {record.machine.cpu}"
    rounds = f"{count} rounds" if count > 1 else "one round"
    return f"{record.started:%Y-%m-%d}, {machine}. Medians of {rounds}, bands from least to most."


def _line(axes: Axes, turns: Turns, peer: str, name: str, colour: str, label: str) -> None:
    each = {int(point): list(turns.each(peer, point, name).values()) for point in turns.streams}
    streams = [at for at, values in each.items() if values]
    if not streams:
        return
    middles = [turns.middle(peer, str(at), name) for at in streams]
    axes.fill_between(
        streams,
        [min(each[at]) for at in streams],
        [max(each[at]) for at in streams],
        color=colour,
        alpha=0.15,
        linewidth=0,
    )
    ours, floor = peer == OURS, peer == FLOOR
    axes.plot(
        streams,
        [value or 0.0 for value in middles],
        color=colour,
        label=label,
        linewidth=2.6 if ours else 1.6,
        linestyle="--" if floor else "-",
        marker="o",
        markersize=5 if ours else 3.5,
        zorder=5 if ours else 3,
    )


def _scales(axes: Axes, streams: Sequence[str]) -> None:
    axes.set_xscale("log", base=4)
    axes.set_yscale("log")
    axes.set_xticks([int(point) for point in streams])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_xlabel("streams", color=MUTED)
    axes.tick_params(which="both", length=0)
