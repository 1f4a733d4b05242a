"""From settings to an engine, and what is wrong with settings. Imports vLLM only to build a vLLM engine."""

from __future__ import annotations

import os

from pydantic import ValidationError

from serving import source, vllm_arguments
from serving.echo import EchoArguments, EchoEngine
from serving.engine import Engine
from serving.settings import EngineSettings

VLLM_ENVIRONMENT = {
    # Children start as new programs, not as forks: whoever looks for orphans finds them by their environment.
    "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
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


def refusals(settings: EngineSettings) -> list[str]:
    """What would keep this engine from starting, as far as can be told without loading anything."""
    if settings.engine == "echo":
        return _echo_refusals(settings)
    found = []
    try:
        found += vllm_arguments.refusals(settings.engine_args)
    except vllm_arguments.VllmMissing as error:
        found.append(f"engine: {error}")
    try:
        source.check(settings.source or "")
    except source.SourceError as error:
        found.append(str(error))
    return found


def _echo_refusals(settings: EngineSettings) -> list[str]:
    try:
        EchoArguments.model_validate(settings.engine_args)
    except ValidationError as error:
        return [
            f"engine_args.{'.'.join(map(str, problem['loc']))}: {problem['msg']}, got {problem['input']!r}"
            for problem in error.errors()
        ]
    return []
