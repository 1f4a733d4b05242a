"""A Redis for tests, which the suite starts itself and ends.

`redis_url` gives a test an empty one. A test that stops its server makes a RedisServer of its own.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import redis

START_S = 60.0
"""Seconds that the server gets to take connections."""

# None of the ports that the kernel gives to clients: one that dials a stopped server's port again and again
# could be given that very port, and would be connected with itself.
PORTS = range(30_000, 32_000)


class RedisServer:
    """A server of our own on a port of the loopback address, which forgets everything when it stops. It ends
    with this process, however this ends."""

    def __init__(self) -> None:
        self.port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it is, as a configuration writes it."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Returns when the server takes connections. It keeps its port."""
        options = {"port": str(self.port), "bind": "127.0.0.1", "save": "", "appendonly": "no"}
        arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
        self._process = subprocess.Popen(
            ["/usr/bin/setpriv", "--pdeathsig=KILL", program(), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + START_S
        while not self._answers():
            assert self._process.poll() is None, "Redis ended"
            assert time.monotonic() < deadline, "Redis did not start"
            time.sleep(0.01)

    def stop(self) -> None:
        """End it, as in a crash, if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Let it answer nothing more, with all its connections open."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it answer again."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def client(self) -> redis.Redis:
        """Somebody who looks into it."""
        return redis.Redis.from_url(self.url, decode_responses=True)

    def _answers(self) -> bool:
        with self.client() as client:
            try:
                return bool(client.ping())
            except redis.ConnectionError:
                return False


def program() -> str:
    """The server's program. Without it a test is skipped; but in CI it has to be there."""
    found = shutil.which("redis-server")
    if found is None:
        missing = "Redis is not installed"
        assert "CI" not in os.environ, missing
        pytest.skip(missing)
    return found


@contextmanager
def running_redis() -> Iterator[RedisServer]:
    """A server that runs in the block, whoever has stopped and started it there, and is gone after it."""
    server = RedisServer()
    try:
        server.start()
        yield server
    finally:
        server.stop()


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
def shared_redis() -> Iterator[RedisServer]:
    """The server that all tests share: none of them stops it."""
    with running_redis() as server:
        yield server


@pytest.fixture
def redis_url(shared_redis: RedisServer) -> str:
    """That server, empty."""
    with shared_redis.client() as client:
        client.flushall()
    return shared_redis.url
