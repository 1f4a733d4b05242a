"""Servers that are measured, as /proc shows them (Linux): which processes, their CPU time and memory.

CPU seconds have the clock tick's resolution, normally 10 ms, so a run should last some seconds.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_PROC = Path("/proc")
_LISTENING = "0A"
_DEAD = {"Z", "X"}
_NAME_LENGTH = 60
_folders = re.compile(r"[^ =]*/")


class NoProcess(ValueError):
    """There is no such process to measure."""


@dataclass(frozen=True, slots=True)
class Process:
    """One process at one moment."""

    pid: int
    parent: int
    session: int
    """The id of its session's leader: its children inherit it, and keep it when they are orphaned."""
    dead: bool
    """It has ended, and its parent has not asked for it yet."""
    born: int
    """Clock ticks since boot: with the id it names one process, ids being used again."""
    name: str
    cpu_seconds: float
    rss_bytes: int

    @property
    def began(self) -> float:
        """When it began, in seconds of `time.perf_counter()`, to within a clock tick."""
        booted = time.perf_counter() - time.clock_gettime(time.CLOCK_BOOTTIME)
        return booted + self.born / _TICKS_PER_SECOND


@dataclass(frozen=True, slots=True)
class Spent:
    """What one process used during a run."""

    pid: int
    name: str
    cpu_seconds: float | None
    """None where the process ended during the run: what it used is not known."""
    rss_bytes_before: int | None
    """None where the process began during the run."""
    rss_bytes_after: int | None


class Watch:
    """Looks at processes and all their descendants, itself apart: once when it is made, again at `spent`."""

    def __init__(self, roots: Iterable[int]) -> None:
        """Raises NoProcess for a root that does not exist."""
        alive = _alive()
        roots = list(roots)
        for root in roots:
            if root not in alive:
                raise NoProcess(f"there is no process with the id {root}")
        self._before = _tree(roots, alive)

    def spent(self) -> list[Spent]:
        """What each has used since, the busiest first."""
        alive = _alive()
        # Each is a root of its own now: one whose parent has ended meanwhile descends from nobody.
        same = [pid for pid, old in self._before.items() if pid in alive and alive[pid].born == old.born]
        after = _tree(same, alive)
        ended = [Spent(old.pid, old.name, None, old.rss_bytes, None) for old in self._before.values()]
        lines = [line for line in ended if line.pid not in same]
        for pid, new in after.items():
            old = self._before.get(pid) if pid in same else None
            cpu_seconds = new.cpu_seconds - (old.cpu_seconds if old else 0.0)
            lines.append(Spent(pid, new.name, cpu_seconds, old.rss_bytes if old else None, new.rss_bytes))
        return sorted(lines, key=lambda line: -(line.cpu_seconds or 0.0))


def session(leader: int) -> list[Process]:
    """The living processes of a session, those among them whose parent has ended."""
    return [process for process in _alive().values() if process.session == leader and not process.dead]


def descendants(root: int) -> list[Process]:
    """The living processes that a process has started, and those that they have."""
    return [
        process for process in _tree([root], _alive()).values() if process.pid != root and not process.dead
    ]


def lives(process: Process) -> bool:
    """Whether this very process still runs."""
    now = read(process.pid)
    return now is not None and now.born == process.born and not now.dead


def resident(pid: int) -> int:
    """Its resident memory in bytes. Raises NoProcess."""
    process = read(pid)
    if process is None:
        raise NoProcess(f"there is no process with the id {pid}")
    return process.rss_bytes


def _alive() -> dict[int, Process]:
    return {process.pid: process for process in map(read, _pids()) if process is not None}


def _tree(roots: Iterable[int], alive: Mapping[int, Process]) -> dict[int, Process]:
    children: dict[int, list[int]] = {}
    for process in alive.values():
        children.setdefault(process.parent, []).append(process.pid)
    found: dict[int, Process] = {}
    queue = list(roots)
    while queue:
        pid = queue.pop()
        if pid != os.getpid() and pid not in found:
            found[pid] = alive[pid]
            queue += children.get(pid, ())
    return found


def listeners(port: int) -> list[int]:
    """Ids of the processes that listen on a TCP port of this machine. Raises NoProcess where none is seen."""
    sockets = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    pids = [pid for pid in _pids() if sockets & _open_files(pid)] if sockets else []
    if not pids:
        raise NoProcess(f"no process of this user listens on port {port}")
    return pids


def _pids() -> list[int]:
    return [int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit()]


def read(pid: int) -> Process | None:
    """A process as it is now; None if there is none with that id."""
    folder = _PROC / str(pid)
    try:
        stat = (folder / "stat").read_text(errors="replace")
        command = (folder / "cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the name in brackets, which may itself hold spaces and brackets.
    opening, closing = stat.index("("), stat.rindex(")")
    fields = stat[closing + 2 :].split()
    return Process(
        pid=pid,
        parent=int(fields[1]),
        session=int(fields[3]),
        dead=fields[0] in _DEAD,
        born=int(fields[19]),
        name=_name(command) or stat[opening + 1 : closing],
        cpu_seconds=(int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND,
        rss_bytes=int(fields[21]) * _PAGE,
    )


def _name(command: bytes) -> str:
    """The command line, shortened, and its paths to their last part: the rest means nothing elsewhere."""
    line = " ".join(command.decode(errors="replace").replace("\0", " ").split())
    return _folders.sub("", line)[:_NAME_LENGTH]


def _listening_inodes(port: int) -> set[str]:
    inodes = set()
    for table in ("tcp", "tcp6"):
        path = _PROC / "net" / table
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            columns = line.split()
            if columns[3] == _LISTENING and int(columns[1].rpartition(":")[2], 16) == port:
                inodes.add(columns[9])
    return inodes


def _open_files(pid: int) -> set[str]:
    files = set()
    try:
        for entry in (_PROC / str(pid) / "fd").iterdir():
            files.add(str(entry.readlink()))
    except (PermissionError, FileNotFoundError, ProcessLookupError):
        pass  # another user's, or it (or one of its files) has gone meanwhile: what was seen stands
    return files
