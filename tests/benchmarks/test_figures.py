"""The figures of answers whose times are known exactly."""

from __future__ import annotations

import math

import pytest

from benchmarks.answer import Answer, Failure
from benchmarks.figures import GeneratorCost, figures


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


def test_a_busy_generator_marks_its_run() -> None:
    """Over 60% of a core the run counts as bounded by the load generator."""
    answers = [answered(0.1, [0.1] * 99, 100)]
    cost = GeneratorCost.of(7.0, 10.0, answers)
    assert cost.bounded
    assert cost.cpu_share == pytest.approx(0.7)
    assert cost.cpu_us_per_chunk == pytest.approx(70_000.0)
    assert not GeneratorCost.of(6.0, 10.0, answers).bounded


def test_a_late_generator_marks_its_run() -> None:
    """Over 5 ms late at p99 the run counts as bounded by it too; one with no moment to keep is not in."""
    answers = [answered(0.1, [], 1) for _ in range(102)]
    for number, answer in enumerate(answers[1:]):
        answer.lag = number / 20_000  # 0 to 5 ms
    cost = GeneratorCost.of(1.0, 10.0, answers)
    assert cost.median_send_lag_ms == pytest.approx(2.5)
    assert cost.p99_send_lag_ms == pytest.approx(4.95)
    assert not cost.bounded
    answers[-1].lag = answers[-2].lag = 0.006
    assert GeneratorCost.of(1.0, 10.0, answers).bounded


def test_the_most_streams_at_once() -> None:
    """A stream counts from its first text to its end; one that begins as another ends is not beside it."""
    early, late = answered(0.5, [1.0], 2), answered(1.0, [2.0], 2)  # 0.5 to 1.5, and 1 to 3
    next_one, whole = answered(1.5, [1.0], 2), answered(0.0, [], 1)
    whole.chunks = []
    shown = figures([late, early, next_one, whole], duration=1.0)
    assert shown["max_streaming"] == 2
    assert figures([], duration=1.0)["max_streaming"] == 0
