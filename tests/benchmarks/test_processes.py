"""Measuring real processes: a server that listens and its child that works."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from benchmarks.points import wait
from benchmarks.processes import NoProcess, Watch, descendants, listeners, lives, session

DEADLINE = 30.0
CPU_SECONDS = 0.3

PARENT = """
import socket, subprocess, sys
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
sys.stdin.readline()
subprocess.run([sys.executable, sys.argv[1]])
print("child ended", flush=True)
sys.stdin.readline()
"""

CHILD = f"""
import sys, time
print("child started", flush=True)
sys.stdin.readline()
end = time.process_time() + {CPU_SECONDS}
while time.process_time() < end: pass
print("child worked", flush=True)
sys.stdin.readline()
"""


LEADER = """
import signal, subprocess, sys
subprocess.Popen([sys.executable, "-c", "print('child started', flush=True); input()"])
signal.pause()
"""


class Server:
    """The parent and its child; both take a step for each line they read and end where their input does."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.pid = process.pid
        self.input = process.stdin
        self._output = process.stdout

    async def says(self) -> str:
        """The next line of output."""
        return (await asyncio.wait_for(self._output.readline(), DEADLINE)).decode().strip()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    """A server as above, as far as its listening."""
    scripts = tmp_path / "parent.py", tmp_path / "child.py"
    for script, text in zip(scripts, (PARENT, CHILD), strict=True):
        script.write_text(text)
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, *map(str, scripts), stdin=pipe, stdout=pipe
    )
    server = Server(process)
    yield server
    server.input.close()
    await asyncio.wait_for(process.communicate(), DEADLINE)


async def test_cpu_time_is_split_by_process(server: Server) -> None:
    """A server is found by its port; what its child uses between two looks is the child's, under its name."""
    assert listeners(int(await server.says())) == [server.pid]
    server.input.write(b"\n")
    assert await server.says() == "child started"
    watch = Watch([server.pid])
    server.input.write(b"\n")
    assert await server.says() == "child worked"
    child, parent = watch.spent()
    assert re.fullmatch(r"python[0-9.]* child\.py", child.name)
    assert child.cpu_seconds == pytest.approx(CPU_SECONDS, rel=0.3)
    assert parent.pid == server.pid
    assert parent.name.endswith(" parent.py child.py")
    assert parent.cpu_seconds is not None
    assert parent.cpu_seconds < CPU_SECONDS / 2
    for line in (child, parent):
        assert line.rss_bytes_before is not None
        assert line.rss_bytes_after is not None
        assert 1e6 < line.rss_bytes_before <= line.rss_bytes_after * 1.2


async def test_processes_that_come_and_go(server: Server) -> None:
    """One that began during the run counts from its start; one that ended is listed, its use unknown."""
    port = int(await server.says())
    early = Watch(listeners(port))
    server.input.write(b"\n")
    assert await server.says() == "child started"
    watch = Watch([server.pid])
    child = next(line for line in early.spent() if line.name.endswith(" child.py") and line.pid != server.pid)
    assert child.cpu_seconds is not None
    assert child.rss_bytes_before is None
    server.input.write(b"\n")
    assert await server.says() == "child worked"
    server.input.write(b"\n")
    assert await server.says() == "child ended"
    ended = next(line for line in watch.spent() if line.pid == child.pid)
    assert (ended.name, ended.cpu_seconds, ended.rss_bytes_after) == (child.name, None, None)
    with pytest.raises(NoProcess, match=f"no process with the id {child.pid}"):
        Watch([child.pid])


async def test_an_orphan_stays_in_its_session() -> None:
    """What a process has started belongs to its session, alive, after its own end, and until the other's."""
    pipe = asyncio.subprocess.PIPE
    leader = await asyncio.create_subprocess_exec(
        sys.executable, "-c", LEADER, stdin=pipe, stdout=pipe, start_new_session=True
    )
    server = Server(leader)
    assert await server.says() == "child started"
    (child,) = descendants(leader.pid)
    assert {process.pid for process in session(leader.pid)} == {leader.pid, child.pid}
    assert time.perf_counter() - DEADLINE < child.began <= time.perf_counter()
    leader.kill()
    await leader.wait()
    assert [process.pid for process in session(leader.pid)] == [child.pid]
    assert lives(child)
    server.input.close()
    await wait(lambda: not lives(child), "the child's end")
    assert session(leader.pid) == []


def test_the_one_that_asks_is_left_out() -> None:
    """The generator is not counted among the servers, not even as the child of one."""
    assert os.getpid() not in {line.pid for line in Watch([os.getppid()]).spent()}
