"""The peers but Ray Serve LLM: Trunkline, vLLM's two servers, and two routers in front of the Python one.

All start the same engine (settings.py) with the same kind of command that their users give. What differs from
a bare start, and why that is fair:

| peer        | set beside the engine                                   | left as it comes                 |
|-------------|---------------------------------------------------------|----------------------------------|
| all         | loopback; no keys; usage reporting off; byte code       | metrics, statistics              |
|             | cached                                                  |                                  |
| trunkline   | limits above 1,024 streams                              | one router, one replica          |
| vllm-python | no access log                                           | one API server                   |
| vllm-rust   | no access log                                           | its threads                      |
| vllm-router | warnings only in its log                                | policy, retries, circuit breaker |
| litellm     | its page on production: a worker for each core, errors  | uvicorn on uvloop                |
|             | only in its log; its list of prices from the package    |                                  |

vLLM's servers run on this project's own installation of vLLM, which is the one that Trunkline's engine
replica runs on: the same version, and the same libraries below it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.client import Target
from benchmarks.peers.environments import Environment, binary_of_wheel
from benchmarks.peers.launch import ENGINE_CORE, ROOT, Answering, Session, environment, launched
from benchmarks.peers.peer import MODEL, Running
from benchmarks.peers.settings import SIMULATED, Engine, flags
from benchmarks.server import ROUTER, TRUNKLINE, free_port

REPORT = "report.json"

VLLM = "0.32.0"

KEEP_ALIVE_S = "150"
"""Longer than a router in front keeps a connection, or it may send a request on one that is being closed."""

RUST_BINARY = "vllm/vllm-rs"
"""Where the wheel of vLLM's CUDA build has the Rust frontend. It needs no CUDA; the CPU build lacks it."""


def _free_target() -> Target:
    return Target("127.0.0.1", free_port())


def _url(target: Target) -> str:
    return f"http://{target.authority}"


def _listening(target: Target) -> list[str]:
    return ["--host", target.host, "--port", str(target.port)]


@dataclass
class Trunkline:
    """`trunkline serve` of one model."""

    engine: Engine = SIMULATED
    name: str = "trunkline"
    title: str = "Trunkline"
    version: str = field(default_factory=lambda: metadata.version("trunkline"))

    def prepare(self, cache: Path) -> None:
        self.engine.folder()

    @contextmanager
    def running(self, folder: Path) -> Iterator[Running]:
        target, report, config = _free_target(), folder / REPORT, folder / "trunkline.yaml"
        config.write_text(json.dumps(self.configuration(report, folder)))
        command: list[str | Path] = [TRUNKLINE, "serve", config, "--port", str(target.port)]
        names = {f"ray::ServeReplica:{ROUTER}:": "router", f"ray::ServeReplica:{MODEL}-": "replica"}
        with launched(command, target, folder / "trunkline.log", environment()) as leader:
            yield Answering(target, report, [Session(leader, "ray", {**names, **ENGINE_CORE})])

    def configuration(self, report: Path, log_dir: Path) -> dict[str, Any]:
        """What is served."""
        model = {
            "name": MODEL,
            "engine": "vllm",
            "source": str(self.engine.folder()),
            # In the words that every peer gets, where a user would write `accelerator: simulated`.
            "engine_args": self.engine.arguments(report),
        }
        limits = {"in_flight": 4096, "queued": 4096}
        # Nobody else knows who calls, or keeps what was used.
        accounts = {"enabled": False}
        return {"models": [model], "limits": limits, "accounts": accounts, "log_dir": str(log_dir)}


@dataclass
class VllmServe:
    """`vllm serve`, with one of its two servers."""

    name: str = "vllm-python"
    title: str = "vllm serve, Python"
    rust: bool = False
    engine: Engine = SIMULATED
    version: str = VLLM

    def prepare(self, cache: Path) -> None:
        self.engine.folder()
        self._environment = environment(PYTHONPATH=str(ROOT), VLLM_HTTP_TIMEOUT_KEEP_ALIVE=KEEP_ALIVE_S)
        if self.rust:
            binary = binary_of_wheel(f"vllm=={VLLM}", RUST_BINARY, cache / self.name)
            self._environment |= {"VLLM_USE_RUST_FRONTEND": "1", "VLLM_RUST_FRONTEND_PATH": str(binary)}

    @contextmanager
    def running(self, folder: Path) -> Iterator[Running]:
        target, report = _free_target(), folder / REPORT
        command = [sys.executable, "-m", "benchmarks.peers.command", "serve", *self._options(report)]
        command += [*_listening(target), "--disable-uvicorn-access-log"]
        with launched(command, target, folder / "vllm.log", self._environment) as leader:
            yield Answering(target, report, [Session(leader, "server", ENGINE_CORE)])

    def _options(self, report: Path) -> list[str]:
        arguments = {**self.engine.model_arguments(), **self.engine.arguments(report)}
        return [arguments.pop("model"), *flags(arguments)]


@dataclass
class InFront:
    """A router of its own environment in front of `vllm serve`."""

    name: str
    title: str
    package: str
    engine: Engine = SIMULATED
    version: str = ""

    def prepare(self, cache: Path) -> None:
        self._behind = VllmServe(engine=self.engine)
        self._behind.prepare(cache)
        self._environment = Environment(cache, self.name)
        self._environment.prepare()
        self.version = self._environment.version(self.package)

    @contextmanager
    def running(self, folder: Path) -> Iterator[Running]:
        target = _free_target()
        with self._behind.running(folder) as behind:
            assert isinstance(behind, Answering)  # noqa: S101 - a server of ours
            command, variables = self.command(target, behind.target, folder)
            command[0] = str(self._environment.bin / command[0])
            log = folder / f"{self.name}.log"
            with launched(command, target, log, environment(**variables)) as leader:
                yield Answering(target, behind.report, [Session(leader, "router"), *behind.sessions])

    def command(self, target: Target, behind: Target, folder: Path) -> tuple[list[str], Mapping[str, str]]:
        """The command that listens at one target and asks the other, and its variables."""
        raise NotImplementedError


class VllmRouter(InFront):
    """`vllm-router`, in Rust."""

    def command(self, target: Target, behind: Target, folder: Path) -> tuple[list[str], Mapping[str, str]]:
        command = ["vllm-router", "--worker-urls", _url(behind), "--log-level", "warning"]
        return [*command, *_listening(target), "--prometheus-port", str(free_port())], {}


class LiteLlm(InFront):
    """LiteLLM's proxy."""

    def command(self, target: Target, behind: Target, folder: Path) -> tuple[list[str], Mapping[str, str]]:
        config = folder / "litellm.yaml"
        upstream = {"model": f"hosted_vllm/{MODEL}", "api_base": f"{_url(behind)}/v1", "api_key": "none"}
        models = [{"model_name": MODEL, "litellm_params": upstream}]
        config.write_text(json.dumps({"model_list": models, "litellm_settings": {"set_verbose": False}}))
        variables = {
            "LITELLM_MODE": "PRODUCTION",
            "LITELLM_LOG": "ERROR",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            # No peer asks for a key.
            "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
        }
        workers = ["--num_workers", str(os.cpu_count())]
        return ["litellm", "--config", str(config), *_listening(target), *workers], variables
