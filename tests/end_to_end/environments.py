"""Virtual environments for clients that this project's own cannot hold, kept from run to run."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TextIO


def interpreter(requirements: Path) -> Path:
    """The Python of an environment with the packages that a file of pins lists, and no others.

    The first run that asks makes it; others that ask meanwhile wait. Raises AssertionError with the output
    of what failed.
    """
    folder = folder_of(requirements)
    python, ready = folder / "bin" / "python", folder / ".ready"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not ready.exists():  # what a run that was killed has left is cleared
            run = partial(_run, lock)
            pip = (sys.executable, "-m", "pip", "--python", python)  # this Python's, as it is configured
            run(sys.executable, "-m", "venv", "--clear", "--without-pip", folder)
            run(*pip, "install", "--no-input", "--no-compile", "--no-deps", "-r", requirements)
            run(*pip, "check")  # the file has all that its packages need
            ready.touch()
    return python


def folder_of(requirements: Path) -> Path:
    """Where the environment is kept: its name changes with the file's content and with this Python."""
    python = f"{sys.version} in {sys.base_prefix}"
    digest = hashlib.sha256(requirements.read_bytes() + python.encode()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "trunkline" / "test-environments" / f"{requirements.stem}-{digest[:12]}"


def _run(lock: TextIO, *command: str | Path) -> None:
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        pass_fds=[lock.fileno()],  # a child that outlives a killed run holds the lock as long as it writes
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}"
