"""Stores for tests: a file, and a PostgreSQL server that the suite makes itself and ends.

`store_url` gives a test an empty store of each kind. A test that stops its server makes a PostgresCluster of
its own.
"""

from __future__ import annotations

import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import psutil
import psycopg
import pytest

USER = "trunkline"

START_S = 60.0
"""Seconds that the server gets to take connections, recovery after a crash included."""

STOP_S = 60.0
"""Seconds that it gets to end."""

# None of the ports that the kernel gives to clients: one that dials a stopped server's port again and again
# could be given that very port, and would be connected with itself.
PORTS = range(20_000, 30_000)

STOPS = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}
"""How the server ends: when its clients have left, after it has ended them, or as in a crash."""

OPTIONS = {
    "unix_socket_directories": "",
    "listen_addresses": "127.0.0.1",
    # What is committed must outlive every process, but not the machine.
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": "100",
    "shared_buffers": "32MB",
    "jit": "off",
}


STARTER = ThreadPoolExecutor(1)
"""Starts servers: to the kernel a child's parent is a thread, and the server ends with it."""


class PostgresCluster:
    """A PostgreSQL server of our own, on a port of the loopback address, with its files in a folder. It ends
    with this process, however this ends."""

    def __init__(self, folder: Path) -> None:
        """Make its files, which takes seconds. `folder` must be empty, and each of its parents open to all,
        as a server does not run as root."""
        self.port = _free_port()
        self._data, self._log = folder / "data", folder / "log"
        self._bin = binaries()
        self._password = secrets.token_hex(8)
        self._process: subprocess.Popen[bytes] | None = None
        if os.getuid() == 0:
            shutil.chown(folder, "postgres", "postgres")
        # bash hands the password on through a file that is never on a disk.
        initdb = 'exec "$0" "$@" --pwfile=<(echo "$PASSWORD")'
        arguments = (
            "--username",
            USER,
            "--auth=scram-sha-256",
            "--encoding=UTF8",
            "--no-locale",
            "--no-sync",
        )
        subprocess.run(
            [*_as_postgres(), "bash", "-c", initdb, self._bin / "initdb", *arguments, "-D", self._data],
            cwd=folder,
            env={**os.environ, "PASSWORD": self._password},
            stdout=subprocess.DEVNULL,
            check=True,
        )

    def start(self) -> None:
        """Returns when the server takes connections. It keeps its port and what was in it."""
        self._process = STARTER.submit(self._launched).result()
        deadline = time.monotonic() + START_S
        while not self._takes_connections():
            assert self.running, f"PostgreSQL ended:\n{self._log.read_text()}"
            assert time.monotonic() < deadline, f"PostgreSQL did not start:\n{self._log.read_text()}"
            time.sleep(0.02)

    def stop(self, mode: Literal["smart", "fast", "immediate"] = "fast") -> None:
        """End it, if it runs."""
        if self._process is not None:
            self._process.send_signal(STOPS[mode])
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
                raise
            finally:
                self._process = None

    def pause(self) -> None:
        """Let it answer nothing more, with all its connections open."""
        self._signal_all(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it answer again."""
        self._signal_all(signal.SIGCONT)

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def url(self, database: str) -> str:
        """Where one of its databases is, as a configuration writes it."""
        return f"postgresql://{USER}:{self._password}@127.0.0.1:{self.port}/{database}"

    def create_database(self) -> str:
        """The name of a new and empty database."""
        name = f"test_{secrets.token_hex(6)}"
        self.execute(f"CREATE DATABASE {name}")
        return name

    def drop_database(self, name: str) -> None:
        """Remove a database, whoever is still connected with it."""
        self.execute(f"DROP DATABASE {name} WITH (FORCE)")

    def execute(self, statement: str) -> None:
        """Run one statement outside of a transaction."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(statement.encode())

    def _launched(self) -> subprocess.Popen[bytes]:
        options = [f"--{name}={value}" for name, value in OPTIONS.items()]
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [*_as_postgres(), self._bin / "postgres", "-D", self._data, "-p", str(self.port), *options],
                cwd=self._data.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _signal_all(self, number: int) -> None:
        """The server begins with the process that makes the others."""
        assert self._process is not None
        first = psutil.Process(self._process.pid)
        for process in (first, *first.children()):
            with suppress(psutil.NoSuchProcess):  # it has just ended
                process.send_signal(number)

    def _takes_connections(self) -> bool:
        try:
            self.execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True


def binaries() -> Path:
    """The folder of PostgreSQL's programs, those of the newest version that is installed.

    Without them a test is skipped; but in CI they have to be there.
    """
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    elsewhere = shutil.which("initdb")
    if not found and not elsewhere:
        missing = "PostgreSQL's server is not installed"
        assert "CI" not in os.environ, missing
        pytest.skip(missing)
    return found[-1].parent if found else Path(str(elsewhere)).parent


@contextmanager
def postgres_cluster() -> Iterator[PostgresCluster]:
    """A server that runs in the block, whoever has stopped and started it there, and is gone after it."""
    # pytest's own folders are closed to other users.
    with tempfile.TemporaryDirectory(prefix="trunkline-postgres-") as folder:
        Path(folder).chmod(0o755)
        cluster = PostgresCluster(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop("immediate")


def _as_postgres() -> list[str]:
    """What comes before a command, for a user that PostgreSQL accepts and an end with this process."""
    user = ["--reuid=postgres", "--regid=postgres", "--init-groups"] if os.getuid() == 0 else []
    return ["setpriv", *user, "--pdeathsig=INT"]


def _free_port() -> int:
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")


# ---- fixtures -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresCluster]:
    """The server that all tests share: none of them stops it."""
    with postgres_cluster() as cluster:
        yield cluster


@pytest.fixture
def postgresql_url(postgres: PostgresCluster) -> Iterator[str]:
    """An empty database on that server."""
    name = postgres.create_database()
    yield postgres.url(name)
    postgres.drop_database(name)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """A file that is not there yet."""
    return f"sqlite:///{tmp_path}/store.sqlite"


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest) -> str:
    """An empty store, once of each kind."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url
