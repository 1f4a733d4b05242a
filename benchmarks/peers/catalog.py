"""Every peer by its name, and where their environments are kept."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.peers.peer import Peer
from benchmarks.peers.ray_serve_llm import RayServeLlm
from benchmarks.peers.servers import LiteLlm, Trunkline, VllmRouter, VllmServe
from benchmarks.peers.settings import SIMULATED, Engine


def peers(engine: Engine = SIMULATED) -> dict[str, Peer]:
    """All of them with that engine, by name, in the order of the table."""
    every: list[Peer] = [
        Trunkline(engine),
        VllmServe(engine=engine),
        VllmServe("vllm-rust", "vllm serve, Rust frontend", rust=True, engine=engine),
        RayServeLlm(engine=engine),
        RayServeLlm("ray-serve-llm-fast", "Ray Serve LLM, fast settings", fast=True, engine=engine),
        VllmRouter("vllm-router", "vllm-router + vllm serve, Python", "vllm-router", engine),
        LiteLlm("litellm", "LiteLLM + vllm serve, Python", "litellm", engine),
    ]
    return {peer.name: peer for peer in every}


def cache_folder() -> Path:
    """Where peers are prepared unless another folder is given: some gigabytes that may be deleted."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trunkline" / "peers"
