"""`trunkline serve` as a user runs it: a process of its own session, with everything that it starts."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Condition, Thread
from typing import Any

import httpx
import psutil
import yaml
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]
TRUNKLINE = Path(sys.executable).with_name("trunkline")

READY = "Ctrl-C ends it."
START_S = 280.0
"""Seconds that a start may take: vLLM's on two cores that do other work too."""

STOP_S = 90.0
"""Seconds that an end may take, running answers included."""

OPEN_FILES = 1024
"""What a login shell allows a process on most systems."""


class Server:
    """One run of `trunkline serve`, on a free port, from its start to its end."""

    def __init__(
        self,
        config: Mapping[str, Any],
        folder: Path,
        environment: Mapping[str, str] | None = None,
        port: int | None = None,
    ) -> None:
        """`folder` takes the configuration, the logs and a store. Where the configuration says nothing of
        accounts there are none; `environment` is what this process's is changed by. `port`: a free one."""
        self.log_dir = folder / "logs"
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.said = ""
        """What it has written to the terminal."""
        self._heard = Condition()
        path = folder / "config.yaml"
        whole = {"accounts": {"enabled": False}, **config, "log_dir": str(self.log_dir)}
        path.write_text(yaml.safe_dump(whole))
        self._process = subprocess.Popen(
            [TRUNKLINE, "serve", path, "--port", str(self.port)],
            cwd=folder,
            env={**os.environ, "TRUNKLINE_DATA": str(folder / "data"), **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.pid = self._process.pid
        resource.prlimit(self.pid, resource.RLIMIT_NOFILE, (OPEN_FILES, _most_open_files()))
        self._listener = Thread(target=self._listen, daemon=True)
        self._listener.start()

    def wait_ready(self) -> None:
        """Return when it says that it is."""
        with self._heard:
            self._heard.wait_for(lambda: READY in self.said or self._ended, START_S)
        assert READY in self.said, f"it did not become ready:\n{self.said}\n{self.logs()}"

    def stop(self, number: int = signal.SIGINT) -> None:
        """End it as a terminal's Ctrl-C does, or by another signal; it must end well and leave nothing."""
        if number == signal.SIGINT:
            os.killpg(self.pid, number)
        else:
            self._process.send_signal(number)
        status = self._process.wait(STOP_S)
        assert status == 0, f"it ended with {status}:\n{self.said}"
        # The kernel ends some of them because their parent has ended.
        until(lambda: not self.processes(), 5, "the end of every process")

    def kill(self) -> None:
        """End whatever is left of it."""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        self._listener.join()

    @property
    def running(self) -> bool:
        """Whether the command has not ended yet."""
        return self._process.poll() is None

    # ---- its processes -------------------------------------------------------------------------------

    def processes(self) -> list[psutil.Process]:
        """Every living process of its session, orphans among them."""
        return [process for process in psutil.process_iter() if _session(process) == self.pid]

    def replicas(self, model: str) -> dict[str, psutil.Process]:
        """The processes of a model's living replicas, by their ids."""
        return self._alive("replica ready", "replica", model=model)

    def routers(self) -> dict[str, psutil.Process]:
        """The processes of the living routers, by their ids."""
        return self._alive("router ready", "router")

    def _alive(self, event: str, identity: str, **fields: str) -> dict[str, psutil.Process]:
        alive = {process.pid: process for process in self.processes()}
        records = self.log(event, **fields)
        return {record[identity]: alive[record["pid"]] for record in records if record["pid"] in alive}

    # ---- what it tells -------------------------------------------------------------------------------

    def log(self, event: str, **fields: object) -> list[dict[str, Any]]:
        """Its log's lines of that event with those fields, of every process, each with its `pid`."""
        return [
            record
            for record in self._records()
            if record["event"] == event and all(record.get(name) == value for name, value in fields.items())
        ]

    def request(self, name: str) -> dict[str, Any]:
        """The log's line of the request with this x-request-id, as soon as it is there."""
        until(lambda: self.log("request", request_id=name), 10, f"a line of the request {name}")
        (line,) = self.log("request", request_id=name)
        return line

    def logs(self) -> str:
        """All its logs, for a person."""
        return "\n".join(path.read_text() for path in sorted(self.log_dir.glob("*.jsonl")))

    def log_files(self) -> list[Path]:
        """Every file of its logs, and of those of the Ray that it has started."""
        commands = [" ".join(process.cmdline()) for process in self.processes()]
        gcs = re.compile(r"gcs_server.* --log_dir=(\S+)")
        (folder,) = {found[1] for line in commands if (found := gcs.search(line))}
        files = [*self.log_dir.iterdir(), *Path(folder).rglob("*")]
        return [path for path in files if path.is_file()]

    def metrics(self) -> Metrics:
        """What GET /metrics says now."""
        with http(self) as client:
            return Metrics(client.get("/metrics").text)

    def states(self) -> dict[str, str]:
        """The state of each model, as GET /health says."""
        with http(self) as client:
            states: dict[str, str] = client.get("/health").json()["models"]
            return states

    def _records(self) -> Iterator[dict[str, Any]]:
        for path in sorted(self.log_dir.glob("*.jsonl")):
            pid = int(path.stem.rpartition("-")[2])
            for line in path.read_text().splitlines():
                yield {**json.loads(line), "pid": pid}

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for line in output:
                with self._heard:
                    self.said += line
                    self._heard.notify_all()
        with self._heard:
            self._heard.notify_all()

    @property
    def _ended(self) -> bool:
        return not self.running


class Metrics:
    """The samples of one scrape."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.counters: set[str] = set()
        """Names of the samples that may only grow."""
        self.samples: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self.samples[sample.name, frozenset(sample.labels.items())] = sample.value
                if family.type == "counter" or sample.name.endswith(("_bucket", "_count")):
                    self.counters.add(sample.name)

    def total(self, name: str, **labels: str) -> float:
        """The sum of the samples of that name with those labels, over all else."""
        return sum(self.by("replica", name, **labels).values())

    def by(self, label: str, name: str, **labels: str) -> dict[str, float]:
        """The same for each value of a label."""
        sums: dict[str, float] = {}
        for (sample, items), value in self.samples.items():
            found = dict(items)
            if sample == name and labels.items() <= found.items():
                sums[found.get(label, "")] = sums.get(found.get(label, ""), 0.0) + value
        return sums


@contextmanager
def serving(
    config: Mapping[str, Any],
    folder: Path,
    environment: Mapping[str, str] | None = None,
    port: int | None = None,
) -> Iterator[Server]:
    """A server that is ready in the block and ends by Ctrl-C after it, if it has not ended before."""
    server = Server(config, folder, environment, port)
    try:
        server.wait_ready()
        yield server
        if server.running:
            server.stop()
    finally:
        server.kill()


@contextmanager
def http(server: Server) -> Iterator[httpx.Client]:
    """A client with connections of its own."""
    with httpx.Client(base_url=server.url, timeout=120, trust_env=False) as client:
        yield client


def until(condition: Callable[[], object], deadline_s: float, what: str) -> float:
    """Wait for a condition; the seconds that it took. `what` says what was waited for where it fails."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < deadline_s, f"{what}: not within {deadline_s:g} s"
        time.sleep(0.02)
    return time.monotonic() - began


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _session(process: psutil.Process) -> int:
    """The id of the session that a process belongs to; 0 if it is dead, reaped or not."""
    try:
        return 0 if process.status() == psutil.STATUS_ZOMBIE else os.getsid(process.pid)
    except (ProcessLookupError, psutil.NoSuchProcess):
        return 0


def _most_open_files() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]
