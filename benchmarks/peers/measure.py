"""What is measured of one running server: each point is one run of the load generator.

A measurement is flat: figures by name, None where there was nothing to measure. The load generator's figures
have their own names; what `/proc` says of the server's processes is told for all and for each share:

    cpu_us_per_token, cpu_us_per_token/engine core, cpu_us_per_token/server, ...
    cpu_us_per_request, ...       of the same CPU time, over the answers
    idle_bytes, ...               resident before the first crowd
    connection_bytes, ...         by how much that rises where connections stand open, over the connections
    stream_bytes, ...             by how much it rises to its peak, over the streams at the time
    busy_share, late_share        of the modelled accelerator's time: see `_accelerator_figures`
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.client import Target, connected
from benchmarks.figures import GeneratorCost
from benchmarks.load import OPEN_LOOP_STREAMS, Plan, Stream, over_http, run
from benchmarks.peers.peer import MODEL, Running, Share
from benchmarks.processes import read
from benchmarks.result import Outcome
from benchmarks.workload import Workload

Figures = dict[str, float | None]


@dataclass(frozen=True, slots=True)
class Measurement:
    """One point of one server, once."""

    figures: Figures
    failures: Mapping[str, str]
    """Of each kind of failed answer the first one's words. Failed answers are in no figure."""
    bounded: bool
    """The load generator was the limit."""


PROMPT = "Tell me about the history of the railway."
TOKENS = 128
"""Of an answer."""

CROWD = "1024"
"""The point at which memory is measured."""

SATURATED = ("256", CROWD)
"""The points whose throughput may be a server's most."""

IDLE_CONNECTIONS = 1024
"""As many as streams at the most."""

HELD_S = 1.0
"""Seconds for which they stand open before the memory is looked at: all have been accepted by then."""

LOOK_S = 0.25
"""Seconds between two looks at the memory; one costs the generator about a millisecond."""

_STREAMED = Workload(MODEL, PROMPT, max_tokens=TOKENS, ignore_eos=True)


@dataclass(frozen=True, slots=True)
class Point:
    """One load that every server is put under."""

    sentence: str
    workload: Workload
    streams: int
    duration: float
    """Seconds. CPU time has a resolution of 10 ms, and what has begun is always carried to its end."""
    rated: bool = False
    """At half the server's own saturation, in an open loop."""
    warm_up: int = 0

    def plan(self, target: Target, rate: float | None = None) -> Plan:
        """The load on one server. `rate`, in requests per second, is for the rated point."""
        return Plan(
            target,
            self.workload,
            self.streams,
            duration=self.duration,
            rate=rate if self.rated else None,
            warm_up=self.warm_up,
            expect_tokens=True,
        )


def _streams(streams: int, duration: float) -> Point:
    text = f"{streams:,} stream{'s' * (streams > 1)} in a closed loop"
    return Point(text, _STREAMED, streams, duration, warm_up=min(streams, 64))


def _whole(at_once: int) -> Point:
    work = replace(_STREAMED, max_tokens=1, whole=True)
    return Point(f"{at_once} whole answers of one token at a time", work, at_once, 3.0, warm_up=64)


POINTS: Mapping[str, Point] = {
    "first": Point(
        "one stream of 8 tokens after another", replace(_STREAMED, max_tokens=8), 1, 3.0, warm_up=8
    ),
    "1": _streams(1, 4.0),
    "16": _streams(16, 3.0),
    "64": _streams(64, 4.0),
    "256": _streams(256, 4.0),
    CROWD: _streams(1024, 4.0),
    "whole": _whole(64),
    "whole256": _whole(256),
    "half": Point(
        "streams at half the server's saturation, due at random",
        _STREAMED,
        OPEN_LOOP_STREAMS,
        8.0,
        rated=True,
    ),
}
"""By the name that --points takes, in the order in which they are measured. Any other number of streams is a
name too: see `point`."""

WARM_UP = Point("", _STREAMED, 16, 2.0)
"""What a server does before anything is measured of it."""


def point(name: str) -> Point:
    """The point of that name. Raises ValueError."""
    if name in POINTS:
        return POINTS[name]
    if name.isdecimal() and int(name):
        return _streams(int(name), 4.0)
    raise ValueError(f"{name!r} is no point; expected a number of streams or one of {', '.join(POINTS)}")


def saturation(points: Mapping[str, Measurement]) -> float | None:
    """The most requests per second that a server carried through; None where no such point was measured."""
    found = [points[name].figures["request_throughput"] for name in SATURATED if name in points]
    return max((rate for rate in found if rate is not None), default=None)


class Measured:
    """A running server as it is measured, point by point."""

    def __init__(self, server: Running, streams_of: Callable[[Plan], Sequence[Stream]] = over_http) -> None:
        self._server = server
        self._streams_of = streams_of
        self._idle: dict[str, int] = {}

    async def warm_up(self) -> Measurement:
        """Load it for the first time, and see what it holds after that, alone and with connections."""
        await run(WARM_UP.plan(self._server.target), self._streams_of)
        self._idle = _resident(self._server.shares())
        rises = await self._connection_bytes() if self._streams_of is over_http else {}
        told = _told("idle_bytes", self._idle) | _told("connection_bytes", rises)
        return Measurement(told, failures={}, bounded=False)

    async def at(self, name: str, rate: float | None) -> Measurement:
        """Put it under the load of a point. `rate` is for the rated one, in requests per second."""
        plan = point(name).plan(self._server.target, rate)
        pids = tuple(process.pid for share in self._server.shares() for process in share.processes)
        before: dict[str, float] = {}

        def begins() -> None:
            before.update(_accelerator(self._server.report))

        running = asyncio.create_task(run(replace(plan, server_pids=pids), self._streams_of, begins))
        peak = await self._peak(running) if name == CROWD else {}
        result = await running
        after = _accelerator(self._server.report)
        rises = self._rises(peak, plan.streams)
        shares = self._server.shares()
        in_process = any(process.pid == os.getpid() for share in shares for process in share.processes)
        return Measurement(
            figures={
                **result.figures,
                **_cpu(result, shares),
                **_told("stream_bytes", rises),
                **({} if in_process else _generator(result.generator)),
                **_accelerator_figures(before, after, result.figures["duration"]),
            },
            failures={kind: failure.example for kind, failure in result.failures.items()},
            bounded=result.generator.bounded and not in_process,
        )

    async def _connection_bytes(self) -> Mapping[str, float]:
        """By share, what an open connection without a request takes; nothing where the server keeps none."""
        try:
            async with connected(self._server.target, IDLE_CONNECTIONS) as still_open:
                await asyncio.sleep(HELD_S)
                held = _resident(self._server.shares())
                return self._rises(held, IDLE_CONNECTIONS) if still_open() == IDLE_CONNECTIONS else {}
        except OSError:
            return {}

    def _rises(self, held: Mapping[str, int], among: int) -> dict[str, float]:
        """By how much each share holds more than when it was idle, for each of so many."""
        return {share: (now - self._idle.get(share, 0)) / among for share, now in held.items()}

    async def _peak(self, running: asyncio.Task[Outcome]) -> dict[str, int]:
        """The most that each share held at one look while the run went on."""
        shares, peak = self._server.shares(), dict[str, int]()
        while not running.done():
            for share, held in _resident(shares).items():
                peak[share] = max(peak.get(share, 0), held)
            await asyncio.wait([running], timeout=LOOK_S)
        return peak


def _resident(shares: Sequence[Share]) -> dict[str, int]:
    """Bytes by share; a process that has ended holds none."""
    held = {}
    for share in shares:
        processes = (read(process.pid) for process in share.processes)
        held[share.name] = sum(process.rss_bytes for process in processes if process is not None)
    return held


def _cpu(result: Outcome, shares: Sequence[Share]) -> Figures:
    """CPU time per token and per answer."""
    name_of = {process.pid: share.name for share in shares for process in share.processes}
    spent = dict.fromkeys((share.name for share in shares), 0.0)
    for line in result.processes:
        # One that has ended belonged to no share that is left; what it used is not known either.
        if line.cpu_seconds is not None and line.pid in name_of:
            spent[name_of[line.pid]] += line.cpu_seconds
    if (own := name_of.get(os.getpid())) is not None:
        spent[own] += result.generator.cpu_seconds
    tokens, answers = result.figures["total_output_tokens"], result.figures["completed"]
    return {
        **_told("cpu_us_per_token", spent, 1e6 / tokens if tokens else None),
        **_told("cpu_us_per_request", spent, 1e6 / answers if answers else None),
    }


def _told(name: str, by_share: Mapping[str, float], scale: float | None = 1.0) -> Figures:
    """A figure for all shares together and for each."""
    if scale is None or not by_share:
        return {}
    each: Figures = {f"{name}/{share}": value * scale for share, value in by_share.items()}
    return {name: sum(by_share.values()) * scale, **each}


def _generator(cost: GeneratorCost) -> Figures:
    return {
        "generator_cpu_share": cost.cpu_share,
        "generator_cpu_us_per_chunk": cost.cpu_us_per_chunk,
        "generator_waited_share": cost.waited_share,
        "median_loop_lag_ms": cost.median_loop_lag_ms,
        "p99_loop_lag_ms": cost.p99_loop_lag_ms,
        "median_send_lag_ms": cost.median_send_lag_ms,
        "p99_send_lag_ms": cost.p99_send_lag_ms,
    }


def _accelerator(report: Path) -> Mapping[str, float]:
    """What a modelled accelerator has done so far; nothing where none reports."""
    try:
        told: dict[str, float] = json.loads(report.read_text())
    except (OSError, ValueError):
        return {}
    return told


def _accelerator_figures(
    before: Mapping[str, float], after: Mapping[str, float], duration: float | None
) -> Figures:
    """What part of the run a modelled accelerator was at work, and for what part of its time with work it
    waited for its host. Under a load that never runs out, all the time in which it was not at work is the
    host's."""
    if not after or not duration:
        return {}
    busy, late = (after.get(name, 0.0) - before.get(name, 0.0) for name in ("busy_s", "late_s"))
    return {
        # A step counts when it is handed over, which may be before the one ahead of it has ended.
        "busy_share": min(1.0, busy / duration),
        "late_share": late / (busy + late) if busy + late > 0 else None,
    }
