"""What a peer is to the benchmark: a server that can be prepared once and started often."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from benchmarks.client import Target
from benchmarks.processes import Process

MODEL = "simulated"
"""What every server calls the model."""


@dataclass(frozen=True, slots=True)
class Share:
    """Some of a running server's processes, whose cost is told apart."""

    name: str
    """`engine core`, `server`, `router`, `replica`, `ray`."""
    processes: Sequence[Process]


class Running(Protocol):
    """A server that answers."""

    @property
    def target(self) -> Target:
        """Where it answers."""

    @property
    def report(self) -> Path:
        """The file that says what its modelled accelerator did; serving.simulation.report says how."""

    def shares(self) -> Sequence[Share]:
        """All its processes, each in one share."""


class Peer(Protocol):
    """One way to serve the model, as its users would."""

    name: str
    """For the command line and file names: lower case, with dashes."""
    title: str
    """For the table."""
    version: str
    """Of what is measured, once it is prepared."""

    def prepare(self, cache: Path) -> None:
        """Make its environment in a folder of its own below `cache`, unless it is there and still fits.
        Raises PeerFailed."""

    def running(self, folder: Path) -> AbstractContextManager[Running]:
        """A server that answers in the block and is gone after it, its logs in `folder`; after `prepare`.
        Raises PeerFailed."""


class PeerFailed(Exception):
    """A peer could not be prepared, started or ended; the words say why."""
