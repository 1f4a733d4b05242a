"""How long a step takes on an accelerator that is not there: what it computes and what it moves, whichever
takes longer. Pure arithmetic, from published figures and from what config.json says of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Assumptions until they are calibrated against runs on the devices themselves: well-kept kernels are reported
# at these shares of the published peaks, and vLLM with CUDA graphs at about this much beside the kernels.
COMPUTE_EFFICIENCY = 0.6
MEMORY_EFFICIENCY = 0.8
LINK_EFFICIENCY = 0.7
STEP_OVERHEAD_S = 500e-6
ALL_REDUCE_S = 10e-6
"""What an all-reduce takes beside the moving of its bytes."""

GB = 10**9


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator as its maker describes it."""

    flops: float
    """Dense 16-bit operations per second, without sparsity."""
    memory_bytes_per_s: float
    memory_bytes: int
    link_bytes_per_s: float
    """To the other devices of a tensor-parallel group, in one direction: half of what is published."""
    source: str


DEVICES = {
    "H100": Device(
        989.4e12, 3350 * GB, 80 * GB, 450 * GB, "NVIDIA H100 Tensor Core GPU datasheet, H100 SXM, NVLink"
    ),
    "H200": Device(
        989.4e12, 4800 * GB, 141 * GB, 450 * GB, "NVIDIA H200 Tensor Core GPU datasheet, H200 SXM, NVLink"
    ),
    "A100": Device(
        312e12, 2039 * GB, 80 * GB, 300 * GB, "NVIDIA A100 Tensor Core GPU datasheet, A100 80GB SXM, NVLink"
    ),
    "L4": Device(121e12, 300 * GB, 24 * GB, 32 * GB, "NVIDIA L4 Tensor Core GPU datasheet, PCIe Gen4 x16"),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder of Llama's shape: grouped attention and a gated MLP in each layer."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool
    """Whether the output head is the embedding."""

    @property
    def parameters(self) -> int:
        """All weights, without the few biases that some such models have."""
        embedding = 0 if self.tied else self.head
        return self.body + self.head + embedding + self.hidden

    @property
    def body(self) -> int:
        """The weights of the layers, which every token goes through."""
        attention = self.hidden * self.head_size * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate + 2 * self.hidden)

    @property
    def head(self) -> int:
        """The weights of the output head, which only what is sampled goes through."""
        return self.vocabulary * self.hidden


def shape(config: Any) -> Shape:
    """The shape of the model with this config.json, as transformers reads it.

    Raises ValueError where its layers are of another kind.
    """
    if (kind := getattr(config, "hidden_act", None)) not in {"silu", "swish"}:
        raise ValueError(
            f"simulation.device: only models of Llama's shape have a modelled step; this one's hidden_act is"
            f" {kind!r}, not silu. simulation.step_ms takes any"
        )
    return Shape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocabulary=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
    )


@dataclass(frozen=True, slots=True)
class Work:
    """What one step has to do."""

    tokens: int
    """Of prompts and answers, to be computed."""
    sequences: int
    """Of each a token is sampled, or would be: vLLM computes the output head of a part of a prompt too."""
    context: int
    """Tokens whose keys and values are read, over all sequences."""
    pairs: int
    """Pairs of a token and one that it attends to."""


def work(computed: Sequence[int], added: Sequence[int]) -> Work:
    """The work of a step that adds to each sequence, after the tokens that were computed before."""
    tokens, before = sum(added), sum(computed)
    if tokens == len(added):
        return Work(tokens, len(added), before + tokens, before + tokens)
    pairs = sum(new * old + new * (new + 1) // 2 for old, new in zip(computed, added, strict=True))
    return Work(tokens, len(added), before + tokens, pairs)


class Accelerator:
    """A tensor-parallel group of devices that runs one model."""

    def __init__(self, name: str, model: Shape, *, devices: int, weight_bytes: int, kv_bytes: int) -> None:
        """`weight_bytes` is what a weight takes, `kv_bytes` what a token's keys and values take on one
        device: more than its share where there are more devices than heads.
        """
        self._name = name
        self._device = DEVICES[name]
        self._model = model
        self._devices = devices
        self._weight_bytes = weight_bytes
        self._kv_bytes = kv_bytes

    def kv_memory(self, utilization: float) -> int:
        """Bytes for the KV cache on each device. Raises ValueError where the weights leave none."""
        weights = self._model.parameters * self._weight_bytes // self._devices
        room = int(self._device.memory_bytes * utilization) - weights
        if room <= 0:
            raise ValueError(
                f"simulation.device: {self._devices} x {self._name} cannot hold the model: its weights take"
                f" {weights / GB:.1f} GB on each, of {self._device.memory_bytes * utilization / GB:.1f} GB"
            )
        return room

    def step_s(self, work: Work) -> float:
        """Seconds that a step takes: the slower of computing and moving, and what is beside both."""
        return max(self._compute_s(work), self._memory_s(work)) + self._reduce_s(work) + STEP_OVERHEAD_S

    def _compute_s(self, work: Work) -> float:
        model = self._model
        # A multiplication and an addition for each weight; scores and values for each pair and head.
        linear = 2 * (model.body * work.tokens + model.head * work.sequences)
        attention = 4 * model.layers * model.heads * model.head_size * work.pairs
        return (linear + attention) / (self._devices * self._device.flops * COMPUTE_EFFICIENCY)

    def _memory_s(self, work: Work) -> float:
        # Of the embedding a step looks up a few rows.
        weights = (self._model.body + self._model.head) * self._weight_bytes / self._devices
        moved = weights + self._kv_bytes * (work.context + work.tokens)  # read and written
        return moved / (self._device.memory_bytes_per_s * MEMORY_EFFICIENCY)

    def _reduce_s(self, work: Work) -> float:
        """Two all-reduces in each layer, around a ring."""
        if self._devices == 1:
            return 0.0
        moved = (
            2 * (self._devices - 1) / self._devices * work.tokens * self._model.hidden * self._weight_bytes
        )
        each = ALL_REDUCE_S + moved / (self._device.link_bytes_per_s * LINK_EFFICIENCY)
        return 2 * self._model.layers * each
