"""A plugin for the vLLM of a server that chooses the executor itself, as Ray Serve LLM does.

vLLM finds it by the entry point in the folder `entry_points`, where that is on the module path, and loads it
in each of its processes.
"""

from __future__ import annotations

from typing import Any

from vllm.engine.arg_utils import EngineArgs

EXECUTOR = "serving.simulation.executor.SimulatedExecutor"


def register() -> None:
    """Put the simulated executor into each configuration that has settings for it."""
    create = EngineArgs.create_engine_config

    def create_engine_config(self: EngineArgs, *arguments: Any, **options: Any) -> Any:
        config: Any = create(self, *arguments, **options)
        if "simulation" in config.additional_config:
            config.parallel_config.distributed_executor_backend = EXECUTOR
        return config

    EngineArgs.create_engine_config = create_engine_config  # type: ignore[method-assign] # a plugin's way
