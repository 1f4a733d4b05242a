"""Where replicas run: a model and the GPUs of each node become options of a Serve deployment. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.config import WORKER_ARGUMENTS, ModelConfig

CONTROL_CALLS = 100
"""Calls that a replica answers at once. Only control calls come through Serve: addresses, metrics."""

CLOSE_S = 10.0
"""Seconds beyond the drain that a replica has to end its engine's processes before Serve kills it."""


class PlacementError(Exception):
    """The cluster has no room for the configuration; the text says what is missing, a line for each lack."""


@dataclass(frozen=True, slots=True)
class Placement:
    """How one model's replicas are started."""

    options: dict[str, Any]
    """Keyword arguments of Serve's `Deployment.options`."""
    engine_args: dict[str, Any]
    """The model's engine arguments, with those that follow from the placement."""


def place(
    models: Sequence[ModelConfig], gpus_by_node: Sequence[int], cpus_by_node: Sequence[float]
) -> tuple[Placement, ...]:
    """A placement for each model, in their order, on nodes with this many GPUs and CPU cores each.

    It counts both over all nodes: Ray decides which node a replica goes to. Raises PlacementError.
    """
    lacks = [lack for model in models if (lack := _lack(model, gpus_by_node))]
    needed = {model.name: model.replicas * gpus_of(model, gpus_by_node) for model in models}
    if not lacks and sum(needed.values()) > sum(gpus_by_node):
        each = ", ".join(f"{name} {gpus}" for name, gpus in needed.items() if gpus)
        lacks.append(
            f"all replicas together need {sum(needed.values())} GPUs ({each}), {_there(gpus_by_node)}"
        )
    cpus = sum(model.replicas * model.cpus for model in models)
    if cpus > sum(cpus_by_node):
        lacks.append(f"all replicas together reserve {cpus:g} CPU cores, and there are {sum(cpus_by_node):g}")
    if lacks:
        raise PlacementError("\n".join(lacks))
    return tuple(_placement(model, gpus_by_node) for model in models)


def gpus_of(model: ModelConfig, gpus_by_node: Sequence[int]) -> int:
    """GPUs that one replica takes: one for each worker, or none where it runs on the CPU.

    A model of several workers is not moved to the CPU by itself: that it needs GPUs was said by its sizes.
    """
    if not model.takes_gpus:
        return 0
    if model.gpus is None:
        return model.workers if any(gpus_by_node) or model.workers > 1 else 0
    return model.gpus


def _placement(model: ModelConfig, gpus_by_node: Sequence[int]) -> Placement:
    gpus = gpus_of(model, gpus_by_node)
    actor: dict[str, Any] = {"num_cpus": model.cpus, "num_gpus": gpus}
    options = {
        "num_replicas": model.replicas,
        "ray_actor_options": actor,
        "max_ongoing_requests": CONTROL_CALLS,
        # A start that failed may have failed for the moment, a bad argument fails every time.
        "max_constructor_retry_count": 3,
        "health_check_period_s": 1.0,
        "health_check_timeout_s": 30.0,
        "graceful_shutdown_wait_loop_s": 0.1,
        "graceful_shutdown_timeout_s": model.drain_s + CLOSE_S,
    }
    if not _uses_ray_workers(model, gpus, gpus_by_node):
        return Placement(options, model.engine_args)
    # The replica's own process holds no GPU then: each worker is an actor in a bundle of its own.
    actor["num_gpus"] = 0
    options["placement_group_bundles"] = [{"GPU": 1, "CPU": model.cpus}, *[{"GPU": 1}] * (gpus - 1)]
    options["placement_group_strategy"] = "PACK"
    return Placement(options, {**model.engine_args, "distributed_executor_backend": "ray"})


def _uses_ray_workers(model: ModelConfig, gpus: int, gpus_by_node: Sequence[int]) -> bool:
    """Whether the workers are Ray actors, as those of several nodes must be, and not child processes."""
    chosen = model.engine_args.get("distributed_executor_backend") == "ray"
    return gpus > 0 and (chosen or gpus > max(gpus_by_node))


def _lack(model: ModelConfig, gpus_by_node: Sequence[int]) -> str | None:
    gpus = gpus_of(model, gpus_by_node)
    sizes = {size: model.engine_args[size] for size in WORKER_ARGUMENTS if size in model.engine_args}
    why = " x ".join(f"{name} {size}" for name, size in sizes.items()) or "one worker"
    needs = f"{model.name}: a replica needs {gpus} GPUs ({why})"
    there = _there(gpus_by_node)
    if gpus > sum(gpus_by_node):
        return f"{needs}, {there}" if any(gpus_by_node) else f"{needs}, {there}; gpus: 0 runs it on the CPU"
    if not _uses_ray_workers(model, gpus, gpus_by_node):
        return None
    backend = model.engine_args.get("distributed_executor_backend", "ray")
    if backend != "ray":
        return f"{needs} and distributed_executor_backend {backend} keeps them on one node, {there}"
    if sizes.get("data_parallel_size", 1) > 1:
        return f"{needs} and data_parallel_size keeps them on one node, {there}; use replicas instead"
    return None


def _there(gpus_by_node: Sequence[int]) -> str:
    if not any(gpus_by_node):
        return "and there is none"
    return f"and there are {sum(gpus_by_node)}, at most {max(gpus_by_node)} on a node"
