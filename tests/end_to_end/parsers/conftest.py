from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.end_to_end.parsers import ANSWERS, MODELS
from tests.end_to_end.server import Server, serving
from tests.serving import replayed


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Models that think and call as they are told to, on vLLM with a simulated accelerator."""
    folder = replayed.folder(tmp_path_factory.mktemp("model"))
    models = [
        {
            "name": name,
            "engine": "vllm",
            "accelerator": "simulated",
            "simulation": {"step_ms": 1, "answers": list(ANSWERS.values())},
            "source": str(folder),
            "tool_parser": "hermes",
            "reasoning_parser": parser,
            "engine_args": {"max_model_len": 2048, "kv_cache_memory_bytes": 64 << 20},
        }
        for name, parser in MODELS.items()
    ]
    with serving({"models": models}, tmp_path_factory.mktemp("parsers")) as server:
        yield server
