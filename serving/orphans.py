"""Processes that outlive their replica.

A replica that is killed cannot end its engine's processes, and they keep the memory that the next engine
needs. So each replica marks the environment that its children inherit with its own identity, and whoever
comes next on the node ends the marked processes whose replica is gone.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

VARIABLE = "TRUNKLINE_REPLICA"
"""In a child's environment: the process id and start time of the replica it belongs to."""

PATIENCE_S = 10.0
"""Seconds within which a killed process must be gone; one that is not hangs in the kernel."""

_MARK = re.compile(rb"[0-9]+:[0-9]+")


def mark() -> None:
    """Mark every process that this one will start by exec."""
    os.environ[VARIABLE] = f"{os.getpid()}:{_started(os.getpid())}"


def end_orphans() -> list[int]:
    """Kill every marked process of this user whose replica is gone, and wait until they are gone too.

    Returns their process ids. Raises TimeoutError if one does not go.
    """
    return _end(pid for pid, replica in _marked() if not _lives(replica))


def end_children() -> list[int]:
    """The same for the processes that this replica itself has marked."""
    own = os.environ.get(VARIABLE)
    return _end(pid for pid, replica in _marked() if replica == own and pid != os.getpid())


def _end(pids: Iterator[int]) -> list[int]:
    ended = {pid: _started(pid) for pid in pids}
    for pid in ended:
        _kill(pid)
    deadline = time.monotonic() + PATIENCE_S
    while any(started and _started(pid) == started for pid, started in ended.items()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {sorted(ended)} do not end")
        time.sleep(0.02)
    return sorted(ended)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _marked() -> Iterator[tuple[int, str]]:
    prefix = f"{VARIABLE}=".encode()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            # Another user's, or gone already.
            continue
        for variable in variables:
            if variable.startswith(prefix) and _MARK.fullmatch(mark := variable.removeprefix(prefix)):
                yield int(folder.name), mark.decode()


def _lives(replica: str) -> bool:
    pid, _, started = replica.partition(":")
    return _started(int(pid)) == started


def _started(pid: int) -> str:
    """When a process started, in clock ticks since boot; empty if it is gone, or dead and not yet reaped.

    With the process id it names a process for good, since ids are used again.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    # The second field, the command's name, may itself hold spaces and brackets.
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] in {"Z", "X"} else fields[19]
