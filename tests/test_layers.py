"""Imports point one way, and the heavy ones stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = ("cluster", "router", "serving")
"""Each may import those after it."""

HOMES = {
    "vllm": {"serving"},
    "torch": {"serving"},
    "transformers": {"serving"},
    "fastapi": {"router"},
    "starlette": {"router"},
    "uvicorn": {"router"},
    "aiohttp": {"router"},
    "jinja2": {"router"},
}
"""The packages that may import a package."""


MODULES = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """The top-level packages that a module imports anywhere in it, `if TYPE_CHECKING` and functions too."""
    packages: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports by a relative name, at line {node.lineno}"
            packages.add((node.module or "").split(".")[0])
    return packages


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    """A module imports its own package and those below it: cluster, router, serving, in this order. What is
    heavy is imported by one package alone, and nothing imports tests or benchmarks."""
    layer = path.relative_to(ROOT).parts[0]
    above = {*LAYERS[: LAYERS.index(layer)], "tests", "benchmarks"}
    foreign = {package for package, homes in HOMES.items() if layer not in homes}
    assert not imported(path) & (above | foreign)


@pytest.mark.parametrize("module", ["router.deployment", "router.announced", "cluster.cli", "cluster.app"])
def test_no_engine_is_loaded_where_none_runs(module: str) -> None:
    """What a router process loads, and what the command loads, brings in neither vllm nor torch nor
    transformers."""
    code = f"import sys, {module}; print(*sorted({{'vllm', 'torch', 'transformers'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == ""


def test_the_command_asks_without_ray() -> None:
    """The commands that start nothing do not wait for Ray to load."""
    code = "import sys, cluster.cli; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"
