"""vLLM behind the `Engine` protocol.

One `AsyncLLM`, whose scheduler and workers are processes of their own. vLLM hands each output to its
request's queue object by calling `put`; here that object is the way to our sink, so an output costs no
task switch. Requests go in below `AsyncLLM.generate`, by the two calls that it makes itself.

Import this module only through `serving.engines`, which sets the environment first.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import structlog
from vllm import envs
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import GracefulHTTPError, VLLMClientError, VLLMValidationError
from vllm.outputs import PoolingRequestOutput, RequestOutput
from vllm.platforms import current_platform
from vllm.renderers import BaseRenderer, ChatParams
from vllm.renderers.chat_utils import ChatTemplateResolutionError
from vllm.tasks import SupportedTask
from vllm.usage.usage_lib import UsageContext
from vllm.utils.mistral import is_mistral_tokenizer
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import RequestOutputCollector
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from serving.engine import EngineDead, FinishReason, Prompt, Refusal, Sink
from serving.messages import Load, Message, Sampling
from serving.settings import EngineSettings
from serving.source import resolve
from serving.vllm_requests import (
    COUNTED_CONTEXTS,
    choice_request,
    conversation_message,
    prompt_refusal,
    sampling_params,
    sampling_refusal,
)

log = structlog.get_logger(__name__)

CPU_DEFAULTS = {
    # bfloat16 was seen to give wrong text on one CPU and to be no faster on another; compiling takes two
    # minutes of start.
    "dtype": "float32",
    "enforce_eager": True,
    # Left alone, vLLM takes a share of all memory.
    "kv_cache_memory_bytes": 1 << 30,
}
"""Engine arguments on a CPU where the configuration says nothing."""

CLOSE_TIMEOUT_S = 2.0
"""What the engine core gets to end by itself before it and its workers are killed. It has nothing to save."""

_FINISH_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


class VllmEngine:
    """An `Engine` that runs a model on vLLM."""

    def __init__(self, settings: EngineSettings) -> None:
        self.context_length = 0
        self._settings = settings
        self._gauge = LoadGauge()
        self._streams: dict[str, Stream] = {}
        self._aborts: set[asyncio.Task[None]] = set()
        self._llm: AsyncLLM | None = None
        self._outputs: asyncio.Task[Any]
        self._renderer: ChatRenderer
        self._tasks: tuple[SupportedTask, ...]

    async def start(self) -> None:
        config = await asyncio.to_thread(_configure, self._settings)
        # Blocks until the model is loaded. It has to be made on the loop that it will run on.
        llm = self._llm = AsyncLLM.from_vllm_config(
            config,
            usage_context=UsageContext.OPENAI_API_SERVER,
            stat_loggers=[self._gauge.listener],
            # Of vLLM's own listeners this ends the one that writes text; Prometheus stays.
            disable_log_stats=True,
        )
        assert llm.output_handler is not None  # noqa: S101 - vLLM starts it where a loop runs
        self._outputs = llm.output_handler
        # vLLM asks for several settings per token, and until now each is a look into the environment.
        envs.enable_envs_cache()
        self._tasks = await llm.get_supported_tasks()
        self.context_length = llm.model_config.max_model_len
        self._renderer = ChatRenderer(llm.renderer, self.context_length)
        await asyncio.to_thread(self._renderer.warm_up)

    async def render(self, messages: Sequence[Message]) -> Prompt:
        return await self._renderer.render(messages)

    async def generate(self, request_id: str, prompt: Prompt, sampling: Sampling, sink: Sink) -> None:
        llm = self._running
        if llm.errored:
            raise EngineDead("the engine has died")
        requests = self._choices(request_id, prompt, sampling)
        stream = self._streams[request_id] = Stream(self, request_id, sink, len(requests))
        sink.accepted()
        try:
            for index, request in enumerate(requests):
                # vLLM asks nothing of a queue but `put`.
                queue = cast("RequestOutputCollector", Choice(stream, index))
                llm.output_processor.add_request(request, None, None, index, queue)
            for request in requests:
                # A choice sent after the abort of its siblings would run to its end unheard.
                if not stream.closed:
                    await llm.engine_core.add_request_async(request)
        except Exception as error:
            log.exception("a request could not be handed to the engine", completion=request_id)
            stream.fail(EngineDead("the engine has died") if llm.errored else error)
        except BaseException:
            self.cancel(request_id)
            raise

    def cancel(self, request_id: str) -> None:
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            stream.closed = True
            # Not at once: it may be vLLM's own walk through its requests that brought us here.
            abort = asyncio.get_running_loop().create_task(self._abort(request_id))
            self._aborts.add(abort)
            abort.add_done_callback(self._aborts.discard)

    def finished(self, request_id: str) -> None:
        """The last choice of a request has ended by itself; called by its stream."""
        self._streams.pop(request_id, None)

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

    def _choices(self, request_id: str, prompt: Prompt, sampling: Sampling) -> list[EngineCoreRequest]:
        """One engine request for each choice; vLLM's own fan-out refuses temperature 0, and its seeds do
        not wrap. Raises Refusal.
        """
        if request_id in self._streams:
            raise ValueError(f"a request with the id {request_id!r} is being generated already")
        if sampling.repetition_penalty:
            raise Refusal(
                "repetition_penalty: this model's engine does not apply it yet; only 0 is accepted",
                param="repetition_penalty",
            )
        llm = self._running
        try:
            llm.check_admission(sampling.n, request_id)
            request = llm.input_processor.process_inputs(
                request_id, prompt.content, sampling_params(sampling), supported_tasks=self._tasks
            )
        except VLLMClientError as error:
            raise sampling_refusal(error) from error
        except GracefulHTTPError as error:
            raise Refusal(error.message, status=error.http_status) from error
        return [choice_request(request, sampling, choice) for choice in range(sampling.n)]


class Stream:
    """One request in flight: where its output goes, until its last choice has ended or it is cancelled."""

    __slots__ = ("_begun", "_engine", "_request_id", "_sink", "_unfinished", "closed")

    def __init__(self, engine: VllmEngine, request_id: str, sink: Sink, choices: int) -> None:
        self.closed = False
        """Once true, the sink hears nothing more."""
        self._engine = engine
        self._request_id = request_id
        self._sink = sink
        self._unfinished = choices
        self._begun = False

    def put(self, choice: int, output: RequestOutput) -> None:
        """Pass on what one engine step made for one choice."""
        if not self._begun:
            self._begun = True
            self._sink.cached_tokens = output.num_cached_tokens or 0
        completion = output.outputs[0]
        reason = completion.finish_reason
        if reason is None:
            self._sink.put(choice, completion.text, len(completion.token_ids), None)
        elif reason in _FINISH_REASONS:
            self._sink.put(choice, completion.text, len(completion.token_ids), _FINISH_REASONS[reason])
            self._unfinished -= 1
            if not self._unfinished:
                self.closed = True
                self._engine.finished(self._request_id)
        else:
            self.fail(RuntimeError(f"the engine ended a choice with {reason!r}"))

    def fail(self, error: Exception) -> None:
        """Give up on all choices and tell the sink, once."""
        if not self.closed:
            self._engine.cancel(self._request_id)
            self._sink.fail(error)


class Choice:
    """What vLLM takes for the queue of one choice's request."""

    __slots__ = ("_index", "_stream")

    def __init__(self, stream: Stream, index: int) -> None:
        self._stream = stream
        self._index = index

    def put(self, output: RequestOutput | PoolingRequestOutput | Exception) -> None:
        """Called by vLLM on the event loop. An exception from here would end the output of every request."""
        if self._stream.closed:
            return
        try:
            if isinstance(output, RequestOutput):
                self._stream.put(self._index, output)
            else:
                self._stream.fail(EngineDead("the engine has died"))
        except Exception as error:
            log.exception("a sink failed")
            self._stream.fail(error)


class ChatRenderer:
    """Messages to prompt tokens, under the model's chat template and off the event loop."""

    def __init__(self, renderer: BaseRenderer[Any], context_length: int) -> None:
        self._renderer = renderer
        self._context_length = context_length
        # A template gives text, which is then tokenized; Mistral's tokenizers give tokens at once.
        tokenize = is_mistral_tokenizer(renderer.tokenizer)
        self._template = ChatParams(
            chat_template_kwargs={"add_generation_prompt": True, "tokenize": tokenize}
        )
        self._counting = dataclasses.replace(
            renderer.default_chat_tok_params, max_total_tokens=COUNTED_CONTEXTS * context_length
        )

    def warm_up(self) -> None:
        """Compile the template, so that the first request does not wait for it."""
        self._renderer.warmup(self._template)

    async def render(self, messages: Sequence[Message]) -> Prompt:
        """Raises Refusal: the template's, or one for a prompt far longer than the context."""
        conversation: Any = [conversation_message(message) for message in messages]
        try:
            _, (content,) = await self._renderer.render_chat_async(
                [conversation], self._template, self._counting
            )
        except VLLMValidationError as error:
            raise prompt_refusal(error, self._context_length) from error
        except ChatTemplateResolutionError as error:
            raise Refusal("model: it has no chat template, so it cannot chat", param="model") from error
        return Prompt(len(content["prompt_token_ids"]), content)


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
    defaults: dict[str, Any] = CPU_DEFAULTS if current_platform.is_cpu() else {}
    ours = {
        "model": str(folder),
        "served_model_name": settings.name or settings.source,
        "generation_config": "vllm",
    }
    return AsyncEngineArgs(**defaults | settings.engine_args | ours)


def _configure(settings: EngineSettings) -> VllmConfig:
    folder = resolve(settings.source or "", log.info)
    return engine_arguments(folder, settings).create_engine_config(UsageContext.OPENAI_API_SERVER)
