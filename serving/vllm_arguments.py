"""The names of vLLM's engine arguments and of its parsers, read from its source text.

Importing vLLM takes ten seconds and several hundred megabytes; parsing the files that declare them takes a
fraction of a second. So a configuration is checked without vLLM being loaded.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

RESERVED = {
    "model": "the model's `source` says it",
    "revision": "the model's `source` says it: org/name@revision",
    "served_model_name": "the model's name and aliases are Trunkline's own",
    "generation_config": "a request's defaults are those of the API, the same for every model",
    "override_generation_config": "a request's defaults are those of the API, the same for every model",
    "disable_log_stats": "metrics and the choice of a replica need vLLM's statistics",
    "enable_log_requests": "Trunkline writes one log line for each request itself",
    "reasoning_parser": "the model's `reasoning_parser` says it",
}
"""Arguments that are not the configuration's to set, and why."""

RESERVED_BY_SIMULATION = {
    "distributed_executor_backend": "a simulated accelerator has no workers",
    "additional_config": "the model's `simulation` says it",
    "async_scheduling": "the model's `simulation` says it",
    "pipeline_parallel_size": "a simulated accelerator does not model it",
    "prefill_context_parallel_size": "a simulated accelerator does not model it",
    "data_parallel_size": "a simulated accelerator does not model it; `replicas` are there for it",
}
"""Those that are not the configuration's to set where the accelerator is simulated, and why."""

Parsers = Literal["tool_parser", "reasoning_parser"]

PARSERS: dict[Parsers, tuple[str, str]] = {
    "tool_parser": ("tool_parsers", "_TOOL_PARSERS_TO_REGISTER"),
    "reasoning_parser": ("reasoning", "_REASONING_PARSERS_TO_REGISTER"),
}
"""Where vLLM keeps the table of each kind: the package, and the table's name."""


class VllmMissing(Exception):
    """vLLM is not installed here, so its arguments are not known."""


@functools.cache
def known() -> frozenset[str]:
    """Every argument of vLLM's AsyncEngineArgs. Raises VllmMissing."""
    module = _source("engine", "arg_utils.py")
    return frozenset(
        field
        for node in module.body
        if isinstance(node, ast.ClassDef) and node.name in {"EngineArgs", "AsyncEngineArgs"}
        for field in _fields(node)
    )


@functools.cache
def parsers(kind: Parsers) -> frozenset[str]:
    """The names of every parser that vLLM brings along for one of these settings. Raises VllmMissing."""
    package, table = PARSERS[kind]
    return frozenset(
        key.value
        for node in _source(package, "__init__.py").body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
        if any(isinstance(target, ast.Name) and target.id == table for target in node.targets)
        for key in node.value.keys
        if isinstance(key, ast.Constant) and isinstance(key.value, str)
    )


def _source(*path: str) -> ast.Module:
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise VllmMissing(
            "vLLM is not installed in this environment: install the extra `cpu` or `gpu` of trunkline"
        )
    return ast.parse(Path(spec.submodule_search_locations[0], *path).read_bytes())


def _fields(dataclass: ast.ClassDef) -> Iterable[str]:
    declared = [node.target for node in dataclass.body if isinstance(node, ast.AnnAssign)]
    return [target.id for target in declared if isinstance(target, ast.Name) and target.id[0] != "_"]
