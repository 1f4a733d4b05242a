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
from copy import copy
from pathlib import Path
from typing import Any

import structlog
from vllm import envs
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import GracefulHTTPError, VLLMClientError, VLLMValidationError
from vllm.outputs import PoolingRequestOutput, RequestOutput
from vllm.platforms import current_platform
from vllm.renderers import ChatParams
from vllm.renderers.chat_utils import ChatTemplateResolutionError
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from serving.engine import EngineDead, FinishReason, Prompt, Refusal, Sink
from serving.messages import Load, Message, Sampling
from serving.settings import EngineSettings
from serving.source import resolve

log = structlog.get_logger(__name__)

CPU_DEFAULTS = {
    # bfloat16 was seen to give wrong text on some CPUs and to be no faster on others; compiling takes two
    # minutes of start and gains nothing.
    "dtype": "float32",
    "enforce_eager": True,
    # Left alone, vLLM takes a share of all memory.
    "kv_cache_memory_bytes": 1 << 30,
}
"""Engine arguments on a CPU where the configuration says nothing."""

COUNTED_CONTEXTS = 4
"""Prompts of up to this many context lengths are counted exactly before they are refused; a longer one is
refused from its characters, so that nobody waits for its tokens to be counted."""

CLOSE_TIMEOUT_S = 2.0
"""What the engine core gets to end by itself before it and its workers are killed. It has nothing to save."""

LEAST_TEMPERATURE = 0.01
"""vLLM raises a lower one to this, with a warning in its log for each request; so it is raised before."""

INSTEAD_OF_MINUS_ONE = (1 << 62) | (1 << 31)
"""vLLM reads the seed -1 as none. This one stands in: no request reaches both by counting up its choices,
nor do they meet where an engine looks at the low 32 bits only."""

_CHAT = ChatParams(chat_template_kwargs={"add_generation_prompt": True, "tokenize": False})
_SAMPLING_FIELDS = frozenset(Sampling.__struct_fields__)
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
        self._tasks: Any = ()

    async def start(self) -> None:
        config = await asyncio.to_thread(_configure, self._settings)
        # Blocks until the model is loaded. It has to run on the loop that it will serve.
        llm = self._llm = AsyncLLM.from_vllm_config(
            config,
            usage_context=UsageContext.OPENAI_API_SERVER,
            stat_loggers=[self._gauge.logger],
            # Of vLLM's own loggers this ends the one that writes text; Prometheus stays.
            disable_log_stats=True,
        )
        assert llm.output_handler is not None  # noqa: S101 - vLLM starts it where a loop runs
        self._outputs = llm.output_handler
        # vLLM asks for several settings per token, and each is a look into the environment until now.
        envs.enable_envs_cache()
        self._tasks = await llm.get_supported_tasks()
        self.context_length = llm.model_config.max_model_len
        await asyncio.to_thread(llm.renderer.warmup, _CHAT)

    async def render(self, messages: Sequence[Message]) -> Prompt:
        renderer = self._running.renderer
        counted = dataclasses.replace(
            renderer.default_chat_tok_params, max_total_tokens=COUNTED_CONTEXTS * self.context_length
        )
        conversation = [_conversation_message(message) for message in messages]
        try:
            _, (content,) = await renderer.render_chat_async([conversation], _CHAT, counted)
        except VLLMValidationError as error:
            raise _render_refusal(error, self.context_length) from error
        except ChatTemplateResolutionError as error:
            raise Refusal("model: it has no chat template, so it cannot chat", param="model") from error
        return Prompt(len(content["prompt_token_ids"]), content)

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
                llm.output_processor.add_request(request, None, None, index, Choice(stream, index))  # type: ignore[arg-type]
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
            # First, or it reports the engine core's end as a failure.
            self._outputs.cancel()
            await asyncio.to_thread(llm.shutdown, CLOSE_TIMEOUT_S)

    @property
    def _running(self) -> AsyncLLM:
        if self._llm is None:
            raise RuntimeError("the engine was not started")
        return self._llm

    async def _abort(self, request_id: str) -> None:
        try:
            await self._running.abort(request_id)
        except EngineDeadError:
            log.info("nothing to abort in a dead engine", completion=request_id)

    def _choices(self, request_id: str, prompt: Prompt, sampling: Sampling) -> list[EngineCoreRequest]:
        """One engine request for each choice. vLLM's own fan-out refuses temperature 0, and its seeds do
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
                request_id, prompt.content, _sampling_params(sampling), supported_tasks=self._tasks
            )
        except VLLMClientError as error:
            raise _refusal(error) from error
        except GracefulHTTPError as error:
            raise Refusal(error.message, status=error.http_status) from error
        return [_choice_request(request, sampling, choice) for choice in range(sampling.n)]


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
            return
        if reason not in _FINISH_REASONS:
            self.fail(RuntimeError(f"the engine ended a choice with {reason!r}"))
            return
        self._sink.put(choice, completion.text, len(completion.token_ids), _FINISH_REASONS[reason])
        self._unfinished -= 1
        if not self._unfinished:
            self.closed = True
            self._engine.finished(self._request_id)

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


class LoadGauge:
    """The load after the last step, as the schedulers of all data-parallel ranks report it."""

    def __init__(self) -> None:
        self.load = Load()
        self._ranks: dict[int, SchedulerStats] = {}

    def logger(self, config: VllmConfig, rank: int) -> StatLoggerBase:
        """What vLLM makes its statistics' listeners by, one for each rank."""
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


def _configure(settings: EngineSettings) -> VllmConfig:
    folder = resolve(settings.source or "", log.info)
    return engine_arguments(folder, settings).create_engine_config(UsageContext.OPENAI_API_SERVER)


def engine_arguments(folder: Path, settings: EngineSettings) -> AsyncEngineArgs:
    """The configuration's arguments, with this platform's defaults below them and Trunkline's own above."""
    defaults = CPU_DEFAULTS if current_platform.is_cpu() else {}
    arguments: dict[str, Any] = {
        **defaults,
        **settings.engine_args,
        "model": str(folder),
        "generation_config": "vllm",
    }
    return AsyncEngineArgs(**arguments)


def _conversation_message(message: Message) -> Any:
    said = {"role": message.role, "content": message.content}
    return said if message.name is None else said | {"name": message.name}


def _sampling_params(sampling: Sampling) -> SamplingParams:
    """The same for vLLM, but for the seed, which differs from choice to choice."""
    greedy_nucleus = sampling.top_p == 0
    temperature = sampling.temperature
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=max(temperature, LEAST_TEMPERATURE) if temperature else 0.0,
        # vLLM has no top_p of 0; what it would leave is the likeliest token alone.
        top_p=1.0 if greedy_nucleus else sampling.top_p,
        top_k=1 if greedy_nucleus else sampling.top_k,
        min_p=sampling.min_p,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        logit_bias=sampling.logit_bias or None,
        stop=list(sampling.stop),
        stop_token_ids=list(sampling.stop_token_ids),
        min_tokens=sampling.min_tokens,
        ignore_eos=sampling.ignore_eos,
        output_kind=RequestOutputKind.DELTA,
        skip_clone=True,  # nobody else holds it
    )


def _choice_request(request: EngineCoreRequest, sampling: Sampling, choice: int) -> EngineCoreRequest:
    seed = sampling.choice_seed(choice)
    params = copy(request.sampling_params)
    assert params is not None  # noqa: S101 - it was made from sampling parameters
    params.seed = INSTEAD_OF_MINUS_ONE if seed == -1 else seed
    child = copy(request)
    child.sampling_params = params
    InputProcessor.assign_request_id(child)
    return child


def _refusal(error: VLLMClientError) -> Refusal:
    message = str(error.args[0])
    first_word = message.partition(" ")[0]
    param = getattr(error, "parameter", None) or (first_word if first_word in _SAMPLING_FIELDS else None)
    return Refusal(message, param=param)


def _render_refusal(error: VLLMValidationError, context_length: int) -> Refusal:
    if error.parameter not in {"input_text", "input_tokens"}:
        return Refusal(f"messages: the model's chat template refuses them: {error.args[0]}", param="messages")
    return Refusal(
        f"messages: the prompt has more than {COUNTED_CONTEXTS * context_length} tokens, and with at least"
        f" one token of answer it must fit the model's context of {context_length} tokens",
        param="messages",
        code="context_length_exceeded",
    )
