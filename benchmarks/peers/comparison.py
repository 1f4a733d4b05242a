"""The record of a run: what was compared, and every turn so far."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

from benchmarks.peers.settings import SIMULATED
from benchmarks.peers.table import table as figures_table
from benchmarks.peers.table import targets
from benchmarks.peers.turns import Turn, Turns
from benchmarks.result import Commit, Machine, Record
from benchmarks.rows import Row
from benchmarks.rows import table as rows_table


@dataclass(frozen=True, slots=True)
class Comparison(Record):
    """The record of a run: every turn so far."""

    peers: Mapping[str, Mapping[str, str]]
    """Title and version by name."""
    turns: list[Turn]

    @classmethod
    def read(cls, path: Path) -> Comparison:
        """The record that `save` wrote. Raises OSError or ValueError."""
        told = json.loads(path.read_text())
        return cls(
            name=told["name"],
            started=datetime.fromisoformat(told["started"]),
            command=told["command"],
            commit=Commit(**told["commit"]),
            machine=Machine(**told["machine"]),
            workload=told["workload"],
            peers=told["peers"],
            turns=[Turn.parse(turn) for turn in told["turns"]],
        )

    def goes_on(self, other: Comparison) -> Comparison:
        """This record, to be gone on with by the run that would write `other`. Raises ValueError where its
        figures would not belong together."""
        for name in ("commit", "machine", "workload"):
            before, now = getattr(self, name), getattr(other, name)
            if before != now:
                raise ValueError(f"{name} was {before} and is {now}: the figures do not belong together")
        command = f"{self.command}; {other.command}"
        return replace(self, command=command, peers={**self.peers, **other.peers})

    @property
    def real(self) -> bool:
        """Whether the model was."""
        return self.workload["engine"] != SIMULATED.name

    @property
    def rows(self) -> list[Row]:
        """The targets."""
        return targets(Turns(self.turns), real=self.real)

    @property
    def titles(self) -> dict[str, str]:
        """Of the peers, with their versions."""
        return {name: f"{told['title']} {told['version']}" for name, told in self.peers.items()}

    def table(self) -> str:
        return f"{figures_table(Turns(self.turns), self.titles)}\n\n{rows_table(self.rows)}"

    def shown(self) -> Mapping[str, object]:
        return {"peers": self.peers, "turns": [asdict(turn) for turn in self.turns]}

    def save(self, path: Path) -> None:
        """Write the record in the place of what is at `path`; it is never half written."""
        new = path.with_suffix(".new")
        new.write_text(self.as_json())
        new.replace(path)
