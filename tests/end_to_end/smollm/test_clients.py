from __future__ import annotations

import ast
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import pytest

from tests.end_to_end.environments import interpreter
from tests.end_to_end.server import ROOT, Server
from tests.end_to_end.smollm import clients
from tests.end_to_end.smollm.clients.checks import PREFIX

PACKAGE = clients.__name__
SCRIPTS = Path(__file__).with_name("clients")
CLIENTS = sorted(pins.stem for pins in SCRIPTS.glob("*.txt"))
"""Each has pins, which make its environment, and a script, which runs in it."""


def checks(client: str) -> list[str]:
    """The checks of a client's script, which nothing but its own environment can import."""
    script = ast.parse((SCRIPTS / f"{client}.py").read_text())
    functions = [node for node in script.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [node.name.removeprefix(PREFIX) for node in functions if node.name.startswith(PREFIX)]


class Script:
    """A client's script at work; it goes from one check to the next by itself."""

    def __init__(self, process: subprocess.Popen[str], complaints: Path) -> None:
        """`complaints` is the file that takes its standard error."""
        self._process = process
        self._complaints = complaints
        self._failures: dict[str, str | None] = {}

    def failure(self, check: str) -> str | None:
        """What went wrong in a check, once the script is through with it; None if nothing did."""
        assert self._process.stdout is not None
        while check not in self._failures:
            line = self._process.stdout.readline()
            assert line, f"the script ended before {check}:\n{self._complaints.read_text()}"
            outcome = json.loads(line)
            self._failures[outcome["check"]] = outcome["failure"]
        return self._failures[check]


@pytest.fixture(scope="module")
def pythons() -> dict[str, Path]:
    """The interpreter of each client's environment."""
    return {client: interpreter(SCRIPTS / f"{client}.txt") for client in CLIENTS}


@pytest.fixture(scope="module")
def script_of(
    pythons: dict[str, Path], server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Script]]:
    """The script of a client, which is started when it is first asked for."""
    folder = tmp_path_factory.mktemp("clients")
    with ExitStack() as scripts:
        yield cache(
            lambda client: scripts.enter_context(running(client, pythons[client], server, folder / client))
        )


@contextmanager
def running(client: str, python: Path, server: Server, complaints: Path) -> Iterator[Script]:
    """A client's script; it has ended after the block."""
    with (
        complaints.open("w") as stderr,
        subprocess.Popen(
            [python, "-m", f"{PACKAGE}.{client}"],
            cwd=ROOT,
            env=os.environ | variables(server),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as process,
    ):
        try:
            yield Script(process, complaints)
        finally:
            process.kill()


def variables(server: Server) -> dict[str, str]:
    """The environment variables by which each client finds the server and its keys."""
    names = ("KONKO_BASE_URL", "KONKO_API_BASE", "OPENAI_BASE_URL")
    return {
        **dict.fromkeys(names, f"{server.url}/v1"),
        "KONKO_API_KEY": "a-key",
        "OPENAI_API_KEY": "another-key",
        "NO_PROXY": "127.0.0.1",
    }


@pytest.mark.parametrize(
    ("client", "check"), [(client, check) for client in CLIENTS for check in checks(client)]
)
def test_real_clients_work(script_of: Callable[[str], Script], client: str, check: str) -> None:
    """What a client that people use offers for our endpoints works, each call of it by the check's own
    sentence; what it offers beside is refused in a way that it understands."""
    failure = script_of(client).failure(check)
    assert failure is None, f"\n{failure}"
