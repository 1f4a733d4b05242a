"""The figures of answers whose times are known exactly."""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from benchmarks.answer import Answer, Failure
from benchmarks.figures import GeneratorCost, figures
from benchmarks.lag import INTERVAL_S, Lag, lagging


def answered(ttft: float, gaps: list[float], tokens: int) -> Answer:
    """A good answer with these times in seconds."""
    answer = Answer(started=10.0, prompt_tokens=5, completion_tokens=tokens)
    answer.chunks = [10.0 + ttft]
    for gap in gaps:
        answer.chunks.append(answer.chunks[-1] + gap)
    answer.ended = answer.chunks[-1]
    return answer


def test_percentiles() -> None:
    """Percentiles lie between neighbours in proportion; mean and deviation are those of all values."""
    shown = figures([answered(second / 100, [], 1) for second in range(1, 101)], duration=2.0)
    assert shown["mean_ttft_ms"] == pytest.approx(505.0)
    assert shown["median_ttft_ms"] == pytest.approx(505.0)
    assert shown["p95_ttft_ms"] == pytest.approx(950.5)
    assert shown["p99_ttft_ms"] == pytest.approx(990.1)
    assert shown["std_ttft_ms"] == pytest.approx(math.sqrt((100**2 - 1) / 12) * 10)
    assert shown["request_throughput"] == 50
    assert shown["total_token_throughput"] == 300
    assert shown["mean_tpot_ms"] is None, "one token has no time per further token"


def test_time_per_output_token_is_by_usage() -> None:
    """TPOT is (e2el - ttft) / (output length - 1), ITL the gaps between chunks; failed answers are not in."""
    failed = answered(9.0, [9.0], 99)
    failed.failure = Failure("cut off", "")
    shown = figures([answered(0.1, [0.2, 0.4], 5), answered(0.3, [], 1), failed], duration=1.0)
    assert shown["mean_tpot_ms"] == pytest.approx(150.0)
    assert shown["mean_itl_ms"] == pytest.approx(300.0)
    assert shown["mean_e2el_ms"] == pytest.approx(500.0)
    assert shown["failed"] == 1
    assert shown["total_output_tokens"] == 6


# ---- the generator itself ------------------------------------------------------------------------------


async def lag_of(*late: float) -> Lag:
    """That of a loop that was late by so many seconds, moment by moment."""
    with lagging() as lag:
        pass
    lag.late = list(late)
    return lag


async def test_a_busy_generator_marks_its_run() -> None:
    """Over 60% of a core the run counts as bounded by the load generator."""
    answers = [answered(0.1, [0.1] * 99, 100)]
    cost = GeneratorCost.of(7.0, 10.0, answers, await lag_of())
    assert cost.bounded
    assert cost.cpu_share == pytest.approx(0.7)
    assert cost.cpu_us_per_chunk == pytest.approx(70_000.0)
    assert not GeneratorCost.of(6.0, 10.0, answers, await lag_of()).bounded


async def test_requests_that_are_sent_late_mark_their_run() -> None:
    """Over 5 ms late at p99 the run counts as bounded by it too; one with no moment to keep is not in."""
    answers = [answered(0.1, [], 1) for _ in range(102)]
    for number, answer in enumerate(answers[1:]):
        answer.lag = number / 20_000  # 0 to 5 ms
    cost = GeneratorCost.of(1.0, 10.0, answers, await lag_of())
    assert cost.median_send_lag_ms == pytest.approx(2.5)
    assert cost.p99_send_lag_ms == pytest.approx(4.95)
    assert not cost.bounded
    answers[-1].lag = answers[-2].lag = 0.006
    assert GeneratorCost.of(1.0, 10.0, answers, await lag_of()).bounded


async def test_a_loop_that_is_late_marks_its_run() -> None:
    """So does a loop that came over 5 ms late to more than one in a hundred of its moments."""
    late = [number / 20_000 for number in range(101)]  # 0 to 5 ms
    cost = GeneratorCost.of(1.0, 10.0, [answered(0.1, [], 1)], await lag_of(*late))
    assert (cost.median_loop_lag_ms, cost.p99_loop_lag_ms) == pytest.approx((2.5, 4.95))
    assert cost.median_send_lag_ms is None
    assert not cost.bounded
    assert GeneratorCost.of(1.0, 10.0, [], await lag_of(*late[:-2], 0.006, 0.006)).bounded


async def test_a_blocked_loop_is_late() -> None:
    """A loop that somebody holds for 0.2 s is late with all that was due meanwhile, by up to that, and on
    time with something at least when it is left alone."""
    began = time.perf_counter()
    with lagging() as lag:
        await asyncio.sleep(0.1)
        time.sleep(0.2)  # noqa: ASYNC251 - to hold the loop is the point
        await asyncio.sleep(0.1)
    took = time.perf_counter() - began
    assert len(lag.late) == pytest.approx(took / INTERVAL_S, abs=2)
    assert 0.15 < max(lag.late) < took
    over = [late for late in lag.late if late > 0.02]
    assert len(over) >= 15, "every moment of the delay counts, not only the first"
    assert 0 <= min(lag.late) < 0.005


async def test_the_end_of_a_delay_counts() -> None:
    """A delay that lasts to the end of the run is in the lag."""
    with lagging() as lag:
        time.sleep(0.1)  # noqa: ASYNC251 - as above
    assert max(lag.late) > 0.08


@pytest.fixture
def rival() -> Iterator[None]:
    """A busy process on the only core that this one may use."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        yield
        process.kill()
    os.sched_setaffinity(0, cores)


@pytest.mark.usefixtures("rival")
async def test_waiting_for_a_core_is_told() -> None:
    """A thread that wants a core which another uses too waits for it, and says for how long."""
    with lagging() as lag:
        began = time.perf_counter()
        while (took := time.perf_counter() - began) < 0.5:
            pass
    cost = GeneratorCost.of(0.1, took, [], lag)
    assert lag.waited_s is not None
    assert 0.05 < lag.waited_s < took + INTERVAL_S
    assert cost.waited_share == lag.waited_s / took


def test_the_most_streams_at_once() -> None:
    """A stream counts from its first text to its end; one that begins as another ends is not beside it."""
    early, late = answered(0.5, [1.0], 2), answered(1.0, [2.0], 2)  # 0.5 to 1.5, and 1 to 3
    next_one, whole = answered(1.5, [1.0], 2), answered(0.0, [], 1)
    whole.chunks = []
    shown = figures([late, early, next_one, whole], duration=1.0)
    assert shown["max_streaming"] == 2
    assert figures([], duration=1.0)["max_streaming"] == 0
