"""What a run leaves behind: a JSON file that says how it came about, and the same as a table.

The load generator's figures stand at the top level of the JSON under the names that `vllm bench serve` gives
them.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from benchmarks.figures import GENERATOR_LIMIT, LAG_LIMIT_MS, FailureCount, Figure, GeneratorCost
from benchmarks.processes import Spent

RESULTS = Path(__file__).parent / "results"

_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Commit:
    """What was checked out."""

    revision: str | None
    """None outside a git checkout, or before its first commit."""
    dirty: bool
    """Files differ from the revision, results apart."""

    @classmethod
    def here(cls) -> Commit:
        revision = _git("rev-parse", "--verify", "--quiet", "HEAD")
        changes = _git("status", "--porcelain", "--", ":/", ":(top,exclude)benchmarks/results")
        return cls(revision, bool(changes))


@dataclass(frozen=True, slots=True)
class Machine:
    """Where it ran."""

    cpu: str
    cores: int
    """Those that the generator may run on."""
    memory_bytes: int
    kernel: str
    python: str

    @classmethod
    def here(cls) -> Machine:
        cpuinfo = Path("/proc/cpuinfo").read_text()
        model = re.search(r"^model name\s*: (.*)$", cpuinfo, re.MULTILINE)
        return cls(
            cpu=model[1] if model else platform.machine(),
            cores=len(os.sched_getaffinity(0)),
            memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            kernel=platform.release().partition("-")[0],
            python=platform.python_version(),
        )


@dataclass(frozen=True, slots=True)
class Record(ABC):
    """How a run came about; what it showed is a subclass's to say."""

    name: str
    started: datetime
    """With its time zone."""
    command: str
    commit: Commit
    machine: Machine
    workload: Mapping[str, object]

    @abstractmethod
    def shown(self) -> Mapping[str, object]:
        """What the run showed, for the top level of the JSON."""

    @abstractmethod
    def table(self) -> str:
        """The same in lines to be read."""

    def as_json(self) -> str:
        """The whole record."""
        fields = {
            "name": self.name,
            "started": self.started.isoformat(timespec="seconds"),
            "command": self.command,
            "commit": asdict(self.commit),
            "machine": asdict(self.machine),
            "workload": dict(self.workload),
            **self.shown(),
        }
        return json.dumps(fields, indent=2) + "\n"

    def write(self, folder: Path) -> Path:
        """Write `<date and time>-<name>.json` in a folder that exists, never over another. Returns it."""
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", self.name)
        path = folder / f"{self.started:%Y-%m-%d-%H%M%S}-{name}.json"
        with path.open("x") as file:
            file.write(self.as_json())
        return path


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run of the load generator showed."""

    figures: Mapping[str, Figure]
    failures: Mapping[str, FailureCount]
    generator: GeneratorCost
    processes: Sequence[Spent]

    @property
    def server_cpu_us_per_token(self) -> float | None:
        """CPU time of all processes measured over the tokens of all good answers; None without either."""
        tokens = self.figures["total_output_tokens"]
        spent = sum(process.cpu_seconds or 0.0 for process in self.processes)
        return spent / tokens * 1e6 if tokens and self.processes else None


@dataclass(frozen=True, slots=True)
class Result(Record):
    """The record of one run of the load generator."""

    outcome: Outcome

    def shown(self) -> Mapping[str, object]:
        told = self.outcome
        return {
            **told.figures,
            "failures": {kind: asdict(failure) for kind, failure in told.failures.items()},
            "generator": {**asdict(told.generator), "bounded": told.generator.bounded},
            "server_cpu_us_per_token": told.server_cpu_us_per_token,
            "processes": [asdict(process) for process in told.processes],
        }

    def table(self) -> str:
        lines = [*self._head(), *self._latencies(), *self._failures(), *self._generator(), *self._processes()]
        return "\n".join(lines)

    def _head(self) -> Iterator[str]:
        yield ", ".join(f"{key} {value}" for key, value in self.workload.items() if key != "prompt")
        yield "{completed} completed and {failed} failed in {duration:.2f} s".format_map(self.outcome.figures)
        yield "{request_throughput:,.1f} requests/s, {output_throughput:,.0f} output tokens/s".format_map(
            self.outcome.figures
        )

    def _latencies(self) -> Iterator[str]:
        yield ""
        yield f"{'ms':8}" + "".join(f"{column:>11}" for column in ("mean", "p50", "p95", "p99"))
        for name in ("ttft", "itl", "tpot", "e2el"):
            row = [self.outcome.figures[f"{part}_{name}_ms"] for part in ("mean", "median", "p95", "p99")]
            yield f"{name.upper():8}" + "".join(f"{_number(value, 2):>11}" for value in row)

    def _failures(self) -> Iterator[str]:
        for kind, failure in self.outcome.failures.items():
            yield f"failed, {kind}: {failure.count}, the first: {failure.example}"

    def _generator(self) -> Iterator[str]:
        cost = self.outcome.generator
        per_chunk = _number(cost.cpu_us_per_chunk, 1)
        yield ""
        waited = "-" if cost.waited_share is None else f"{cost.waited_share:.0%}"
        yield (
            f"load generator: {cost.cpu_share:.0%} of a core, for which it waited {waited} of the time,"
            f" {per_chunk} us per chunk"
        )
        late = {
            "its loop was late": (cost.median_loop_lag_ms, cost.p99_loop_lag_ms),
            "it sent late": (cost.median_send_lag_ms, cost.p99_send_lag_ms),
        }
        for what, (middle, tail) in late.items():
            if tail is not None:
                yield f"{what} by {_number(middle, 2)} ms at p50, {_number(tail, 2)} ms at p99"
        if cost.bounded:
            limits = f"{GENERATOR_LIMIT:.0%} of a core or {LAG_LIMIT_MS:g} ms late at p99"
            yield f"BOUNDED BY THE LOAD GENERATOR: over {limits}, so the figures are its own"

    def _processes(self) -> Iterator[str]:
        if not self.outcome.processes:
            return
        tokens = self.outcome.figures["total_output_tokens"] or 0
        yield ""
        yield f"{'server process':62}{'pid':>9}{'CPU s':>9}{'us/token':>10}{'RSS MiB before':>16}{'after':>8}"
        for line in self.outcome.processes:
            per_token = line.cpu_seconds / tokens * 1e6 if tokens and line.cpu_seconds is not None else None
            before, after = (rss and rss / _MIB for rss in (line.rss_bytes_before, line.rss_bytes_after))
            yield (
                f"{line.name:62}{line.pid:>9}{_number(line.cpu_seconds, 2):>9}{_number(per_token, 1):>10}"
                f"{_number(before, 0):>16}{_number(after, 0):>8}"
            )
        total = sum(line.cpu_seconds or 0.0 for line in self.outcome.processes)
        yield f"{'all':62}{'':9}{total:>9.2f}{_number(self.outcome.server_cpu_us_per_token, 1):>10}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _git(*arguments: str) -> str | None:
    """None where git, the checkout or the answer is missing."""
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments],  # noqa: S607 - the developer's own git, wherever it is
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None
