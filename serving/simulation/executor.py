"""An executor for vLLM whose accelerator is modelled: everything of vLLM but the model's arithmetic.

Scheduler, block manager, prefix cache, grammars, tokenizer and output path are vLLM's own, and what they do
(chunked prefill, preemption, prefix hits, stop strings, max_tokens) happens. There are no weights and no
worker process: a folder with a config.json and a tokenizer is model enough. What a model or its sampler would
do does not happen: temperature, penalties, biases and min_tokens change nothing.

In Trunkline a model has it by `accelerator: simulated`; any other vLLM, of 0.29 or 0.32, by its arguments:

    distributed_executor_backend: serving.simulation.executor.SimulatedExecutor
    additional_config: {simulation: {step_ms: 5}}
"""

from __future__ import annotations

import time
from functools import cached_property
from typing import Any, NoReturn

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.tasks import SupportedTask
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT

from serving.simulation.accelerator import Accelerator, shape, work
from serving.simulation.due import Due
from serving.simulation.report import Report
from serving.simulation.runner import Runner
from serving.simulation.settings import ExecutorSettings
from serving.simulation.timeline import Timeline

# vLLM writes its own loggers and those below them, and no others.
log = init_logger(f"vllm.{__name__}")

KV_TOKENS = 1 << 20
"""What the KV cache holds where no device says how much memory there is, unless one request needs more."""


class SimulatedExecutor(Executor):
    """Answers where another executor would run a model, in the time that an accelerator would need.

    The life of a step: the scheduler says how many tokens of which requests are to be computed.
    `execute_model` puts the step at the end of the accelerator's queue. `sample_tokens` makes its tokens,
    while the accelerator is taken to be at work; whoever asks for the result waits until that is done. The
    scheduler appends the tokens, ends what is finished, and plans the next step.
    """

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        return True

    def _init_executor(self) -> None:
        given: Any = self.vllm_config.additional_config
        settings = self._settings = ExecutorSettings.model_validate(given.get("simulation", {}))
        _refuse_what_is_not_modelled(self.vllm_config, settings)
        # The CPU platform turns it off, whatever the arguments say. What acts on it is made after us.
        self.scheduler_config.async_scheduling = settings.async_scheduling
        self._runner = Runner(self.model_config, settings.answers)
        self._timeline = Timeline()
        self._report = Report(settings.report) if settings.report else None
        self._step: SchedulerOutput

    def get_kv_cache_specs(self) -> list[dict[str, KVCacheSpec]]:
        return [{f"layers.{layer}": self._layer for layer in range(self._layers)}]

    def get_supported_kv_cache_layouts(self) -> list[list[str]]:
        return [["LBNHC"]]

    def set_kv_cache_layout(self, layout_name: str) -> None:
        """Nothing is laid out."""

    def determine_available_memory(self) -> list[int]:
        cache, layer = self.cache_config, self._layer
        if cache.kv_cache_memory_bytes is not None:
            return [cache.kv_cache_memory_bytes]
        if self._accelerator is not None:
            return [self._accelerator.kv_memory(cache.gpu_memory_utilization)]
        tokens = max(KV_TOKENS, self.model_config.max_model_len)
        # One block more, as vLLM keeps the first for itself.
        return [(-(-tokens // layer.block_size) + 1) * layer.page_size_bytes * self._layers]

    def initialize_from_config(self, kv_cache_configs: list[KVCacheConfig]) -> None:
        """Blocks are counted, and no tensor stands behind them."""

    def compile_or_warm_up_model(self) -> None:
        """There is no model."""

    @cached_property
    def supported_tasks(self) -> tuple[SupportedTask, ...]:
        return ("generate",)

    # The flag may come by place or by name: the signature is vLLM's.
    def execute_model(self, scheduler_output: SchedulerOutput, non_block: bool = False) -> Any:  # noqa: FBT001, FBT002
        """None where `sample_tokens` is to follow, as vLLM has it."""
        self._runner.update(scheduler_output)
        if not scheduler_output.total_num_scheduled_tokens:
            return Due(EMPTY_MODEL_RUNNER_OUTPUT) if non_block else EMPTY_MODEL_RUNNER_OUTPUT
        self._step = scheduler_output
        continues = bool(scheduler_output.scheduled_cached_reqs.req_ids)
        self._timeline.begin(time.monotonic(), self._lasts_s(scheduler_output), continues=continues)
        return Due(None) if non_block else None

    def sample_tokens(self, grammar_output: GrammarOutput | None, non_block: bool = False) -> Any:  # noqa: FBT001, FBT002
        ends_at = self._timeline.end(time.monotonic())
        due = Due(self._runner.output(self._step, grammar_output), ends_at)
        if self._report is not None:
            self._report.write(self._timeline.run)
        return due if non_block else due.result()

    def _lasts_s(self, step: SchedulerOutput) -> float:
        if self._accelerator is None:
            assert self._settings.step_ms is not None  # noqa: S101 - it is where there is no device
            return self._settings.step_ms / 1000
        new, cached, scheduled = (
            step.scheduled_new_reqs,
            step.scheduled_cached_reqs,
            step.num_scheduled_tokens,
        )
        computed = [*(request.num_computed_tokens for request in new), *cached.num_computed_tokens]
        added = [
            *(scheduled[request.req_id] for request in new),
            *(scheduled[request_id] for request_id in cached.req_ids),
        ]
        return self._accelerator.step_s(work(computed, added))

    @cached_property
    def _accelerator(self) -> Accelerator | None:
        """None where every step takes the same time."""
        if self._settings.device is None:
            return None
        layer = self._layer
        dtype: Any = self.model_config.dtype  # a name only until vLLM has checked the configuration
        return Accelerator(
            self._settings.device,
            shape(self.model_config.hf_text_config),
            devices=self.parallel_config.tensor_parallel_size,
            weight_bytes=dtype.itemsize,
            kv_bytes=layer.page_size_bytes // layer.block_size * self._layers,
        )

    @cached_property
    def _layers(self) -> int:
        return self.model_config.get_num_layers(self.parallel_config)

    @cached_property
    def _layer(self) -> FullAttentionSpec:
        """The part of a layer's KV cache that one worker would hold; all are the same."""
        model, cache = self.model_config, self.cache_config
        return FullAttentionSpec(
            block_size=cache.block_size,
            num_kv_heads=model.get_num_kv_heads(self.parallel_config),
            head_size=model.get_head_size(),
            dtype=kv_cache_dtype_str_to_dtype(cache.cache_dtype, model),
        )

    def collective_rpc(self, method: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"collective_rpc: {method!r} is for workers, and a simulation has none")

    def reset_mm_cache(self) -> None:
        """There is none to empty; vLLM's server asks for it at its start."""

    def supports_draft_weight_updates(self) -> bool:
        """There are no weights; vLLM 0.29 asks at its start."""
        return False

    def check_health(self) -> None:
        """What has no parts cannot lose one."""

    def shutdown(self) -> None:
        """Say how the run was, and where it says nothing of the accelerator."""
        run = self._timeline.run
        said = (
            f"simulated accelerator: at work for {run.busy_s:.1f} s in {run.steps} steps; the host was late"
            f" with {run.late_steps} of them, by {run.late_s:.1f} s in all ({run.host_share:.1%} of both)"
        )
        if run.host_bound:
            log.warning("%s: the host was the limit, not the accelerator", said)
        else:
            log.info("%s", said)
        if self._report is not None:
            self._report.close()
            self._report = None


def _refuse_what_is_not_modelled(config: VllmConfig, settings: ExecutorSettings) -> None:
    model, parallel = config.model_config, config.parallel_config
    present = {
        "speculative decoding": config.speculative_config is not None,
        "pooling": model.runner_type != "generate",
        "layers with a state": model.has_inner_state,
        "latent attention": model.use_mla,
        "sliding windows": model.get_sliding_window() is not None,
        "images, audio and video": model.is_multimodal_model,
        "LoRA": config.lora_config is not None,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "data parallelism": parallel.data_parallel_size > 1,
        "context parallelism": parallel.prefill_context_parallel_size > 1
        or parallel.decode_context_parallel_size > 1,
    }
    if settings.device is not None:
        present["the step of a mixture of experts"] = model.is_moe
        present["the step of a quantized model"] = model.quantization is not None
    if any(present.values()):
        found = ", ".join(name for name in present if present[name])
        raise ValueError(f"the simulated accelerator does not model {found}")
