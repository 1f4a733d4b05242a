from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray import serve

from cluster.config import ModelConfig
from cluster.placement import CLOSE_S, PlacementError, place
from serving.settings import SimulationSettings

CORES = [64.0]


def vllm(
    name: str = "m", *, tp: int = 1, pp: int = 1, args: dict[str, Any] | None = None, **fields: Any
) -> ModelConfig:
    """A model on vLLM with these parallel sizes."""
    sizes = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp}
    return ModelConfig(name=name, engine="vllm", source="org/m", engine_args=sizes | (args or {}), **fields)


ECHO = ModelConfig(name="e", engine="echo")


def test_a_laptop_holds_everything() -> None:
    """Without GPUs, one-worker models run on the CPU and reserve no core, so any number of them starts."""
    for placement in place([vllm(), ECHO], [0], CORES):
        assert placement.options["ray_actor_options"]["num_gpus"] == 0
        assert placement.options["ray_actor_options"]["num_cpus"] == 0


def test_workers_on_one_node_are_children_of_the_replica() -> None:
    """Where a node has enough GPUs, the replica's actor takes one for each worker and no bundles."""
    [placement] = place([vllm(tp=4, pp=2)], [8], CORES)
    assert placement.options["ray_actor_options"]["num_gpus"] == 8
    assert "placement_group_bundles" not in placement.options
    assert "distributed_executor_backend" not in placement.engine_args


def test_workers_of_several_nodes_are_actors_in_bundles() -> None:
    """Where no node has enough GPUs, each worker has a bundle with one, and the replica itself holds none."""
    [placement] = place([vllm(tp=4, pp=2, cpus=2)], [4, 4], CORES)
    options = placement.options
    assert [bundle["GPU"] for bundle in options["placement_group_bundles"]] == [1] * 8
    assert options["placement_group_bundles"][0]["CPU"] == 2
    assert options["placement_group_strategy"] == "PACK"
    assert options["ray_actor_options"]["num_gpus"] == 0
    assert placement.engine_args["distributed_executor_backend"] == "ray"


def test_ray_workers_can_be_asked_for_on_one_node() -> None:
    """A configuration that names vLLM's Ray executor gets it, wherever the workers would fit."""
    [placement] = place([vllm(tp=2, args={"distributed_executor_backend": "ray"})], [2], CORES)
    assert len(placement.options["placement_group_bundles"]) == 2


def test_a_model_can_be_kept_off_the_gpus() -> None:
    """`gpus: 0` runs a model on the CPU of a machine that has GPUs; echo needs no such word."""
    for placement in place([vllm(gpus=0, tp=2), ECHO], [8], CORES):
        assert placement.options["ray_actor_options"]["num_gpus"] == 0


@pytest.mark.parametrize("there", [[0], [8]])
def test_a_simulated_accelerator_takes_no_gpu(there: list[int]) -> None:
    """However many devices a model is simulated on, its replica takes none, and runs where there are none."""
    model = vllm(tp=8, accelerator="simulated", simulation=SimulationSettings(device="H100"))
    [placement] = place([model], there, CORES)
    assert placement.options["ray_actor_options"]["num_gpus"] == 0
    assert "placement_group_bundles" not in placement.options
    assert placement.engine_args == model.engine_args


def test_a_replica_has_time_to_drain_and_to_close() -> None:
    """Serve waits for the drain, and then for the engine's processes to end, before it kills a replica."""
    [placement] = place([vllm(drain_s=120.0, replicas=3)], [4], CORES)
    assert placement.options["graceful_shutdown_timeout_s"] == 120 + CLOSE_S
    assert placement.options["num_replicas"] == 3


LACKS = {
    "more than there are": (
        [vllm(tp=4, pp=2)],
        [4],
        """\
m: a replica needs 8 GPUs (tensor_parallel_size 4 x pipeline_parallel_size 2), \
and there are 4, at most 4 on a node""",
    ),
    "none there": (
        [vllm(tp=2)],
        [0],
        """\
m: a replica needs 2 GPUs (tensor_parallel_size 2 x pipeline_parallel_size 1), \
and there is none; gpus: 0 runs it on the CPU""",
    ),
    "together too many": (
        [vllm("a", replicas=2), vllm("b", tp=2, replicas=2), ECHO],
        [2, 2],
        "all replicas together need 6 GPUs (a 2, b 4), and there are 4, at most 2 on a node",
    ),
    "kept on one node": (
        [vllm(tp=4, args={"distributed_executor_backend": "mp"})],
        [2, 2],
        """\
m: a replica needs 4 GPUs (tensor_parallel_size 4 x pipeline_parallel_size 1) \
and distributed_executor_backend mp keeps them on one node, \
and there are 4, at most 2 on a node""",
    ),
    "data parallel": (
        [vllm(args={"data_parallel_size": 4})],
        [2, 2],
        """\
m: a replica needs 4 GPUs (tensor_parallel_size 1 x pipeline_parallel_size 1 x data_parallel_size 4) \
and data_parallel_size keeps them on one node, \
and there are 4, at most 2 on a node; use replicas instead""",
    ),
}


@pytest.mark.parametrize(("models", "nodes", "refusal"), LACKS.values(), ids=LACKS.keys())
def test_a_lack_of_gpus_is_told_before_anything_waits_for_them(
    models: list[ModelConfig], nodes: list[int], refusal: str
) -> None:
    """A configuration that would wait for GPUs for ever is refused with what it needs and what there is."""
    with pytest.raises(PlacementError) as error:
        place(models, nodes, CORES)
    assert str(error.value) == refusal


def test_every_model_without_room_is_told() -> None:
    """The refusal has a line for each model that does not fit."""
    with pytest.raises(PlacementError) as error:
        place([vllm("a", tp=2), vllm("b"), vllm("c", tp=3)], [1], CORES)
    assert [line[0] for line in str(error.value).split("\n")] == ["a", "c"]


@given(
    tp=st.integers(1, 8),
    pp=st.integers(1, 4),
    replicas=st.integers(1, 4),
    cpus=st.sampled_from([0.0, 0.5, 4.0]),
    nodes=st.lists(st.integers(0, 8), min_size=1, max_size=6),
)
def test_serve_takes_every_placement(tp: int, pp: int, replicas: int, cpus: float, nodes: list[int]) -> None:
    """A placement is refused for want of GPUs, or it holds as many as it needs and Serve accepts it."""
    models = [vllm("a", tp=tp, pp=pp, replicas=replicas, cpus=cpus), ECHO]
    needed = tp * pp * replicas
    try:
        placements = place(models, nodes, CORES)
    except PlacementError:
        assert needed > sum(nodes)
        return
    for placement in placements:
        serve.deployment(Replica, **placement.options)
    held = placements[0].options["ray_actor_options"]["num_gpus"] or len(
        placements[0].options.get("placement_group_bundles", [])
    )
    assert held * replicas == (needed if any(nodes) else 0)


class Replica:
    """Stands for whatever Serve runs."""


def test_cores_that_are_not_there_are_missed() -> None:
    """Reserved CPU cores are counted over all nodes, as Ray would wait for them for ever."""
    assert place([vllm(cpus=2.0, replicas=2)], [0], [2.0, 2.0])
    with pytest.raises(PlacementError, match="reserve 4 CPU cores, and there are 3"):
        place([vllm(cpus=2.0, replicas=2)], [0], [3.0])
