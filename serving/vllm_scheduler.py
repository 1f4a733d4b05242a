"""vLLM's scheduler, with a shorter way through its block manager.

A request in mid-answer wants nothing of the block manager but once in a block: there is room for its next
token, and no block has become full that could be found again. vLLM works that out anew for each token, twice,
which is a third of what a token costs the engine core. Here it is a comparison. What is scheduled, which
blocks it gets and what the prefix cache holds stay the same.

Import this module only through `serving.engines`, which sets the environment first, or in the engine core.
"""

from __future__ import annotations

from copy import copy
from functools import cached_property
from typing import Any, cast

from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_coordinator import UnitaryKVCacheCoordinator
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.sched.interface import SchedulerInterface
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request

SCHEDULER = f"{__name__}.scheduler"
"""By this name the engine core, another process, finds what makes its scheduler."""


def install(config: VllmConfig) -> None:
    """Let the engine core make its scheduler here, unless it has been told to make it elsewhere."""
    if config.scheduler_config.scheduler_cls is None:
        config.scheduler_config.scheduler_cls = SCHEDULER


def scheduler(*, vllm_config: VllmConfig, **others: Any) -> SchedulerInterface:
    """What vLLM would make for this configuration, with `Blocks` where they will do."""
    settings = copy(vllm_config.scheduler_config)
    settings.scheduler_cls = None
    made: Any = settings.get_scheduler_cls()(vllm_config=vllm_config, **others)
    if _will_do(made.kv_cache_manager):
        made.kv_cache_manager.__class__ = Blocks  # it has no state of its own
    return cast("SchedulerInterface", made)


def _will_do(manager: KVCacheManager) -> bool:
    """Whether all layers keep all tokens in blocks of one kind, which are found again as a whole."""
    coordinator = manager.coordinator
    managers = coordinator.single_type_managers
    return (
        type(manager) is KVCacheManager
        and type(coordinator) is UnitaryKVCacheCoordinator
        and type(managers[0]) is FullAttentionManager
        and managers[0].block_size == coordinator.block_pool.hash_block_size
        and not coordinator.num_reprefillable_tokens
    )


class Blocks(KVCacheManager):
    """vLLM's block manager for a model whose layers all keep all tokens."""

    @cached_property
    def _only(self) -> FullAttentionManager:
        (only,) = self.coordinator.single_type_managers
        return cast("FullAttentionManager", only)

    def allocate_slots(
        self,
        request: Request,
        num_new_tokens: int,
        num_new_computed_tokens: int = 0,
        new_computed_blocks: KVCacheBlocks | None = None,
        num_lookahead_tokens: int = 0,
        *others: Any,
        **more: Any,
    ) -> KVCacheBlocks | None:
        if new_computed_blocks is None and not others and not more:  # as vLLM asks for one that is running
            only = self._only
            whole = only.num_cached_block.get(request.request_id)
            if whole is not None:
                size = only.block_size
                computed = request.num_computed_tokens + num_new_tokens
                room = len(only.req_to_blocks[request.request_id]) * size
                if computed + num_lookahead_tokens <= room and (
                    min(computed, request.num_tokens) < (whole + 1) * size
                ):
                    return self.empty_kv_cache_blocks
        return super().allocate_slots(
            request,
            num_new_tokens,
            num_new_computed_tokens,
            new_computed_blocks,
            num_lookahead_tokens,
            *others,
            **more,
        )

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        only = self._only
        if num_computed_tokens >= (only.num_cached_block.get(request.request_id, 0) + 1) * only.block_size:
            super().cache_blocks(request, num_computed_tokens)
