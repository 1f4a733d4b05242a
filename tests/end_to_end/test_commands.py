"""The command where nothing runs: help, and what is refused before anything is started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.server import ROOT, TRUNKLINE, free_port

ECHO = "models: [{name: e, engine: echo}]\n"

# What is wrong → the file (none where it is missing) → what the refusal says after the file's name.
REFUSED: dict[str, tuple[str | None, str]] = {
    "missing": (None, "no such file"),
    "not YAML": ("models: [}", "not YAML: "),
    "an unknown key": (f"lisen: {{}}\n{ECHO}", "lisen: unknown key; did you mean listen?"),
    "a wrong type": (
        f'listen: {{port: "8000"}}\n{ECHO}',
        'listen.port: expected a whole number, got the text "8000"',
    ),
    "out of range": (f"routers: 0\n{ECHO}", "routers: expected at least 1, got 0"),
    "a name twice": (
        "models: [{name: e, engine: echo}, {name: e, engine: echo}]",
        'models[1].name: the text "e" is already the name at models[0].name',
    ),
    "names that differ by case": (
        "models: [{name: e, engine: echo}, {name: f, aliases: [E], engine: echo}]",
        'models[1].aliases[0]: the text "E" differs only by case from the name at models[0].name',
    ),
    "a source that is not there": (
        "models: [{name: m, engine: vllm, source: ./nowhere}]",
        "models[0].source: ",
    ),
    "an engine argument that vLLM does not know": (
        "models: [{name: m, engine: vllm, source: a/b, engine_args: {max_model_length: 5}}]",
        "models[0].engine_args.max_model_length: unknown vLLM engine argument; did you mean max_model_len",
    ),
}


def trunkline(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """What the command prints and how it ends, and that it leaves no process."""
    command = subprocess.Popen(
        [TRUNKLINE, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = command.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(command.pid, signal.SIGINT)
        command.communicate(timeout=60)
        raise
    with pytest.raises(ProcessLookupError):
        os.killpg(command.pid, 0)
    return subprocess.CompletedProcess(command.args, command.returncode, output, errors)


@pytest.mark.parametrize("command", ["check", "serve"])
@pytest.mark.parametrize("fault", REFUSED)
def test_a_bad_configuration_is_refused(tmp_path: Path, command: str, fault: str) -> None:
    """A configuration that cannot be used is refused in words that name the file, the field, the value and
    what was expected, by `check` as by `serve`, and nothing is started."""
    text, words = REFUSED[fault]
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    refused = trunkline(command, path)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"trunkline: {path}: {words}")
    assert len(refused.stderr.splitlines()) == 1
    assert refused.stdout == ""


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_a_port_in_use_is_refused(tmp_path: Path, taken: int) -> None:
    """Where somebody listens on the port already, `serve` says so before it starts anything."""
    path = tmp_path / "config.yaml"
    path.write_text(ECHO)
    began = time.monotonic()
    refused = trunkline("serve", path, "--port", str(taken))
    assert time.monotonic() - began < 30
    assert refused.returncode == 1
    assert f"cannot listen on 127.0.0.1:{taken}: Address already in use" in refused.stderr
    assert "starting" not in refused.stdout
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("port", ["0", "65536", "http", "-1"])
def test_what_is_no_port_is_refused(port: str) -> None:
    """--port takes the ports that there are."""
    refused = trunkline("serve", ROOT / "deploy" / "local.yaml", f"--port={port}")
    assert refused.returncode == 2
    assert f"expected a port from 1 to 65535, got {port!r}" in refused.stderr


@pytest.mark.parametrize("name", ["local", "production"])
def test_the_configurations_that_come_along_are_good(name: str) -> None:
    """`check` accepts the configurations of deploy/, and shows their models."""
    checked = trunkline("check", ROOT / "deploy" / f"{name}.yaml")
    assert checked.returncode == 0, checked.stderr
    assert "vllm" in checked.stdout


@pytest.mark.parametrize("command", ["status", "models"])
def test_silence_is_said_in_words(command: str) -> None:
    """Where no server answers, the commands that ask one say so."""
    url = f"http://127.0.0.1:{free_port()}"
    refused = trunkline(command, "--url", url)
    assert refused.returncode == 1
    assert refused.stderr == f"trunkline: nothing answers at {url}: [Errno 111] Connection refused\n"


@pytest.mark.parametrize("command", ["serve", "check", "status", "models"])
def test_help_says_what_a_command_does(command: str) -> None:
    """Each command's help says what it does, every option with a sentence, and how it exits."""
    asked = trunkline(command, "--help")
    assert asked.returncode == 0
    assert asked.stdout.startswith(f"usage: trunkline {command} ")
    assert "Exit status:" in asked.stdout
    listed = trunkline("--help")
    assert f"\n    {command} " in listed.stdout


def test_a_command_is_asked_for() -> None:
    """Without a command the usage is shown."""
    asked = trunkline()
    assert asked.returncode == 2
    assert asked.stderr.startswith("usage: trunkline")
