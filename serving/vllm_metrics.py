"""vLLM's own metrics, `vllm:*`, counted more cheaply.

Import this module only through `serving.engines`, which sets the environment first.
"""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import REGISTRY
from vllm.v1.metrics.loggers import PrometheusStatLogger

from serving.metrics import Definition, Histogram, HistogramFamily


class SharedHistogram(HistogramFamily):
    """A histogram of ours under prometheus_client's interface, as far as vLLM uses it: it observes several
    values for each token and a dozen for each request."""

    def __init__(
        self, name: str, documentation: str, labelnames: Sequence[str], buckets: Sequence[float]
    ) -> None:
        # By this vLLM finds its own in the registry, to replace them where an engine is made again.
        self._name = name
        definition = Definition(name, "histogram", "", tuple(labelnames), documentation, tuple(buckets))
        super().__init__(definition, REGISTRY)

    def labels(self, *values: object) -> Histogram:
        """The histogram with these label values."""
        return self.child(*map(str, values))


class Statistics(PrometheusStatLogger):
    """What vLLM counts with."""

    _histogram_cls = SharedHistogram  # type: ignore[assignment]
