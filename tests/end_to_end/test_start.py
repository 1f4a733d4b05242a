from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.server import ROOT, Server, until

ECHO: dict[str, Any] = {"models": [{"name": "e", "engine": "echo"}]}


@pytest.mark.parametrize(
    ("number", "step"),
    [(signal.SIGINT, "starting Ray"), (signal.SIGTERM, "starting the deployments")],
)
def test_a_start_can_be_interrupted(tmp_path: Path, number: int, step: str) -> None:
    """Ctrl-C and SIGTERM end a start that is under way, and leave no process behind."""
    server = Server(ECHO, tmp_path)
    try:
        until(lambda: step in server.said, 120, step)
        server.stop(number)
    finally:
        server.kill()
    assert "stopped" in server.said


def test_a_lost_interrupt_is_found() -> None:
    """An interrupt that comes in the middle of a fork, where Python drops what it raises, still ends the
    start, at its next step."""
    code = """
import os, signal
from cluster.session import Interruption
interruption = Interruption()
interruption.listen()
os.register_at_fork(before=lambda: os.kill(os.getpid(), signal.SIGINT))
if os.fork() == 0:
    os._exit(0)
print("dropped")
try:
    interruption.listen()
except KeyboardInterrupt:
    print("found")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.split() == ["dropped", "found"], done.stderr
