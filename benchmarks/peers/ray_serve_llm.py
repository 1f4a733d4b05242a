"""Ray Serve LLM, as it comes and with its documented fast settings.

| setting                                  | as it comes | fast                                         |
|------------------------------------------|-------------|----------------------------------------------|
| RAY_SERVE_THROUGHPUT_OPTIMIZED           | off         | on: one loop, gRPC, buffered logs            |
| RAY_SERVE_ENABLE_HA_PROXY                | off         | on, with the HAProxy that ray[serve] brings  |
| RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING    | off         | on: HAProxy forwards to the engine's replica |
| Serve's access log                       | on          | off                                          |
| Ray's dashboard                          | on          | off                                          |
| replicas of the ingress and of the model | one each    | one of the model                             |

The three variables are what Ray's guide to high throughput asks for, with a fourth that names an executor of
vLLM, which is another one here. HAProxy listens on every interface, whatever it is told.

Its vLLM is 0.29, which Ray 2.60 asks for, in its CPU build. Ray Serve LLM chooses the executor itself, so a
plugin puts the simulated one in. Ray is told of four CPUs, so that the actors find places on a small machine.
"""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.client import Target
from benchmarks.peers.environments import Environment
from benchmarks.peers.launch import ENGINE_CORE, ROOT, Answering, Session, environment, launched
from benchmarks.peers.peer import MODEL, Running
from benchmarks.peers.settings import SIMULATED, Engine
from benchmarks.server import free_port

ENTRY_POINTS = Path(__file__).with_name("entry_points")
"""On the module path they tell vLLM of plugin.py."""

LOGICAL_CPUS = 4

SHARES = {
    "ray::ServeReplica:default:LLMServer": "replica",
    "ray::ServeReplica:default:": "router",
    "ray::ProxyActor": "router",
    "ray::HAProxyManager": "router",
    "haproxy": "router",
    **ENGINE_CORE,
}
"""The router's share is that of all between the socket and the replica."""


@dataclass
class RayServeLlm:
    """`build_openai_app` of one model."""

    name: str = "ray-serve-llm"
    title: str = "Ray Serve LLM"
    fast: bool = False
    engine: Engine = SIMULATED
    version: str = ""

    def prepare(self, cache: Path) -> None:
        self.engine.folder()
        self._environment = Environment(cache, "ray-serve-llm")
        self._environment.prepare()
        self.version = self._environment.version("ray")

    @contextmanager
    def running(self, folder: Path) -> Iterator[Running]:
        target, report = Target("127.0.0.1", free_port()), folder / "report.json"
        # The sockets of Ray and HAProxy, below folders of their own with long names, need a short path.
        with tempfile.TemporaryDirectory(prefix="peer-", ignore_cleanup_errors=True) as temporary:
            file = folder / f"{self.name}.json"
            file.write_text(json.dumps(self._arguments(target, report, temporary)))
            command: list[str | Path] = [
                self._environment.bin / "python",
                "-m",
                "benchmarks.peers.ray_application",
                file,
            ]
            variables = environment(**self._variables(Path(temporary)))
            with launched(command, target, folder / "ray.log", variables) as leader:
                yield Answering(target, report, [Session(leader, "ray", SHARES)])

    def _arguments(self, target: Target, report: Path, temporary: str) -> dict[str, Any]:
        engine = self.engine.arguments(report)
        engine.pop("distributed_executor_backend", None)
        model = self.engine.model_arguments()
        llm = {
            "model_loading_config": {"model_id": MODEL, "model_source": model["model"]},
            "accelerator_config": {"kind": "cpu"},
            "engine_kwargs": {**engine, "generation_config": model["generation_config"]},
        }
        ray = {"num_cpus": LOGICAL_CPUS, "_temp_dir": temporary, "_node_ip_address": target.host}
        if self.fast:
            llm["deployment_config"] = {"logging_config": {"enable_access_log": False}}
            ray["include_dashboard"] = False
        http = {"host": target.host, "port": target.port}
        return {"ray": ray, "http": http, "application": {"llm_configs": [llm]}}

    def _variables(self, temporary: Path) -> dict[str, str]:
        variables = {
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ENTRY_POINTS))),
            # As Trunkline does: Ray's ports listen on every interface.
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
        if self.fast:
            variables |= {
                "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
                "RAY_SERVE_ENABLE_HA_PROXY": "1",
                "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1",
                "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(temporary / "haproxy.cfg"),
                "RAY_SERVE_HAPROXY_SOCKET_PATH": str(temporary / "admin.sock"),
                "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(temporary),
                "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(temporary / "server-state"),
                "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
                "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
            }
        return variables
