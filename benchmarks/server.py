"""`trunkline serve` as a user runs it, to be measured: on a free port of 127.0.0.1, in a session of its own.

All that it starts stays in that session, orphans too, so what belongs to it can be told from any other server
on the machine: only processes of the session are ever looked at or killed.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from time import perf_counter
from typing import Any

from benchmarks.client import Target
from benchmarks.processes import Process, session
from benchmarks.workload import KEY
from cluster.config import ModelConfig

TRUNKLINE = Path(sys.executable).with_name("trunkline")

READY = "Ctrl-C ends it."
"""What `trunkline serve` says last, once everything answers."""

RAY_STARTS = "starting Ray"
"""What it says when everything is checked and ready to be started."""

RAY_UP = "starting the deployments"
"""What it says when Ray runs."""

START_S = 600.0
"""Seconds that a start may take, the first conversion of a model included."""

STOP_S = 90.0
"""Seconds that an end may take."""

KILL_S = 10.0
"""Seconds that killed processes may take to be gone."""

KNOCK_S = 0.05
"""Seconds between two tries to reach the port during the start."""

ROUTER = "router"
"""The Serve application of the routers."""


class ServerFailed(Exception):
    """The server did not start, run or end as it should; the words say how."""


class Server:
    """One run of `trunkline serve`, from start to end. Moments are seconds of `time.perf_counter()`."""

    def __init__(self, config: Path) -> None:
        self.target = Target("127.0.0.1", free_port())
        self.answered: float | None = None
        """When the port first answered a request; None until then."""
        self._said: list[tuple[float, str]] = []
        self._settled = Event()
        self._folder = TemporaryDirectory(prefix="bench-store-")
        """Of accounts that nobody else has."""
        self.began = perf_counter()
        self._process = subprocess.Popen(
            [TRUNKLINE, "serve", config, "--port", str(self.target.port)],
            env={**os.environ, "TRUNKLINE_DATA": self._folder.name, "TRUNKLINE_ADMIN_KEY": KEY},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.pid = self._process.pid
        for work in (self._listen, self._knock):
            Thread(target=work, daemon=True).start()

    def wait_ready(self) -> None:
        """Return when it says that it is ready. Raises ServerFailed."""
        if not self._settled.wait(START_S):
            raise ServerFailed(f"not ready within {START_S:g} s; it said:\n{self.output}")
        self.said(READY)

    def stop(self) -> None:
        """End it as Ctrl-C does. Raises ServerFailed where it ends badly or leaves a process behind."""
        self._process.send_signal(signal.SIGINT)
        try:
            status = self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            raise ServerFailed(f"it did not end within {STOP_S:g} s; it said:\n{self.output}") from None
        if status:
            raise ServerFailed(f"it ended with status {status}; it said:\n{self.output}")
        if left := session(self.pid):
            raise ServerFailed(f"it left {[(process.pid, process.name) for process in left]}")

    def kill(self) -> None:
        """End whatever is left of it."""
        kill_session(self.pid)
        self._process.wait()
        self._folder.cleanup()

    # ---- what it tells -------------------------------------------------------------------------------

    @property
    def output(self) -> str:
        """All that it has written to the terminal."""
        return "".join(line for _, line in self._said)

    def said(self, words: str) -> float:
        """When it first wrote a line with these words. Raises ServerFailed if it has not."""
        for moment, line in self._said:
            if words in line:
                return moment
        raise ServerFailed(f"it never said {words!r}; it said:\n{self.output}")

    def logged(self, model: str, event: str) -> tuple[float, dict[str, Any]]:
        """When a model's replica first logged an event, and what with it. Raises ServerFailed."""
        folder = re.search(r"logs are in (\S+)", self.output)
        files = Path(folder[1]).glob(f"replica-{model}-*.jsonl") if folder else ()
        for line in (line for file in files for line in file.read_text().splitlines()):
            entry = json.loads(line)
            if entry["event"] == event:
                ago = time.time() - datetime.fromisoformat(entry["timestamp"]).timestamp()
                return perf_counter() - ago, entry
        raise ServerFailed(f"the replica of {model} never logged {event!r}; the server said:\n{self.output}")

    def gauges(self, model: str, *names: str) -> list[float]:
        """Of each metric the sum of a model's samples over the deployment, by one scrape. Raises OSError."""
        text = self._get("/metrics")
        return [sum(_samples(text, name, model)) for name in names]

    def _get(self, path: str) -> str:
        connection = HTTPConnection(self.target.host, self.target.port, timeout=10)
        try:
            connection.request("GET", path)
            return connection.getresponse().read().decode()
        except HTTPException as error:
            raise OSError(f"GET {path}: {error!r}") from error
        finally:
            connection.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None  # noqa: S101 - it is a pipe
        with self._process.stdout as output:
            for line in output:
                self._said.append((perf_counter(), line))
                if READY in line:
                    self._settled.set()
        self._settled.set()

    def _knock(self) -> None:
        while not self._settled.is_set():
            with suppress(OSError):
                self._get("/health")
                self.answered = perf_counter()
                return
            time.sleep(KNOCK_S)

    # ---- its processes -------------------------------------------------------------------------------

    @property
    def router(self) -> Process:
        """The process of its one router. Raises ServerFailed."""
        return self._actor(ROUTER)

    def replica(self, model: str) -> Process:
        """The process of a model's one replica; of a vLLM one, EngineCore's parent. Raises ServerFailed."""
        return self._actor(ModelConfig(name=model, engine="echo").application)

    def _actor(self, application: str) -> Process:
        # Ray calls the process of a replica so, with what it does just now at the end.
        title = f"ray::ServeReplica:{application}:"
        found = [process for process in session(self.pid) if process.name.startswith(title)]
        if len(found) != 1:
            raise ServerFailed(f"{len(found)} processes are called {title}..., expected one")
        return found[0]


@contextmanager
def serving(config: Path) -> Iterator[Server]:
    """A server that is ready in the block, ends by Ctrl-C after it, and is gone in any case."""
    server = Server(config)
    try:
        server.wait_ready()
        yield server
        server.stop()
    finally:
        server.kill()


def kill_session(leader: int) -> None:
    """End every process of a session at once. Raises ServerFailed where one stays."""
    deadline = time.monotonic() + KILL_S
    while left := session(leader):
        if time.monotonic() > deadline:
            raise ServerFailed(f"processes {[process.pid for process in left]} do not end")
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        time.sleep(KNOCK_S)


def free_port() -> int:
    """A TCP port of 127.0.0.1 on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _samples(text: str, name: str, model: str) -> Iterator[float]:
    pattern = rf'^{re.escape(name)}\{{[^}}]*\bmodel="{re.escape(model)}"[^}}]*\}} (\S+)$'
    return map(float, re.findall(pattern, text, re.MULTILINE))
