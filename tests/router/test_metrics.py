from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import prometheus_client
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from router.metrics import (
    ITL,
    PROMPT_TOKENS,
    RATE_SPAN,
    REQUEST_DURATION,
    ROUTER_METRICS,
    TTFT,
    ModelMetrics,
    Outcome,
    RouterMetrics,
)
from serving.exposition import merge, render
from serving.messages import Load
from serving.metrics import REPLICA_METRICS, CounterFamily, Definition, HistogramFamily, ReplicaMetrics

untimed = settings(deadline=None, max_examples=50)
"""For generated examples: how long one takes says nothing on a busy machine."""

OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


class Router:
    """A router's metrics with a clock that stands still unless it is moved."""

    def __init__(self) -> None:
        self.now = 100.0
        self.registry = CollectorRegistry()
        self.metrics = RouterMetrics(self.registry, lambda: self.now)

    def samples(self) -> Iterator[Sample]:
        """What a scrape of this router holds."""
        text = merge([render(self.registry, "router-1")]).decode()
        for family in text_string_to_metric_families(text):
            yield from family.samples

    def value(self, name: str, **labels: str) -> float:
        """The one sample with this name and these labels."""
        labels["replica"] = "router-1"
        (value,) = (s.value for s in self.samples() if s.name == name and s.labels == labels)
        return value

    def total(self, name: str) -> float:
        """The sum over all labels."""
        return sum(s.value for s in self.samples() if s.name == name)


@pytest.fixture
def router() -> Router:
    """A fresh router's metrics."""
    return Router()


@dataclass(frozen=True)
class Request:
    """What one request does, as it adds to the metrics."""

    model: str
    prompt_tokens: int
    accepted: int
    """How often a replica took it: 2 after a retry."""
    chunks: list[int]
    """Tokens of each."""
    streamed: bool
    outcome: Outcome

    def run(self, router: Router) -> None:
        """Live through the whole request, a second for each step."""
        request = router.metrics.for_model(self.model).started(router.now)
        for _ in range(self.accepted):
            router.now += 1
            request.accepted(self.prompt_tokens)
        for tokens in self.chunks if self.streamed else []:
            router.now += 1
            request.chunk(tokens, router.now)
        if not self.streamed:
            request.body(sum(self.chunks))
        request.finished(self.outcome, 200, router.now)


requests = st.lists(
    st.builds(
        Request,
        model=st.sampled_from(["echo", 'org/"m":1\n']),
        prompt_tokens=st.integers(0, 9),
        accepted=st.integers(1, 2),
        chunks=st.lists(st.integers(0, 4), max_size=5),
        streamed=st.booleans(),
        outcome=st.sampled_from(OUTCOMES),
    ),
    max_size=6,
)


@untimed
@given(requests)
def test_every_token_that_was_handed_over_is_counted_once(done: list[Request]) -> None:
    """However requests end, the counters are the sums of their prompts and of the tokens handed over."""
    router = Router()
    for request in done:
        request.run(router)
    assert router.total("trunkline_prompt_tokens_total") == sum(r.prompt_tokens for r in done)
    assert router.total("trunkline_generation_tokens_total") == sum(sum(r.chunks) for r in done)


@untimed
@given(requests)
def test_requests_by_outcome_sum_up_to_the_requests(done: list[Request]) -> None:
    """Every request of a model is counted under exactly one outcome."""
    router = Router()
    for request in done:
        request.run(router)
    assert router.total("trunkline_requests_total") == len(done)
    completed = sum(r.outcome == "completed" for r in done)
    assert router.total("trunkline_request_duration_seconds_count") == completed


@untimed
@given(requests)
def test_a_chunk_with_tokens_is_a_first_one_or_a_gap(done: list[Request]) -> None:
    """TTFT has one value for each stream with tokens, ITL one for each further chunk with tokens."""
    router = Router()
    for request in done:
        request.run(router)
    chunks = [sum(tokens > 0 for tokens in r.chunks) for r in done if r.streamed]
    assert router.total("trunkline_time_to_first_token_seconds_count") == sum(n > 0 for n in chunks)
    assert router.total("trunkline_inter_token_latency_seconds_count") == sum(max(n - 1, 0) for n in chunks)


@untimed
@given(requests)
def test_counters_never_go_back(done: list[Request]) -> None:
    """From one scrape to the next, no counter and no part of a histogram falls or disappears."""
    router = Router()
    gauges = {d.name for d in ROUTER_METRICS if d.kind == "gauge"}
    before: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for request in done:
        request.run(router)
        after = {
            (s.name, frozenset(s.labels.items())): s.value for s in router.samples() if s.name not in gauges
        }
        assert all(after[key] >= value for key, value in before.items())
        before = after


def test_times_of_a_stream_are_measured_from_its_arrival(router: Router) -> None:
    """TTFT runs from arrival to the first tokens, ITL from chunk to chunk, the duration to the end."""
    request = router.metrics.for_model("m").started(10.0)
    request.accepted(5)
    request.chunk(0, 10.2)
    request.chunk(2, 10.5)
    request.chunk(1, 10.75)
    request.finished("completed", 200, 12.0)
    assert router.value("trunkline_time_to_first_token_seconds_sum", model="m") == 0.5
    assert router.value("trunkline_inter_token_latency_seconds_sum", model="m") == 0.25
    assert router.value("trunkline_request_duration_seconds_sum", model="m") == 2.0


def test_a_refusal_without_a_model_has_a_place(router: Router) -> None:
    """A request that named no model of ours is counted by its status under an empty model."""
    router.metrics.refused(404)
    router.metrics.refused(404)
    labels = {"model": "", "outcome": "refused", "status": "404"}
    assert router.value("trunkline_requests_total", **labels) == 2


def test_a_model_keeps_its_counters(router: Router) -> None:
    """A model that is asked for again, as after a reload, goes on counting where it was."""
    router.metrics.for_model("m").started(0.0).body(3)
    router.metrics.for_model("m").started(0.0).body(4)
    assert router.value("trunkline_generation_tokens_total", model="m") == 7


def test_gauges_show_the_moment_of_the_scrape(router: Router) -> None:
    """In-flight, waiting and trunks are asked for at each scrape, not remembered."""
    state = {"in_flight": 2, "waiting": 1, "trunks": 3}
    model = router.metrics.for_model("m")
    model.watch(in_flight=lambda: state["in_flight"], waiting=lambda: state["waiting"])
    model.watch_trunks(lambda: state["trunks"])
    assert router.value("trunkline_in_flight", model="m") == 2
    state["in_flight"] = 0
    assert router.value("trunkline_in_flight", model="m") == 0
    assert router.value("trunkline_waiting", model="m") == 1
    assert router.value("trunkline_trunks", model="m") == 3


def run_at(router: Router, model: ModelMetrics, tokens_per_second: int, seconds: int) -> None:
    """Serve so many tokens in each of so many seconds, with a tick at the end of each."""
    for _ in range(seconds):
        model.started(router.now).body(tokens_per_second)
        router.now += 1
        router.metrics.tick(router.now)


def test_the_rate_follows_the_load_and_falls_to_zero(router: Router) -> None:
    """Under a steady load the rate is the load; when idle it is 0 once the window has passed."""
    model = router.metrics.for_model("m")
    assert router.value("trunkline_tokens_per_second", model="m") == 0
    run_at(router, model, 40, 20)
    assert router.value("trunkline_tokens_per_second", model="m") == 40
    run_at(router, model, 0, 2)
    assert 0 < router.value("trunkline_tokens_per_second", model="m") < 40
    run_at(router, model, 0, int(RATE_SPAN))
    assert router.value("trunkline_tokens_per_second", model="m") == 0


@untimed
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=20))
def test_the_rate_is_a_mean_over_the_window(seconds: list[int]) -> None:
    """At a tick the rate is the mean of the last five seconds, or of all seconds when there were fewer."""
    router = Router()
    model = router.metrics.for_model("m")
    for tokens in seconds:
        run_at(router, model, tokens, 1)
    window = seconds[-int(RATE_SPAN) :]
    rate = router.value("trunkline_tokens_per_second", model="m")
    assert rate == pytest.approx(sum(window) / len(window))


def test_a_scrape_between_ticks_sees_tokens_at_once(router: Router) -> None:
    """Tokens count in the rate before the next tick."""
    router.metrics.for_model("m").started(router.now).body(10)
    router.now += 0.5
    assert router.value("trunkline_tokens_per_second", model="m") == 20


def test_the_window_holds_a_few_samples(router: Router) -> None:
    """A rate remembers no more than its window, however long a router lives."""
    model = router.metrics.for_model("m")
    run_at(router, model, 1, 1000)
    assert len(model.rate._samples) <= RATE_SPAN + 2


def text_without_creation_times(registry: CollectorRegistry) -> list[str]:
    """A registry's exposition, less the `_created` gauges that prometheus_client adds to its own."""
    lines = prometheus_client.generate_latest(registry).decode().splitlines()
    return [line for line in lines if "_created" not in line]


@pytest.mark.parametrize("definition", [TTFT, ITL, REQUEST_DURATION], ids=lambda d: d.name)
@untimed
@given(data=st.data())
def test_a_histogram_reads_as_prometheus_clients_own(definition: Definition, data: st.DataObject) -> None:
    """The same values, on the bounds and between and beyond them, give the same text."""
    value = st.one_of(st.sampled_from(definition.buckets), st.floats(0, 1000))
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    family = HistogramFamily(definition, ours)
    reference = prometheus_client.Histogram(
        definition.name, definition.sentence, definition.labels, buckets=definition.buckets, registry=theirs
    )
    for seconds in data.draw(st.lists(value, max_size=10)):
        family.child("m").observe(seconds)
        reference.labels("m").observe(seconds)
    assert text_without_creation_times(ours) == text_without_creation_times(theirs)


@untimed
@given(st.lists(st.integers(0, 2**40), max_size=5))
def test_a_counter_reads_as_prometheus_clients_own(amounts: list[int]) -> None:
    """The same amounts give the same text."""
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    family = CounterFamily(PROMPT_TOKENS, ours)
    reference = prometheus_client.Counter(
        PROMPT_TOKENS.name, PROMPT_TOKENS.sentence, PROMPT_TOKENS.labels, registry=theirs
    )
    for amount in amounts:
        family.child("m").add(amount)
        reference.labels("m").inc(amount)
    assert text_without_creation_times(ours) == text_without_creation_times(theirs)


def test_a_routers_metrics_are_those_it_declares(router: Router) -> None:
    """Names, kinds, labels and sentences in a router's scrape are the ones in ROUTER_METRICS."""
    router.metrics.watch_ledger(up=lambda: 1, spooled=lambda: 0)
    model = router.metrics.for_model("m")
    model.watch(in_flight=lambda: 0, waiting=lambda: 0)
    model.watch_trunks(lambda: 0)
    model.started(0.0).finished("completed", 200, 1.0)
    shown = {
        family.name: (family.type, family.documentation, set(family.samples[0].labels) - {"le"})
        for family in router.registry.collect()
    }
    assert shown == {
        d.name.removesuffix("_total"): (d.kind, d.sentence, set(d.labels)) for d in ROUTER_METRICS
    }


@pytest.mark.parametrize("definition", dict.fromkeys(ROUTER_METRICS + REPLICA_METRICS), ids=lambda d: d.name)
def test_a_definition_follows_the_rules_of_naming(definition: Definition) -> None:
    """A metric's name begins with the product's, says `_total` where it counts and its unit where it has one,
    and its sentence is one."""
    assert definition.name.startswith("trunkline_")
    assert definition.name.endswith("_total") == (definition.kind == "counter")
    assert definition.name.endswith("_seconds") == (definition.unit == "seconds")
    assert definition.sentence[0].isupper()
    assert definition.sentence.endswith(".")
    assert bool(definition.buckets) == (definition.kind == "histogram")
    assert list(definition.buckets) == sorted(set(definition.buckets))


def test_a_deployments_sum_has_every_frame_once(router: Router) -> None:
    """Router and replica each count what they send: a sum over one scrape has no frame or byte twice."""
    registry = CollectorRegistry()
    replica = ReplicaMetrics(registry, "m", Load)
    router.metrics.for_model("m").trunk.sent(10)
    replica.trunk.sent(300)
    replica.trunk.sent(400)
    scrape = merge([render(router.registry, "router-1"), render(registry, "replica-1")]).decode()
    samples = [s for family in text_string_to_metric_families(scrape) for s in family.samples]
    frames = {s.labels["direction"]: s.value for s in samples if s.name == "trunkline_trunk_frames_total"}
    assert frames == {"to_replica": 1, "to_router": 2}
    assert sum(s.value for s in samples if s.name == "trunkline_trunk_bytes_total") == 710


def test_a_scrape_may_run_in_a_thread(router: Router) -> None:
    """A scrape in a thread succeeds while the loop adds models and counts."""
    failures: list[Exception] = []
    done = threading.Event()

    def scrape_until_done() -> None:
        try:
            while not done.is_set():
                list(router.samples())
        except Exception as error:  # noqa: BLE001 - whatever it is, the test reports it
            failures.append(error)

    thread = threading.Thread(target=scrape_until_done)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # the threads alternate far more often than they would
    try:
        thread.start()
        for number in range(300):
            run_at(router, router.metrics.for_model(f"model-{number}"), 1, 1)
    finally:
        done.set()
        thread.join(60)
        sys.setswitchinterval(interval)
    assert failures == []
    assert router.total("trunkline_generation_tokens_total") == 300
