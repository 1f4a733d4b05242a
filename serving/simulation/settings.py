"""What a simulated executor is told."""

from __future__ import annotations

from serving.settings import SimulationSettings


class ExecutorSettings(SimulationSettings):
    """What stands under `simulation` in vLLM's `additional_config`."""

    report: str | None = None
    """The file that says what the accelerator did, kept up to date; see serving.simulation.report."""
