"""A simulated accelerator's figures as metrics. Imports no vllm: the engine core that has them is a process
of its own, and writes them into a file that this one holds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

from prometheus_client.metrics_core import CounterMetricFamily
from prometheus_client.registry import Collector, CollectorRegistry

from serving.metrics import (
    SIMULATED_BUSY,
    SIMULATED_IDLE,
    SIMULATED_LATE,
    SIMULATED_LATE_STEPS,
    SIMULATED_STEPS,
)
from serving.settings import EngineSettings
from serving.simulation.report import REPORT_BYTES
from serving.simulation.settings import ExecutorSettings
from serving.simulation.timeline import Run

_FIGURES = {
    "steps": SIMULATED_STEPS,
    "busy_s": SIMULATED_BUSY,
    "late_steps": SIMULATED_LATE_STEPS,
    "late_s": SIMULATED_LATE,
    "idle_s": SIMULATED_IDLE,
}


class SimulationMetrics(Collector):
    """What stands in a report, read at every scrape. A scrape costs the engine core nothing.

    One per registry.
    """

    def __init__(self, model: str, registry: CollectorRegistry) -> None:
        self._model = model
        # In memory and without a name, so that it is gone with the last of the two processes.
        self._file = os.memfd_create("simulation")
        registry.register(self)

    def reporting(self, settings: EngineSettings) -> EngineSettings:
        """The settings of the engine, with this as the place where its accelerator reports."""
        assert settings.simulation is not None  # noqa: S101 - or there were no accelerator to report
        # Where another process of this user finds the file.
        path = f"/proc/{os.getpid()}/fd/{self._file}"
        simulation = ExecutorSettings(**settings.simulation.model_dump(), report=path)
        return settings.model_copy(update={"simulation": simulation})

    def run(self) -> Run:
        """The figures of now: all zero before the engine has started."""
        text = os.pread(self._file, REPORT_BYTES, 0)
        return Run(**json.loads(text)) if text else Run()

    def collect(self) -> Iterator[CounterMetricFamily]:
        run = self.run()
        for figure, definition in _FIGURES.items():
            family = CounterMetricFamily(definition.name, definition.sentence, labels=definition.labels)
            family.add_metric([self._model], getattr(run, figure))
            yield family
