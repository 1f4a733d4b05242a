from __future__ import annotations

import pickle
import subprocess
import sys
from collections import Counter as Multiset
from collections.abc import Iterable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from serving.exposition import Exposition, merge, render
from serving.messages import Load
from serving.metrics import REPLICA_METRICS, ReplicaMetrics

untimed = settings(deadline=None, max_examples=50)
"""For generated examples: how long one takes says nothing on a busy machine."""

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
"""All that UTF-8 can carry: quotes, backslashes and line breaks included."""


def parsed(text: bytes) -> list[Sample]:
    """Every sample of an exposition that prometheus_client can read."""
    return [sample for family in text_string_to_metric_families(text.decode()) for sample in family.samples]


def key(name: str, labels: dict[str, str], value: float) -> tuple[str, frozenset[tuple[str, str]], float]:
    """A sample, hashable."""
    return name, frozenset(labels.items()), value


def contents(samples: Iterable[Sample]) -> Multiset[tuple[str, frozenset[tuple[str, str]], float]]:
    """How often each sample occurs."""
    return Multiset(key(sample.name, sample.labels, sample.value) for sample in samples)


def requests(counts: dict[str, int], sentence: str = "Requests.") -> CollectorRegistry:
    """A registry with a counter by model."""
    registry = CollectorRegistry()
    counter = Counter("trunkline_requests_total", sentence, ["model"], registry=registry)
    for model, count in counts.items():
        counter.labels(model).inc(count)
    return registry


@untimed
@given(
    st.dictionaries(
        any_text, st.dictionaries(any_text, st.integers(0, 2**53), max_size=3), min_size=1, max_size=4
    )
)
def test_a_merged_scrape_holds_every_sample_of_every_process(processes: dict[str, dict[str, int]]) -> None:
    """Whatever replicas and models are called, a scrape holds exactly the processes' samples, each with its
    process's label."""
    registries = {replica: requests(counts) for replica, counts in processes.items()}
    scrape = merge(render(registry, replica) for replica, registry in registries.items())
    expected = Multiset(
        key(sample.name, {**sample.labels, "replica": replica}, sample.value)
        for replica, registry in registries.items()
        for sample in parsed(generate_latest(registry))
    )
    assert contents(parsed(scrape)) == expected


def test_sums_over_a_merged_scrape_are_the_deployments() -> None:
    """The sum over the processes of a counter in one scrape is what all of them counted."""
    scrape = merge([render(requests({"a": 3, "b": 1}), "r1"), render(requests({"a": 4}), "r2")])
    totals = {
        model: sum(
            s.value for s in parsed(scrape) if s.name.endswith("_total") and s.labels["model"] == model
        )
        for model in ("a", "b")
    }
    assert totals == {"a": 7, "b": 1}


@untimed
@given(st.permutations(["r1", "r2", "r3"]))
def test_a_scrape_does_not_depend_on_who_answers(order: list[str]) -> None:
    """Processes joined in any order give the same bytes, even where they word a help text differently."""
    processes = {replica: render(gauge_of(f"Words of {replica}."), replica) for replica in ("r1", "r2", "r3")}
    assert merge(processes[replica] for replica in order) == merge(processes.values())


def gauge_of(sentence: str) -> CollectorRegistry:
    """A registry with one gauge that is described like this."""
    registry = CollectorRegistry()
    Gauge("trunkline_waiting", sentence, registry=registry).set(1)
    return registry


@untimed
@given(any_text, any_text)
def test_a_metric_has_one_header_whatever_its_help_texts_are(first: str, second: str) -> None:
    """Two processes that disagree about a help text make a valid scrape with one HELP and one TYPE line."""
    scrape = merge([render(gauge_of(first), "r1"), render(gauge_of(second), "r2")])
    lines = scrape.split(b"\n")
    assert [line[:7] for line in lines] == [b"# HELP ", b"# TYPE ", b"trunkli", b"trunkli", b""]
    (family,) = text_string_to_metric_families(scrape.decode())
    assert {sample.labels["replica"] for sample in family.samples} == {"r1", "r2"}


def test_a_label_named_replica_is_kept_aside() -> None:
    """A sample that has a label `replica` of its own keeps it as `exported_replica`."""
    registry = CollectorRegistry()
    Gauge("depth", "Depth.", ["replica"], registry=registry).labels("inner").set(2)
    (sample,) = parsed(merge([render(registry, "outer")]))
    assert sample.labels == {"replica": "outer", "exported_replica": "inner"}


def test_rendering_leaves_the_registry_as_it_was() -> None:
    """A process's own scrape is the same before and after it was rendered for the deployment."""
    registry = requests({"a": 1})
    before = generate_latest(registry)
    render(registry, "r1")
    assert generate_latest(registry) == before


def test_every_kind_of_metric_survives() -> None:
    """Histograms keep buckets, count and sum, names with a colon stay, and a metric without samples keeps its
    header."""
    registry = CollectorRegistry()
    Histogram("vllm:ttft_seconds", "TTFT.", ["model_name"], registry=registry, buckets=[0.1, 1]).labels(
        "m"
    ).observe(0.5)
    Gauge("vllm:idle", "Nothing yet.", ["model_name"], registry=registry)
    scrape = merge([render(registry, "r1")])
    labels = {"model_name": "m", "replica": "r1"}
    by_key = contents(parsed(scrape))
    assert by_key[key("vllm:ttft_seconds_bucket", {**labels, "le": "0.1"}, 0)] == 1
    assert by_key[key("vllm:ttft_seconds_bucket", {**labels, "le": "+Inf"}, 1)] == 1
    assert by_key[key("vllm:ttft_seconds_sum", labels, 0.5)] == 1
    assert b"# TYPE vllm:idle gauge\n" in scrape


def test_a_metric_from_two_collectors_has_one_header() -> None:
    """Two collectors of one process may both hold samples of a metric: the scrape has all of them, once."""

    class Depth(Collector):
        def __init__(self, side: str) -> None:
            self.side = side

        def collect(self) -> list[GaugeMetricFamily]:
            family = GaugeMetricFamily("depth", "Depth.", labels=["side"])
            family.add_metric([self.side], 1)
            return [family]

    registry = CollectorRegistry()
    registry.register(Depth("left"))
    registry.register(Depth("right"))
    scrape = merge([render(registry, "r1")])
    assert scrape.count(b"# HELP") == 1
    assert {sample.labels["side"] for sample in parsed(scrape)} == {"left", "right"}


def test_no_processes_make_an_empty_scrape() -> None:
    """A deployment without a process has nothing to say, validly."""
    assert merge([]) == b""
    assert render(CollectorRegistry(), "r1") == {}


@pytest.mark.parametrize("way", ["pickle", "msgspec"])
def test_an_exposition_crosses_processes(way: str) -> None:
    """What one process renders, another reads back unchanged."""
    exposition = render(requests({'a"\n': 1}), "r1")
    if way == "pickle":
        assert pickle.loads(pickle.dumps(exposition)) == exposition  # noqa: S301 - our own bytes
    else:
        encoded = msgspec.msgpack.encode(exposition)
        assert msgspec.msgpack.decode(encoded, type=Exposition) == exposition


def test_two_real_processes_share_one_scrape() -> None:
    """The default registries of two processes, process_* and python_* included, join in one scrape."""
    program = (
        "import sys, msgspec; from prometheus_client import REGISTRY; from serving.exposition import render;"
        "sys.stdout.buffer.write(msgspec.msgpack.encode(render(REGISTRY, 'other')))"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, timeout=60
    ).stdout
    other = msgspec.msgpack.decode(output, type=Exposition)
    samples = parsed(merge([render(REGISTRY, "this"), other]))
    resident = {s.labels["replica"]: s.value for s in samples if s.name == "process_resident_memory_bytes"}
    assert resident.keys() == {"this", "other"}
    assert all(value > 0 for value in resident.values())
    assert sum(s.name == "python_info" for s in samples) == 2


def test_a_replica_shows_its_engines_load_and_what_it_sent() -> None:
    """A replica's gauges are its engine's load at the moment of the scrape; its trunk counters are the frames
    that it sent and their bytes."""
    load = Load(running=3, waiting=2, kv_used=0.25)
    registry = CollectorRegistry()
    metrics = ReplicaMetrics(registry, "org/m:1", lambda: load)
    metrics.trunk.sent(100)
    metrics.trunk.sent(20)

    def scrape() -> dict[str, float]:
        samples = parsed(merge([render(registry, "r1")]))
        assert {(s.labels["model"], s.labels["replica"]) for s in samples} == {("org/m:1", "r1")}
        return {sample.name: sample.value for sample in samples}

    assert scrape() == {
        "trunkline_kv_cache_usage_ratio": 0.25,
        "trunkline_replica_running": 3,
        "trunkline_replica_waiting": 2,
        "trunkline_trunk_frames_total": 2,
        "trunkline_trunk_bytes_total": 120,
    }
    load = Load()
    assert scrape()["trunkline_replica_running"] == 0


def test_a_replicas_metrics_are_those_it_declares() -> None:
    """Names, kinds, labels and sentences in a replica's scrape are the ones in REPLICA_METRICS."""
    registry = CollectorRegistry()
    ReplicaMetrics(registry, "m", Load)
    shown = {
        family.name: (family.type, family.documentation, set(family.samples[0].labels))
        for family in registry.collect()
    }
    assert shown == {
        d.name.removesuffix("_total"): (d.kind, d.sentence, set(d.labels)) for d in REPLICA_METRICS
    }
