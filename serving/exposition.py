"""Metrics as text: one process's samples, and those of a whole deployment in one answer.

Every process renders its own registry, each sample labelled with the process that it comes from. The router
that answers a scrape joins what the processes rendered, metric by metric, without reading a sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec
from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""What `merge` returns."""

_HELP = b"# HELP "


class Family(msgspec.Struct, frozen=True, array_like=True):
    """One metric of one process as text (UTF-8, every line with its line break)."""

    header: bytes
    """The HELP and the TYPE line."""
    samples: bytes
    """One line each; empty where a metric has none yet."""


Exposition = dict[str, Family]
"""The metrics of one process by name. Small and plain: it crosses processes, pickled or as MessagePack."""


def render(registry: Collector, replica: str) -> Exposition:
    """The samples of `registry`, each with the label `replica`; one that has such a label already keeps its
    own value as `exported_replica`.

    `replica` must be this process's alone within the deployment, or series of two processes coincide. Takes
    about 12 us a sample, and a replica with vLLM has 400: where streams are being served, call this in a
    thread.
    """
    text = generate_latest(_Labelled(registry, replica))
    exposition: Exposition = {}
    # No other line can begin this way: line breaks in help texts and label values are escaped.
    for block in (b"\n" + text.removesuffix(b"\n")).split(b"\n" + _HELP)[1:]:
        help_line, type_line, *rest = block.split(b"\n", 2)
        name = type_line.split(b" ")[2].decode()
        samples = rest[0] + b"\n" if rest else b""
        if name in exposition:
            samples = exposition[name].samples + samples
        exposition[name] = Family(_HELP + help_line + b"\n" + type_line + b"\n", samples)
    return exposition


def merge(expositions: Iterable[Exposition]) -> bytes:
    """One valid exposition of all these processes: metrics by name, each header once, then the samples.

    The answer does not depend on the order of `expositions`. Where processes disagree about a header (two
    versions during an update), one of theirs is taken.

    Nothing is parsed, so the cost is that of joining the text. It would stop holding at hundreds of replicas,
    where the answer itself has tens of megabytes (50 kB for one with vLLM): there each process is better
    scraped alone.
    """
    families: dict[str, list[Family]] = {}
    for exposition in expositions:
        for name, family in exposition.items():
            families.setdefault(name, []).append(family)
    parts: list[bytes] = []
    for name in sorted(families):
        parts.append(min(family.header for family in families[name]))
        parts.extend(sorted(family.samples for family in families[name]))
    return b"".join(parts)


class _Labelled(Collector):
    """A registry's metrics with the label `replica` on every sample; the registry's own stay as they are."""

    def __init__(self, registry: Collector, replica: str) -> None:
        self._registry = registry
        self._replica = replica

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            labelled = Metric(metric.name, metric.documentation, metric.type, metric.unit)
            labelled.samples = [self._label(sample) for sample in metric.samples]
            yield labelled

    def _label(self, sample: Sample) -> Sample:
        labels = {**sample.labels, "replica": self._replica}
        if "replica" in sample.labels:
            labels["exported_replica"] = sample.labels["replica"]
        return sample._replace(labels=labels)
