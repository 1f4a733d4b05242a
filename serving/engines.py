"""From settings to an engine. Imports vLLM only to build a vLLM engine."""

from __future__ import annotations

import os

from serving.echo import EchoArguments, EchoEngine
from serving.engine import Engine
from serving.settings import EngineSettings

VLLM_ENVIRONMENT = {
    # Children start as new programs, not as forks: whoever looks for orphans finds them by their environment.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
"""Set before vLLM is imported, here and nowhere else."""


def build_engine(settings: EngineSettings) -> Engine:
    """The engine, not started. With vLLM this takes seconds: it is imported here."""
    if settings.engine == "echo":
        return EchoEngine(EchoArguments.model_validate(settings.engine_args))
    os.environ.update(VLLM_ENVIRONMENT)
    from serving.vllm_engine import VllmEngine  # noqa: PLC0415 - slow, large, and after the environment is set

    return VllmEngine(settings)
