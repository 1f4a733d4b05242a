"""Figures beside what was promised of them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One figure and what was promised of it."""

    name: str
    value: float
    unit: str
    promise: str = ""
    met: bool | None = None
    """None where nothing was promised, or too little was measured to say."""


def under(name: str, value: float, unit: str, limit: float) -> Row:
    """A figure that is to be below a limit."""
    return Row(name, value, unit, f"under {limit:,g}", value < limit)


def whole(name: str, count: float, total: int) -> Row:
    """A count that is to be everything there was."""
    return Row(name, count, "", f"all {total:,}", count == total)


def shown(value: float) -> str:
    """A figure with three digits or its whole part."""
    digits = 0 if value >= 100 or value == int(value) else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"


def table(rows: Sequence[Row]) -> str:
    """The rows with the figures below each other."""
    met = {True: "yes", False: "NO", None: ""}
    cells = [("", "figure", "", "promised", "met")]
    cells += [(row.name, shown(row.value), row.unit, row.promise, met[row.met]) for row in rows]
    names, values, units, promises, _ = (max(map(len, column)) for column in zip(*cells, strict=True))
    return "\n".join(
        f"{name:{names}}  {value:>{values}} {unit:{units}}  {promise:{promises}}  {kept}".rstrip()
        for name, value, unit, promise, kept in cells
    )
