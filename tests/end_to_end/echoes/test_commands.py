from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.end_to_end.echoes import ALIAS, ECHO, LONE, PAIR, QUICK
from tests.end_to_end.server import TRUNKLINE, Server


def trunkline(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """What the command prints and how it ends."""
    return subprocess.run([TRUNKLINE, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_status_shows_each_model(server: Server) -> None:
    """`trunkline status` has a line for each model, with its state, and succeeds when all are ready."""
    status = trunkline("status", "--url", server.url)
    assert status.returncode == 0, status.stderr
    _, *lines = (line.split() for line in status.stdout.splitlines())
    assert [line[:2] for line in lines] == [[ECHO, "ready"], [PAIR, "ready"], [LONE, "ready"]]


def test_models_lists_every_name(server: Server) -> None:
    """`trunkline models` has a line for each name, aliases among them, and with --json what the API says
    of them."""
    models = trunkline("models", "--url", server.url)
    assert models.returncode == 0, models.stderr
    assert [line.split()[0] for line in models.stdout.splitlines()[1:]] == [ECHO, QUICK, ALIAS, PAIR, LONE]
    listed = json.loads(trunkline("models", "--url", server.url, "--json").stdout)
    assert [model["id"] for model in listed] == [ECHO, QUICK, ALIAS, PAIR, LONE]
    assert listed[0]["description"] == "As fast as the machine allows."


def test_a_second_server_is_refused(server: Server, tmp_path: Path) -> None:
    """On the port of a running server no second one starts, though routers of one server share it."""
    path = tmp_path / "config.yaml"
    path.write_text("models: [{name: e, engine: echo}]")
    refused = trunkline("serve", path, "--port", str(server.port))
    assert refused.returncode == 1
    assert f"listen: cannot listen on 127.0.0.1:{server.port}: Address already in use" in refused.stderr
    assert "starting" not in refused.stdout
