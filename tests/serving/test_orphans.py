from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from uuid import uuid4

import psutil
import pytest

from serving import orphans

REPLICA = """
import subprocess, sys
from serving import orphans
orphans.VARIABLE = sys.argv[1]
orphans.mark()
child = subprocess.Popen(["sh", "-c", "sleep 600 & echo $!; wait"], stdout=subprocess.PIPE, text=True)
print(child.pid, child.stdout.readline().strip(), flush=True)
sys.stdin.readline()
print(*orphans.end_children(), flush=True)
sys.stdin.readline()
"""
"""A process that marks what it starts: a child, and a child of that one."""


class Replica:
    """A process that has children as a replica has."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.children = self.line()

    def line(self) -> list[int]:
        """The process ids that it prints next."""
        assert self.process.stdout is not None
        return sorted(map(int, self.process.stdout.readline().split()))

    def say(self) -> None:
        """Let it go on."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()


@pytest.fixture
def variable(monkeypatch: pytest.MonkeyPatch) -> str:
    """A mark of this test's own: others' processes on this machine are none of its business."""
    name = f"{orphans.VARIABLE}_{uuid4().hex}"
    monkeypatch.setattr(orphans, "VARIABLE", name)
    monkeypatch.delenv(name, raising=False)
    return name


@contextmanager
def replica(variable: str) -> Iterator[Replica]:
    """A replica that lives, with everything it has started."""
    with subprocess.Popen(
        [sys.executable, "-c", REPLICA, variable], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        one = Replica(process)
        try:
            yield one
        finally:
            process.kill()
            for pid in one.children:
                if lives(pid):
                    os.kill(pid, 9)


def lives(pid: int) -> bool:
    """Whether a process runs."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_what_a_killed_replica_leaves_is_ended(variable: str) -> None:
    """After SIGKILL of a replica its children and theirs are found, ended and gone, whether or not anybody
    has taken note of its death; a second search finds nothing."""
    with replica(variable) as one:
        assert all(map(lives, one.children))
        one.process.kill()
        os.waitid(os.P_PID, one.process.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet reaped
        assert orphans.end_orphans() == one.children
        assert not any(map(lives, one.children))
        one.process.wait()
        assert orphans.end_orphans() == []


def test_the_processes_of_a_living_replica_are_left_alone(variable: str) -> None:
    """Of two replicas on a node, the death of the one costs the other nothing."""
    with ExitStack() as stack:
        dead, alive = (stack.enter_context(replica(variable)) for _ in range(2))
        dead.process.kill()
        dead.process.wait()
        assert orphans.end_orphans() == dead.children
        assert all(map(lives, alive.children))


def test_a_replica_ends_its_own_processes_and_no_others(variable: str) -> None:
    """A replica whose engine has died ends what it has started itself, and lives on to end."""
    with ExitStack() as stack:
        one, other = (stack.enter_context(replica(variable)) for _ in range(2))
        one.say()
        assert one.line() == one.children
        assert not any(map(lives, one.children))
        assert one.process.poll() is None
        assert all(map(lives, other.children))


@pytest.mark.parametrize(
    "mark", [b"", b"nonsense", b"12", b"12:", b":12", "²:1".encode(), b"\xff\xfe", b"1:2:3"]
)
def test_a_mark_that_no_replica_made_ends_nothing(variable: str, mark: bytes) -> None:
    """A process whose mark names no replica is not taken for an orphan."""
    environment = {**os.environb, variable.encode(): mark}
    with subprocess.Popen(["/bin/sleep", "600"], env=environment) as process:
        try:
            assert orphans.end_orphans() == []
            assert process.poll() is None
        finally:
            process.kill()


def test_a_process_id_that_is_used_again_is_no_life(variable: str) -> None:
    """A mark names its replica by process id and start: a stranger with its id keeps no orphan alive."""
    for started in ("1", str(2**70)):
        environment = {**os.environ, variable: f"{os.getpid()}:{started}"}
        with subprocess.Popen(["/bin/sleep", "600"], env=environment) as process:
            assert orphans.end_orphans() == [process.pid]
