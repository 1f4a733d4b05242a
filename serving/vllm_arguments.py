"""The names of vLLM's engine arguments, read from its source text.

Importing vLLM takes ten seconds and several hundred megabytes; parsing the one file that declares its
arguments takes a fraction of a second. So a configuration is checked without vLLM being loaded.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

RESERVED = {
    "model": "the model's `source` says it",
    "revision": "the model's `source` says it: org/name@revision",
    "served_model_name": "the model's name and aliases are Trunkline's own",
    "generation_config": "a request's defaults are those of the API, the same for every model",
    "override_generation_config": "a request's defaults are those of the API, the same for every model",
    "disable_log_stats": "metrics and the choice of a replica need vLLM's statistics",
    "enable_log_requests": "Trunkline writes one log line for each request itself",
}
"""Arguments that are not the configuration's to set, and why."""


class VllmMissing(Exception):
    """vLLM is not installed here, so its arguments are not known."""


@functools.cache
def known() -> frozenset[str]:
    """Every argument of vLLM's AsyncEngineArgs. Raises VllmMissing."""
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise VllmMissing(
            "vLLM is not installed in this environment: install the extra `cpu` or `gpu` of trunkline"
        )
    declaration = Path(spec.submodule_search_locations[0], "engine", "arg_utils.py")
    module = ast.parse(declaration.read_bytes())
    return frozenset(
        field
        for node in module.body
        if isinstance(node, ast.ClassDef) and node.name in {"EngineArgs", "AsyncEngineArgs"}
        for field in _fields(node)
    )


def _fields(dataclass: ast.ClassDef) -> Iterable[str]:
    declared = [node.target for node in dataclass.body if isinstance(node, ast.AnnAssign)]
    return [target.id for target in declared if isinstance(target, ast.Name) and target.id[0] != "_"]
