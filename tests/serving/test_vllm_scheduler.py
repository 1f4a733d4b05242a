from __future__ import annotations

import gc
from collections.abc import Iterator
from copy import deepcopy
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCore

from serving.simulation.executor import SimulatedExecutor
from serving.vllm_engine import configuration
from serving.vllm_scheduler import Blocks
from tests.serving import replayed

# vLLM and what it imports warn of each other's deprecations.
pytestmark = pytest.mark.filterwarnings("default")

BLOCK = 4
ARGUMENTS = {
    "max_model_len": 64,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 24,
    "enable_chunked_prefill": True,
    "block_size": BLOCK,
    # Too few for what is asked, so that requests are preempted.
    "num_gpu_blocks_override": 24,
}
LONGEST = 400
"""Steps after which something must have gone wrong."""


class Asked(NamedTuple):
    """One request of a load."""

    step: int
    """When it comes."""
    shared: int
    """Tokens that its prompt has in common with others'."""
    own: int
    answer: int
    aborted_after: int | None
    """Steps."""


loads = st.lists(
    st.builds(
        Asked,
        step=st.integers(0, 30),
        shared=st.integers(1, 20),
        own=st.integers(0, 12),
        answer=st.integers(1, 28),
        aborted_after=st.none() | st.integers(0, 20),
    ),
    min_size=1,
    max_size=14,
)


class Core:
    """An engine core in this process, which writes down what it schedules."""

    def __init__(self, config: VllmConfig) -> None:
        self._core = EngineCore(config, SimulatedExecutor, log_stats=True)
        self.scheduler: Any = self._core.scheduler
        self.used = 0
        """Ids of requests."""

    def run(self, load: list[Asked], *, first: int) -> list[Any]:
        """What each step of a load is told to do, what comes out of it, and what is left at the end. `first`
        is the id of its first request."""
        told: list[Any] = []
        schedule = self.scheduler.schedule

        def scheduled(*arguments: Any) -> SchedulerOutput:
            output: SchedulerOutput = schedule(*arguments)
            told.append(_plan(output))
            return output

        self.scheduler.schedule = scheduled
        aborts = sorted(
            (asked.step + asked.aborted_after, str(first + index))
            for index, asked in enumerate(load)
            if asked.aborted_after is not None
        )
        arrivals = sorted(enumerate(load), key=lambda each: each[1].step)
        for step in range(LONGEST):
            while arrivals and arrivals[0][1].step <= step:
                index, asked = arrivals.pop(0)
                self._add(str(first + index), index, asked)
            while aborts and aborts[0][0] <= step:
                self._core.abort_requests([aborts.pop(0)[1]])
            outputs, _ = self._core.step_fn()
            told.append([(each.request_id, each.new_token_ids, each.finish_reason) for each in _all(outputs)])
            told.append(self.scheduler.kv_cache_manager.usage)
            if not arrivals and not aborts and not self.scheduler.has_requests() and not outputs:
                break
        else:
            pytest.fail("it does not end")
        self.scheduler.schedule = schedule
        pool = self.scheduler.kv_cache_manager.block_pool
        return [*told, sorted(map(str, pool.cached_block_hash_to_block._cache)), pool.get_num_free_blocks()]

    def forget(self) -> None:
        """Begin with nothing in the prefix cache."""
        assert self._core.reset_prefix_cache()

    def close(self) -> None:
        """End it."""
        self._core.shutdown()  # type: ignore[no-untyped-call]

    def _add(self, name: str, index: int, asked: Asked) -> None:
        prompt = [*range(1000, 1000 + asked.shared), *range(2000 + 50 * index, 2000 + 50 * index + asked.own)]
        request = EngineCoreRequest(
            request_id=name,
            prompt_token_ids=prompt,
            mm_features=None,
            sampling_params=SamplingParams(max_tokens=asked.answer, ignore_eos=True, seed=index),
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        self._core.add_request(*self._core.preprocess_add_request(request))


def _plan(output: SchedulerOutput) -> Any:
    cached = output.scheduled_cached_reqs
    return (
        output.num_scheduled_tokens,
        [(new.req_id, new.block_ids, new.num_computed_tokens) for new in output.scheduled_new_reqs],
        (cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, cached.resumed_req_ids),
        output.finished_req_ids,
        output.preempted_req_ids,
    )


def _all(outputs: Any) -> list[Any]:
    return [each for of_client in (outputs or {}).values() for each in of_client.outputs]


@pytest.fixture(scope="module", params=["step by step", "a step ahead"])
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VllmConfig:
    """A simulated engine's, without and with async scheduling."""
    given = replayed.settings(replayed.folder(tmp_path_factory.mktemp("model")), ["no matter"], **ARGUMENTS)
    assert given.simulation is not None
    ahead = given.simulation.model_copy(update={"async_scheduling": request.param == "a step ahead"})
    return configuration(given.model_copy(update={"simulation": ahead}))


@pytest.fixture(scope="module")
def cores(config: VllmConfig) -> Iterator[tuple[Core, Core]]:
    """One with our scheduler, and one with vLLM's."""
    theirs = deepcopy(config)
    theirs.scheduler_config.scheduler_cls = None
    both = Core(config), Core(theirs)
    yield both
    for core in both:
        core.close()
    gc.collect()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(load=loads)
def test_it_schedules_as_vllm_does(cores: tuple[Core, Core], load: list[Asked]) -> None:
    """Under any load, every step has the same requests, tokens and blocks, and leaves the same in the prefix
    cache: with preemption, prompts in parts, prefixes in common and requests that are given up."""
    ours, theirs = cores
    first = ours.used
    ours.used += len(load)
    for core in cores:
        core.forget()
    assert ours.run(load, first=first) == theirs.run(load, first=first)


def test_it_is_vllms_own_with_other_blocks(cores: tuple[Core, Core], config: VllmConfig) -> None:
    """The scheduler is the one that vLLM would have made; only its block manager is ours."""
    ours, theirs = cores
    ahead = config.scheduler_config.async_scheduling
    assert type(ours.scheduler) is type(theirs.scheduler) is (AsyncScheduler if ahead else Scheduler)
    assert type(ours.scheduler.kv_cache_manager) is Blocks
    assert type(theirs.scheduler.kv_cache_manager) is not Blocks


def test_requests_are_preempted_in_this_test(cores: tuple[Core, Core]) -> None:
    """The engine is small enough for the loads to run out of blocks."""
    crowd = [Asked(0, 1, 12, 28, None)] * 8
    plans = [each for each in cores[1].run(crowd, first=10**6) if isinstance(each, tuple)]
    assert any(plan[2][3] for plan in plans)  # some were resumed
