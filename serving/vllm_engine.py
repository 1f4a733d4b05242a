"""vLLM behind the `Engine` protocol.

One `AsyncLLM`, whose scheduler and workers are processes of their own. vLLM hands each output to its
request's queue object by calling `put`; here that object is the way to our sink, so an output costs no
task switch. Requests go in below `AsyncLLM.generate`, by the two calls that it makes itself.

Import this module only through `serving.engines`, which sets the environment first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import structlog
from vllm import envs
from vllm.config import StructuredOutputsConfig, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import RequestOutputCollector
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from serving import penalties, vllm_mailbox, vllm_outbox, vllm_scheduler
from serving.drain import DrainRate
from serving.engine import EngineDead, Prompt, Refusal, Sink, fit
from serving.messages import Chat, Load, Request, Text
from serving.settings import EngineSettings
from serving.simulation.executor import SimulatedExecutor
from serving.source import resolve
from serving.vllm_grammars import Grammars
from serving.vllm_metrics import Statistics
from serving.vllm_outputs import Llm
from serving.vllm_rendering import Renderer
from serving.vllm_requests import Requests, sampling_refusal, without_stop
from serving.vllm_streams import Choice, Stream

log = structlog.get_logger(__name__)

COMPACT_BACKENDS = {"xgrammar", "guidance"}
"""Those that can be held to JSON without white space."""

CPU_DEFAULTS: dict[str, Any] = {
    # bfloat16 was seen to give wrong text on one CPU and to be no faster on another; compiling takes two
    # minutes of start.
    "dtype": "float32",
    "enforce_eager": True,
    # Left alone, vLLM takes a share of all memory.
    "kv_cache_memory_bytes": 1 << 30,
    "enable_chunked_prefill": False,
}
"""Engine arguments on a CPU where the configuration says nothing."""

SIMULATION_DEFAULTS: dict[str, Any] = {
    # As on a GPU; the CPU's own would be 128.
    "block_size": 16,
}
"""Engine arguments of a simulated accelerator where the configuration says nothing."""

WORKERS = {"uni", "mp", "ray"}
"""vLLM's own executors, whose workers run a model."""

CLOSE_TIMEOUT_S = 2.0
"""What the engine core gets to end by itself before it and its workers are killed. It has nothing to save."""


class VllmEngine:
    """An `Engine` that runs a model on vLLM."""

    def __init__(self, settings: EngineSettings) -> None:
        self.context_length = 0
        self._settings = settings
        self._gauge = LoadGauge()
        self._drain = DrainRate()
        self._streams: dict[str, Stream] = {}
        self._aborts: set[asyncio.Task[None]] = set()
        self._llm: AsyncLLM | None = None
        self._outputs: asyncio.Task[Any]
        self._grammars: Grammars
        self._renderer: Renderer
        self._requests: Requests
        self._penalizes: bool

    async def start(self) -> None:
        config = await asyncio.to_thread(configuration, self._settings)
        self._penalizes = penalties.processor(config) is not None
        self._grammars = Grammars(config)
        # Blocks until the model is loaded. It has to be made on the loop that it will run on.
        llm = Llm.from_vllm_config(
            config,
            usage_context=UsageContext.OPENAI_API_SERVER,
            stat_loggers=[self._gauge.listener, Statistics],
            # Ends vLLM's own listener that writes text.
            disable_log_stats=True,
        )
        vllm_mailbox.install(llm.engine_core)
        vllm_outbox.install(llm.engine_core)
        self._llm = llm
        assert llm.output_handler is not None  # noqa: S101 - vLLM starts it where a loop runs
        self._outputs = llm.output_handler
        # vLLM asks for several settings per token, and until now each is a look into the environment.
        envs.enable_envs_cache()
        self._requests = Requests(llm.input_processor, await llm.get_supported_tasks())
        self.context_length = llm.model_config.max_model_len
        self._renderer = Renderer(config, llm.renderer, self._settings, self._grammars)
        await asyncio.to_thread(self._renderer.warm_up)

    async def render(self, request: Request) -> list[Prompt]:
        return await self._renderer.render(request)

    async def generate(self, request: Request, prompts: Sequence[Prompt], sink: Sink) -> None:
        llm = self._running
        if llm.errored:
            raise EngineDead("the engine has died")
        if prompts[0].content.constrained_by is not None:
            # Checking a constraint takes vLLM a while.
            choices = await asyncio.to_thread(self._choices, request, prompts)
        else:
            choices = self._choices(request, prompts)
        stream = self._open(request, prompts, sink)
        # A text's prompts may be tokens, and such end in the middle of a character where they like.
        text = prompts[0].content.input.get("prompt") if isinstance(request, Chat) else None
        sink.accepted()
        try:
            for index, choice in enumerate(choices):
                # vLLM asks nothing of a queue but `put`, and `Outputs` but what a Choice has.
                queue = cast("RequestOutputCollector", Choice(stream, index))
                llm.output_processor.add_request(choice, text, None, index, queue)
            for choice in choices:
                # A choice sent after the abort of its siblings would run to its end unheard.
                if not stream.closed:
                    await llm.engine_core.add_request_async(without_stop(choice))
        except Exception as error:
            log.exception("a request could not be handed to the engine", completion=request.id)
            stream.fail(EngineDead("the engine has died") if llm.errored else error)
        except BaseException:
            self.cancel(request.id)
            raise

    def cancel(self, request_id: str) -> None:
        stream = self._finished(request_id)
        if stream is not None:
            stream.closed = True
            # Not at once: it may be vLLM's own walk through its requests that brought us here.
            abort = asyncio.get_running_loop().create_task(self._abort(request_id))
            self._aborts.add(abort)
            abort.add_done_callback(self._aborts.discard)

    def load(self) -> Load:
        return self._gauge.load

    async def died(self) -> EngineDead:
        # Ends when the engine core does, at once: a thread of vLLM's waits for that process, even when idle.
        await asyncio.wait([self._outputs])
        return EngineDead("the engine has died")

    async def close(self) -> None:
        for stream in list(self._streams.values()):
            stream.fail(EngineDead("the engine was closed"))
        await asyncio.gather(*self._aborts)
        llm, self._llm = self._llm, None
        if llm is not None:
            await self._grammars.close()
            if llm.output_handler is not None:
                # First, or it reports the engine core's end as a failure.
                llm.output_handler.cancel()
            await asyncio.to_thread(llm.shutdown, CLOSE_TIMEOUT_S)

    @property
    def _running(self) -> AsyncLLM:
        if self._llm is None:
            raise EngineDead("the engine is not running")
        return self._llm

    async def _abort(self, request_id: str) -> None:
        try:
            await self._running.abort(request_id)
        except (EngineDead, EngineDeadError):
            log.info("the engine is dead, and so is its request", completion=request_id)

    def _open(self, request: Request, prompts: Sequence[Prompt], sink: Sink) -> Stream:
        if request.id in self._streams:
            raise ValueError(f"a request with the id {request.id!r} is being generated already")
        stream = Stream(
            request,
            sink,
            self._running.get_tokenizer(),
            constrained_by=prompts[0].content.constrained_by,
            finished=self._finished,
            cancel=self.cancel,
        )
        self._streams[request.id] = stream
        return stream

    def _finished(self, request_id: str) -> Stream | None:
        """What was in flight under this id, which is no more."""
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            self._drain.freed(stream.sequences)
        return stream

    def _choices(self, request: Request, prompts: Sequence[Prompt]) -> list[EngineCoreRequest]:
        """One engine request for each choice of each prompt. Raises Refusal."""
        if request.sampling.repetition_penalty and not self._penalizes:
            raise Refusal(
                "repetition_penalty: this model's engine cannot apply it, as with speculative decoding; only"
                " 0 is accepted",
                param="repetition_penalty",
            )
        llm = self._running
        param = "prompt" if isinstance(request, Text) else "messages"
        if not all(prompt.length for prompt in prompts):
            # A prompt without a token would end the engine core.
            raise Refusal(
                f"{param}: there is no token in the prompt, and an answer needs one to follow", param=param
            )
        try:
            llm.check_admission(request.sequences, request.id)
            return [
                choice
                for prompt in prompts
                for choice in self._requests.choices(
                    request, prompt.content, fit(request.sampling, prompt, self.context_length, param=param)
                )
            ]
        except VLLMClientError as error:
            raise sampling_refusal(error, prompts[0].content.constrained_by) from error
        except GracefulHTTPError as error:
            seconds = self._drain.seconds_for(request.sequences)
            raise Refusal(error.message, status=error.http_status, retry_after=seconds) from error


class LoadGauge:
    """The load after the last step, as the schedulers of all data-parallel ranks report it."""

    def __init__(self) -> None:
        self.load = Load()
        self._ranks: dict[int, SchedulerStats] = {}

    def listener(self, config: VllmConfig, rank: int) -> StatLoggerBase:
        """What vLLM calls to make the listener to one rank's statistics."""
        return _SchedulerListener(config, rank, self)

    def record(self, rank: int, stats: SchedulerStats) -> None:
        """Take one scheduler's report of one step."""
        self._ranks[rank] = stats
        ranks = self._ranks.values()
        self.load = Load(
            running=sum(rank.num_running_reqs for rank in ranks),
            waiting=sum(rank.num_waiting_reqs + rank.num_skipped_waiting_reqs for rank in ranks),
            kv_used=sum(rank.kv_cache_usage for rank in ranks) / len(ranks),
        )


class _SchedulerListener(StatLoggerBase):
    def __init__(self, vllm_config: VllmConfig, engine_index: int, gauge: LoadGauge) -> None:
        self._rank = engine_index
        self._gauge = gauge

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        if scheduler_stats is not None:
            self._gauge.record(self._rank, scheduler_stats)

    def log_engine_initialized(self) -> None:
        """Nothing to tell: `start` returns."""


def engine_arguments(folder: Path, settings: EngineSettings) -> AsyncEngineArgs:
    """The configuration's arguments, with this platform's defaults below them and Trunkline's own above."""
    defaults = CPU_DEFAULTS if current_platform.is_cpu() else {}
    simulation: dict[str, Any] = {}
    if settings.simulation is not None:
        defaults = SIMULATION_DEFAULTS
        simulation = {
            "distributed_executor_backend": SimulatedExecutor,
            "additional_config": {"simulation": settings.simulation.model_dump()},
        }
    ours = {
        "model": str(folder),
        "served_model_name": settings.name or settings.source,
        "generation_config": "vllm",
        "reasoning_parser": settings.reasoning_parser or "",
    }
    arguments = defaults | settings.engine_args | simulation | ours
    outputs = structured_outputs(arguments.pop("structured_outputs_config", {}))
    return AsyncEngineArgs(**arguments, structured_outputs_config=outputs)


def structured_outputs(given: dict[str, Any]) -> StructuredOutputsConfig:
    """What the configuration says of structured output, over our defaults.

    Left to itself vLLM takes the backend of the first request that needs one, and no other can be given
    compact JSON. Without that, a small model writes white space until it has no tokens left.
    """
    backend = given.get("backend", "xgrammar")
    defaults = {"backend": backend, "disable_any_whitespace": backend in COMPACT_BACKENDS}
    return StructuredOutputsConfig(**defaults | given)


def configuration(settings: EngineSettings) -> VllmConfig:
    """All that vLLM is told, its model on this machine. Blocks; raises what is wrong with it."""
    folder = resolve(settings.source or "", log.info, weights=settings.simulation is None)
    config = engine_arguments(folder, settings).create_engine_config(UsageContext.OPENAI_API_SERVER)
    workers = config.parallel_config.distributed_executor_backend in WORKERS
    if current_platform.is_cpu() and workers and config.scheduler_config.enable_chunked_prefill:
        # vLLM 0.32 turns a request's random generator back for each chunk, which those of a CPU cannot do.
        raise ValueError(
            "engine_args.enable_chunked_prefill: must be false or left out on a CPU, where a seeded request"
            " whose prefill is done in chunks ends vLLM's worker"
        )
    vllm_scheduler.install(config)
    penalty = penalties.processor(config)
    if penalty is not None:
        model = config.model_config
        model.logits_processors = [*(model.logits_processors or ()), penalty]
    return config
