"""From answers to figures: pure, with the names and definitions of `vllm bench serve`.

Two differences. TTFT is the first chunk with text in it, not the first chunk: one that only names the role
shows nothing. And a figure of which there was nothing to measure is None, not 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from statistics import fmean

from benchmarks.answer import Answer
from benchmarks.lag import Lag

GENERATOR_LIMIT = 0.6
"""Share of a core. A generator busier than that delays what it measures."""

LAG_LIMIT_MS = 5.0
"""How late a generator may be at p99, with its requests or with anything that its loop is to do: later than
that it loads in another way than it says, and sees what has come too late."""

Figure = float | int | None


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of values in ascending order, at least one; between two of them, in proportion (as NumPy's default)."""
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def figures(answers: Sequence[Answer], duration: float) -> dict[str, Figure]:
    """Throughput and latency of the answers that are good, over `duration` seconds."""
    good = [answer for answer in answers if answer.failure is None]
    tokens_in = sum(answer.prompt_tokens or 0 for answer in good)
    tokens_out = sum(answer.completion_tokens or 0 for answer in good)
    counted: dict[str, Figure] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(answers) - len(good),
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": len(good) / duration,
        "output_throughput": tokens_out / duration,
        "total_token_throughput": (tokens_in + tokens_out) / duration,
        "max_streaming": _most_at_once(good),
    }
    streamed = [answer for answer in good if answer.chunks]
    return (
        counted
        | _spread("ttft", (answer.chunks[0] - answer.started for answer in streamed))
        | _spread("tpot", chain.from_iterable(map(_time_per_output_token, streamed)))
        | _spread("itl", chain.from_iterable(map(_gaps, streamed)))
        | _spread("e2el", (answer.ended - answer.started for answer in good))
    )


def _most_at_once(answers: Iterable[Answer]) -> int:
    """The most answers that were between their first text and their end at one moment."""
    starts_and_ends = [(answer.chunks[0], answer.ended) for answer in answers if answer.chunks]
    changes = sorted(chain.from_iterable(((start, 1), (end, -1)) for start, end in starts_and_ends))
    return max(accumulate(change for _, change in changes), default=0)


def _time_per_output_token(answer: Answer) -> Iterable[float]:
    """(e2el - ttft) / (output length - 1); nothing for an answer of one token."""
    if answer.completion_tokens is not None and answer.completion_tokens > 1:
        yield (answer.ended - answer.chunks[0]) / (answer.completion_tokens - 1)


def _gaps(answer: Answer) -> Iterable[float]:
    return (later - earlier for earlier, later in pairwise(answer.chunks))


def _spread(name: str, seconds: Iterable[float]) -> dict[str, Figure]:
    """Mean, spread and percentiles in milliseconds."""
    ordered = sorted(second * 1000 for second in seconds)
    keys = (f"{part}_{name}_ms" for part in ("mean", "median", "std", "p95", "p99"))
    if not ordered:
        return dict.fromkeys(keys)
    mean = fmean(ordered)
    deviation = math.sqrt(fmean((value - mean) ** 2 for value in ordered))
    tail = (percentile(ordered, percent) for percent in (95, 99))
    return dict(zip(keys, (mean, percentile(ordered, 50), deviation, *tail), strict=True))


@dataclass(frozen=True, slots=True)
class FailureCount:
    """How many answers failed in one way, and what the first of them said."""

    count: int
    example: str


def count_failures(answers: Iterable[Answer]) -> dict[str, FailureCount]:
    """By kind, in the order in which the kinds first occurred."""
    counts: dict[str, FailureCount] = {}
    for failure in (answer.failure for answer in answers if answer.failure is not None):
        known = counts.get(failure.kind, FailureCount(0, failure.detail))
        counts[failure.kind] = FailureCount(known.count + 1, known.example)
    return counts


@dataclass(frozen=True, slots=True)
class GeneratorCost:
    """What the load generator itself used of the machine."""

    cpu_seconds: float
    cpu_share: float
    """Of one core."""
    cpu_us_per_chunk: float | None
    """Everything it did, over the chunks with text that it read. None where there were none."""
    waited_share: float | None
    """The part of the time in which it could have run and had no core. None where the system does not say."""
    median_loop_lag_ms: float | None
    """How late its event loop was with what was due, over time."""
    p99_loop_lag_ms: float | None
    median_send_lag_ms: float | None
    """How late it sent the requests of an open loop. In a closed one none has a moment to keep: each is sent
    where the last answer's end is read, and how late that is the loop's lag tells."""
    p99_send_lag_ms: float | None

    @property
    def bounded(self) -> bool:
        """The run was bounded by the load generator: its figures do not describe the server."""
        return self.cpu_share > GENERATOR_LIMIT or self.p99_lag_ms > LAG_LIMIT_MS

    @property
    def p99_lag_ms(self) -> float:
        """How late it was, at p99, with whatever it was latest with."""
        return max(self.p99_loop_lag_ms or 0.0, self.p99_send_lag_ms or 0.0)

    @classmethod
    def of(cls, cpu_seconds: float, duration: float, answers: Sequence[Answer], lag: Lag) -> GeneratorCost:
        """The cost of a run of `duration` seconds that took `cpu_seconds` and read these answers."""
        chunks = sum(len(answer.chunks) for answer in answers)
        sent = [answer.lag for answer in answers if not math.isnan(answer.lag)]
        return cls(
            cpu_seconds=cpu_seconds,
            cpu_share=cpu_seconds / duration,
            cpu_us_per_chunk=cpu_seconds / chunks * 1e6 if chunks else None,
            waited_share=None if lag.waited_s is None else lag.waited_s / duration,
            median_loop_lag_ms=_percentile_ms(lag.late, 50),
            p99_loop_lag_ms=_percentile_ms(lag.late, 99),
            median_send_lag_ms=_percentile_ms(sent, 50),
            p99_send_lag_ms=_percentile_ms(sent, 99),
        )


def _percentile_ms(seconds: Sequence[float], percent: float) -> float | None:
    return percentile(sorted(seconds), percent) * 1000 if seconds else None
