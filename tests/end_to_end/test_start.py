from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.server import Server, until

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
    assert "Traceback" not in server.said
