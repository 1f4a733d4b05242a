"""Peers as far as they need no download: the one engine behind all, and how a server is started and ended."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from benchmarks.client import Target
from benchmarks.peers.catalog import peers
from benchmarks.peers.launch import Answering, Session, environment, launched
from benchmarks.peers.peer import PeerFailed
from benchmarks.peers.ray_serve_llm import ENTRY_POINTS
from benchmarks.peers.servers import Trunkline
from benchmarks.peers.settings import EXECUTOR, SIMULATED, flags
from benchmarks.processes import session
from benchmarks.server import free_port
from cluster import config

ANSWERING = """
import http.server, subprocess, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        body = b'{"choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi"}, '
        body += b'"finish_reason": "length"}], '
        body += b'"usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}'
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *arguments): pass
subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
"""A server that leaves a child behind when it is interrupted."""


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """Where the modelled accelerator would tell of itself."""
    return tmp_path / "report.json"


@pytest.fixture
def engine_args() -> Iterator[Any]:
    """The class of vLLM's engine arguments, as it was before once the test has ended."""
    from vllm.engine.arg_utils import EngineArgs  # noqa: PLC0415 - slow, and not for every test

    before = EngineArgs.create_engine_config
    yield EngineArgs
    EngineArgs.create_engine_config = before  # type: ignore[method-assign] # what the plugin had put there


def test_the_flags_say_what_the_arguments_say(engine_args: Any, report: Path) -> None:
    """From a peer's flags vLLM's command line reads exactly the engine arguments that Trunkline is given."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: PLC0415 - as above

    arguments = SIMULATED.arguments(report)
    parser: Any = engine_args.add_cli_args(cast("Any", FlexibleArgumentParser)())
    read = asdict(engine_args.from_cli_args(parser.parse_args(flags(arguments))))
    assert {name: read[name] for name in arguments} == arguments


def test_trunkline_has_the_engine_that_the_others_have(tmp_path: Path, report: Path) -> None:
    """Its configuration is one that it takes, with the same engine arguments and room for 1,024 streams."""
    file = tmp_path / "trunkline.yaml"
    file.write_text(yaml.safe_dump(Trunkline().configuration(report, tmp_path)))
    (model,) = config.load(file).router_settings.models
    (served,) = config.load(file).models
    assert served.engine_args == SIMULATED.arguments(report)
    assert model.limits.in_flight > SIMULATED.given["max_num_seqs"] >= 1024


def test_the_plugin_puts_the_executor_in(engine_args: Any, report: Path) -> None:
    """The plugin is found by its entry point; with it a configuration that has settings for the simulated
    executor has the executor, and another keeps its own.
    """
    (found,) = [entry for mine in distributions(path=[str(ENTRY_POINTS)]) for entry in mine.entry_points]
    assert found.group == "vllm.general_plugins"
    found.load()()
    simulated = SIMULATED.arguments(report) | {"distributed_executor_backend": "mp"}
    plain = simulated | {"additional_config": {}}
    backends = [
        engine_args(**SIMULATED.model_arguments(), **arguments)
        .create_engine_config()
        .parallel_config.distributed_executor_backend
        for arguments in (simulated, plain)
    ]
    assert backends == [EXECUTOR, "mp"]


def test_a_server_is_awaited_told_apart_and_taken_down(tmp_path: Path, report: Path) -> None:
    """It answers in the block, each of its processes has one share, and none is left, orphans included."""
    target = Target("127.0.0.1", free_port())
    command = [sys.executable, "-c", ANSWERING, str(target.port)]
    with launched(command, target, tmp_path / "log", environment()) as leader:
        server = Answering(target, report, [Session(leader, "server", {"python -c import signal": "child"})])
        shares = {share.name: [process.pid for process in share.processes] for share in server.shares()}
        assert shares.keys() == {"server", "child"}
        assert shares["server"] == [leader]
    assert not session(leader)


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    """The refusal has its status and the end of its log."""
    command = [sys.executable, "-c", "print('no such model'); raise SystemExit(3)"]
    server = launched(command, Target("127.0.0.1", free_port()), tmp_path / "log", environment())
    with pytest.raises(PeerFailed, match=r"(?s)status 3.*no such model"):
        server.__enter__()


def test_a_server_that_dies_while_it_is_measured_is_a_failure(tmp_path: Path) -> None:
    """Nobody takes what was measured for a server's figures, and what it left behind is gone."""
    target = Target("127.0.0.1", free_port())
    command = [sys.executable, "-c", ANSWERING, str(target.port)]
    server = launched(command, target, tmp_path / "log", environment())
    leader = server.__enter__()
    os.kill(leader, signal.SIGKILL)
    os.waitid(os.P_PID, leader, os.WEXITED | os.WNOWAIT)
    with pytest.raises(PeerFailed, match=r"status -9"):
        server.__exit__(None, None, None)
    assert not session(leader)


def test_a_developers_shell_does_not_reach_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it tells Python, vLLM or Ray stays out, and nothing is reported to anybody."""
    for name in ("PYTHONDONTWRITEBYTECODE", "VLLM_USE_RUST_FRONTEND", "RAY_ADDRESS"):
        monkeypatch.setenv(name, "1")
    given = environment(PYTHONPATH="here")
    assert [name for name in given if name.startswith("PYTHON")] == ["PYTHONPATH"]
    assert {"VLLM_USE_RUST_FRONTEND", "RAY_ADDRESS"}.isdisjoint(given)
    assert (given["VLLM_NO_USAGE_STATS"], given["RAY_USAGE_STATS_ENABLED"]) == ("1", "0")


def test_peers_have_names_that_tell_them_apart() -> None:
    """Names and titles are each given once, Trunkline's first."""
    every = peers()
    assert next(iter(every)) == "trunkline"
    assert len({peer.title for peer in every.values()}) == len(every)
