from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from tests.end_to_end.client import Exchange, ask_all, asking, chat
from tests.end_to_end.server import Metrics, Server
from tests.end_to_end.smollm import ECHO, SMOLLM

PROMPT = "trunkline_prompt_tokens_total"
GENERATION = "trunkline_generation_tokens_total"
STREAM = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.mark.parametrize("model", [ECHO, SMOLLM])
async def test_counters_are_the_sum_of_usage(server: Server, model: str) -> None:
    """Over a run of completed requests the token counters grow by exactly what their usages add up to."""
    before = server.metrics()
    ways: list[dict[str, Any]] = [{}, STREAM, {"n": 3}, {"n": 2, **STREAM}, {"stop": "e "}, {"max_tokens": 1}]
    answers = await ask_all(
        server, [chat(model, f"Say {number} words.", **way) for number in (2, 3) for way in ways]
    )
    after = server.metrics()
    assert grown(PROMPT, model, before, after) == total("prompt_tokens", answers)
    assert grown(GENERATION, model, before, after) == total("completion_tokens", answers)
    completed = {"outcome": "completed", "status": "200"}
    assert grown("trunkline_requests_total", model, before, after, **completed) == len(answers)


@pytest.mark.parametrize("model", [ECHO, SMOLLM])
async def test_a_cancelled_request_counts_what_was_handed_over(server: Server, model: str) -> None:
    """A stream that its client leaves adds to the counters what had been handed to the client's socket, and
    its line in the log says the same."""
    before = server.metrics()
    body = chat(model, "Tell me a long story.", max_tokens=1000, ignore_eos=True, stream=True)
    async with asking(server, body, {"x-request-id": f"counted-{model}"}) as exchange:
        await exchange.first()
        await exchange.leave()
    line = server.request(f"counted-{model}")
    after = server.metrics()
    assert line["outcome"] == "cancelled"
    assert grown(GENERATION, model, before, after) == line["completion_tokens"]
    assert grown(PROMPT, model, before, after) == line["prompt_tokens"] > 0
    received = [choice for chunk in exchange.chunks for choice in chunk["choices"]]
    assert 1 <= len(received) <= line["completion_tokens"] < 1000


def test_one_scrape_has_every_process(server: Server) -> None:
    """A scrape has the router's, each replica's and vLLM's own metrics, every sample with the process that it
    comes from."""
    metrics = server.metrics()
    (router,) = server.routers()
    (smollm,), (echo,) = server.replicas(SMOLLM), server.replicas(ECHO)
    assert metrics.by("replica", "trunkline_trunks", model=SMOLLM) == {router: 1}
    assert set(metrics.by("replica", "trunkline_replica_running")) == {smollm, echo}
    assert set(metrics.by("replica", "vllm:num_requests_running")) == {smollm}
    assert set(metrics.by("replica", "process_resident_memory_bytes")) == {router, smollm, echo}
    assert {name for name, _ in metrics.samples} >= {
        "vllm:generation_tokens_total",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:kv_cache_usage_perc",
        "trunkline_tokens_per_second",
        "trunkline_inter_token_latency_seconds_bucket",
        "trunkline_request_duration_seconds_count",
        "trunkline_trunk_bytes_total",
    }
    assert all("replica" in dict(labels) for _, labels in metrics.samples)


def grown(name: str, model: str, before: Metrics, after: Metrics, **labels: str) -> float:
    """By how much a counter grew."""
    return after.total(name, model=model, **labels) - before.total(name, model=model, **labels)


def total(count: str, answers: Iterable[Exchange]) -> int:
    """What the usages of the answers add up to; that of a stream too."""
    return sum(answer.usage[count] for answer in answers)
