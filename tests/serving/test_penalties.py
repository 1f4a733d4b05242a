# ruff: noqa: PLC0415 - vLLM takes ten seconds to import, so what needs it is imported where it is used
"""The penalty's arithmetic, and both processors in the hands of vLLM's own bookkeeping."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sampling_params import SamplingParams
    from vllm.v1.worker.gpu_input_batch import CachedRequestState

    from serving.penalties import AdditivePenaltyV1

VOCABULARY = 12
SLOTS = 4
CONTEXT = 64
MOST_DRAFTS = 3
CPU = torch.device("cpu")

# vLLM and what it imports warn of each other's deprecations.
pytestmark = pytest.mark.filterwarnings("default")

numbers = count()


@dataclass(eq=False)
class Request:
    """A request, and what has really been generated for it."""

    penalty: float
    prompt: list[int] | None
    outputs: list[int] = field(default_factory=list)
    id: str = field(default_factory=lambda: str(next(numbers)))

    @property
    def history(self) -> list[int]:
        return [*(self.prompt or ()), *self.outputs]

    @property
    def params(self) -> SamplingParams:
        from vllm.sampling_params import SamplingParams

        from serving.penalties import PENALTY

        return SamplingParams(temperature=0.0, extra_args={PENALTY: self.penalty} if self.penalty else None)


@dataclass(frozen=True)
class Step:
    """What one engine step does. Requests are named by their place among those that run; or nobody is."""

    set_back: int
    """Who loses its last outputs, in a runner that knows of this."""
    ended: int
    preempted: int
    resumes: bool
    joining: list[Request]
    order: list[int]
    sampled: list[int | None]
    """By place. None where only a part of the prompt was read, so that nothing was sampled."""


places = st.integers(0, 2 * SLOTS - 1)
tokens = st.integers(0, VOCABULARY - 1)
penalties = st.sampled_from([0.0, 0.1, 2.0, -0.3])
# With ids that the logits do not have, as padding and added tokens may be.
prompts = st.lists(st.integers(0, VOCABULARY + 2), min_size=1, max_size=8)


def runs(prompts: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Step]]:
    """Some steps of an engine, for requests with such prompts."""
    step = st.builds(
        Step,
        set_back=places,
        ended=places,
        preempted=places,
        resumes=st.booleans(),
        joining=st.lists(st.builds(Request, penalties, prompts), max_size=3),
        order=st.permutations(range(SLOTS)),
        sampled=st.lists(tokens | st.none(), min_size=SLOTS, max_size=SLOTS),
    )
    return st.lists(step, min_size=4, max_size=12)


class Schedule:
    """Who runs, as vLLM's scheduler might have it."""

    def __init__(self) -> None:
        self.running: list[Request] = []
        self._preempted: list[Request] = []

    def begin(self, step: Step) -> tuple[list[Request], list[Request]]:
        """Who leaves the batch, and who joins it, for the first time or again."""
        ended = self.running[step.ended : step.ended + 1]
        preempted = self.running[step.preempted : step.preempted + 1] if step.preempted != step.ended else []
        self.running = [request for request in self.running if request not in ended + preempted]
        waiting = step.joining + self._preempted * step.resumes
        added = waiting[: SLOTS - len(self.running)]
        self.running += added
        self._preempted = [request for request in self._preempted if request not in added] + preempted
        return ended + preempted, added

    def finish(self, step: Step) -> dict[str, int]:
        """Give each request its token; returns them by request."""
        sampled = {}
        for request, token in zip(self.running, step.sampled, strict=False):
            if token is not None:
                request.outputs.append(token)
                sampled[request.id] = token
        return sampled


def penalised(logits: torch.Tensor, penalty: float, history: Sequence[int]) -> torch.Tensor:
    """One row's logits after the penalty, by its definition."""
    expected = logits.clone()
    for token, times in Counter(history).items():
        if 0 <= token < len(expected):
            expected[token] -= torch.tensor(penalty) * times
    return expected


def random_logits(rows: int) -> torch.Tensor:
    """Logits of which some are banned, as a grammar bans them."""
    logits = 10 * torch.randn(rows, VOCABULARY)
    return logits.masked_fill_(torch.rand_like(logits) < 0.2, -torch.inf)


def v1_processor() -> AdditivePenaltyV1:
    """The processor for the V1 runner, which takes no interest in vLLM's configuration."""
    from serving.penalties import AdditivePenaltyV1

    config: Any = None
    return AdditivePenaltyV1(config, CPU, is_pin_memory=False)


class V1Runner:
    """vLLM's own batch for its V1 runner, with the steps of that runner that touch it."""

    def __init__(self, *, late: bool = False) -> None:
        from vllm.v1.sample.logits_processor import LogitsProcessors
        from vllm.v1.worker.gpu_input_batch import InputBatch

        self._late = late
        self._states: dict[str, CachedRequestState] = {}
        self._processor = v1_processor()
        self.batch = InputBatch(
            max_num_reqs=SLOTS,
            max_model_len=CONTEXT,
            max_num_batched_tokens=CONTEXT,
            device=CPU,
            vocab_size=VOCABULARY,
            block_sizes=[CONTEXT],
            max_num_blocks_per_req=[1],
            logitsprocs=LogitsProcessors([self._processor]),
            logitsprocs_need_output_token_ids=True,
        )

    def begin(
        self, removed: Sequence[Request], added: Sequence[Request], order: Sequence[int] = (0, 0)
    ) -> None:
        """What happens to the batch before a forward pass."""
        for request in removed:
            self.batch.remove_request(request.id)
        for request in added:
            self.batch.add_request(self._state(request))
        self.batch.condense()
        if max(order[:2]) < self.batch.num_reqs:
            self.batch.swap_states(*order[:2])
        self.batch.refresh_metadata()  # type: ignore[no-untyped-call]

    def set_back(self, request: Request) -> None:
        """Lose the last two outputs of a request, as happens when KV blocks could not be fetched."""
        del request.outputs[-2:]
        del self._states[request.id].output_token_ids[len(request.outputs) :]

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        self.batch.update_async_output_token_ids()
        return self._processor.apply(logits)

    def finish(self, sampled: Mapping[str, int]) -> None:
        """Keep the tokens; or only room for them, if they come late, at the time of the next sampling."""
        for name, token in sampled.items():
            self._states[name].output_token_ids.append(-1 if self._late else token)
        if self._late:
            self.batch.prev_req_id_to_index = {name: self.batch.req_id_to_index[name] for name in sampled}
            rows = [[sampled.get(name, -1)] for name in self.batch.req_ids]
            self.batch.set_async_sampled_token_ids(torch.tensor(rows), torch.Event("cpu"))

    def _state(self, request: Request) -> CachedRequestState:
        from vllm.v1.worker.gpu_input_batch import CachedRequestState

        if request.id not in self._states:
            self._states[request.id] = CachedRequestState(
                req_id=request.id,
                prompt_token_ids=request.prompt,
                prompt_embeds=torch.zeros(3, 1) if request.prompt is None else None,
                mm_features=[],
                sampling_params=request.params,
                generator=None,
                block_ids=([0],),
                num_computed_tokens=0,
                output_token_ids=[],
            )
        state = self._states[request.id]
        if self._late:
            state.output_token_ids = list(request.outputs)
        return state


@given(run=runs(prompts | st.none()), late=st.booleans())
def test_v1_follows_its_batch(run: list[Step], late: bool) -> None:
    """Whoever joins, leaves, is preempted, resumes, moves, swaps or is set back, and however late the tokens
    become known: every logit falls by penalty times count, to the last bit."""
    schedule, runner = Schedule(), V1Runner(late=late)
    for step in run:
        for request in schedule.running[step.set_back : step.set_back + 1]:
            runner.set_back(request)
        runner.begin(*schedule.begin(step), step.order)
        logits = random_logits(len(schedule.running))
        result = runner.apply(logits.clone())
        for request in schedule.running:
            row = runner.batch.req_id_to_index[request.id]
            assert torch.equal(result[row], penalised(logits[row], request.penalty, request.history))
        runner.finish(schedule.finish(step))


@dataclass(frozen=True)
class Part:
    """A request in a V2 runner's batch: how many of its tokens it has read, and the drafts after these."""

    request: Request
    read: int
    drafts: list[int]

    @property
    def rows(self) -> list[tuple[Part, int]]:
        """The rows, each with the number of drafts that it looks back on."""
        return [(self, drafts) for drafts in range(1 + len(self.drafts))]


class V2Runner:
    """What vLLM's V2 runner hands to a processor. Its own buffers need pinned memory and Triton: here they
    are plain tensors.
    """

    def __init__(self) -> None:
        from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcRequestState

        from serving.penalties import AdditivePenaltyV2

        self._free = list(range(SLOTS))
        self._slots: dict[str, int] = {}
        self._tokens = torch.randint(VOCABULARY, (SLOTS, CONTEXT), dtype=torch.int32)
        all_token_ids: Any = SimpleNamespace(gpu=self._tokens)
        unread: Any = None
        states = LogitsProcRequestState(CPU, SLOTS, VOCABULARY, all_token_ids, unread, unread, unread)
        config: Any = SimpleNamespace(num_speculative_tokens=MOST_DRAFTS)
        self._processor = AdditivePenaltyV2(config, states)

    def begin(self, removed: Sequence[Request], added: Sequence[Request]) -> None:
        """What happens to the slots before a forward pass."""
        self._free += [self._slots.pop(request.id) for request in removed]
        for request in added:
            slot = self._slots[request.id] = self._free.pop()
            assert self._processor.add_request(slot, request.params) == (request.penalty != 0)
            self.commit(request)
        self._processor.apply_staged_writes()

    def apply(self, logits: torch.Tensor, parts: Sequence[Part]) -> torch.Tensor:
        from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext

        slots = np.array([self._slots[part.request.id] for part in parts], dtype=np.int32)
        rows = [row for part in parts for row in part.rows]
        # With drafts the host has but an upper bound; and its array is longer than the batch.
        bounds = [part.read + (MOST_DRAFTS if part.drafts else 0) for part in parts]
        context = LogitsContext(
            idx_mapping=torch.from_numpy(slots),
            idx_mapping_np=slots,
            expanded_idx_mapping=torch.tensor(
                [self._slots[part.request.id] for part, _ in rows], dtype=torch.int32
            ),
            expanded_local_pos=torch.tensor([drafts for _, drafts in rows], dtype=torch.int32),
            input_ids=torch.tensor(
                [
                    part.drafts[drafts - 1] if drafts else part.request.history[part.read - 1]
                    for part, drafts in rows
                ],
                dtype=torch.int32,
            ),
            pos=torch.tensor([part.read + drafts - 1 for part, drafts in rows]),
            seq_lens_upper_bound_np=np.array([*bounds, 0], dtype=np.int32),
        )
        return self._processor.apply(logits, context)

    def commit(self, request: Request) -> None:
        """Write down the tokens of a request that are certain."""
        history = request.history
        self._tokens[self._slots[request.id], : len(history)] = torch.tensor(history, dtype=torch.int32)


@given(run=runs(prompts), data=st.data())
def test_v2_follows_its_batch(run: list[Step], data: st.DataObject) -> None:
    """Whichever slot a request is in, wherever its rows stand and however many drafts they verify: every
    logit falls by penalty times count, to the last bit."""
    schedule, runner = Schedule(), V2Runner()
    for step in run:
        runner.begin(*schedule.begin(step))
        parts = [
            Part(
                request, len(request.history), data.draw(st.lists(tokens | st.just(-1), max_size=MOST_DRAFTS))
            )
            if token is not None
            else Part(request, data.draw(st.integers(1, len(request.history))), [])
            for request, token in zip(schedule.running, step.sampled, strict=False)
        ]
        parts = [parts[place] for place in step.order if place < len(parts)]
        rows = [row for part in parts for row in part.rows]
        logits = random_logits(len(rows))
        result = runner.apply(logits.clone(), parts)
        for after, before, (part, drafts) in zip(result, logits, rows, strict=True):
            seen = part.request.history[: part.read] + part.drafts[:drafts]
            assert torch.equal(after, penalised(before, part.request.penalty, seen))
        schedule.finish(step)
        for request in schedule.running:
            runner.commit(request)


def test_counts_are_exact() -> None:
    """The penalty of a token that stands ten thousand times is not a sum of ten thousand roundings, and no
    logit but those of the history's tokens changes."""
    from serving.penalties import subtract_counts

    logits = random_logits(3)
    result = logits.clone()
    history = torch.tensor([5] * 10_000 + [7])
    subtract_counts(result, torch.tensor([9.0, 0.1, 9.0]), torch.ones_like(history), history)
    logits[1] = penalised(logits[1], 0.1, history.tolist())
    assert torch.equal(result, logits)


def test_logits_cut_to_the_vocabulary() -> None:
    """Logits may be a part of wider rows, as they are where vLLM has padded the vocabulary."""
    from vllm.v1.sample.logits_processor import BatchUpdate

    padded = torch.randn(2, VOCABULARY + 4)
    before = padded.clone()
    request = Request(0.5, [1, 2, 2, VOCABULARY])
    processor = v1_processor()
    processor.update_state(BatchUpdate(1, [], [(1, request.params, request.prompt, [])], []))
    result = processor.apply(padded[:, :VOCABULARY])
    assert torch.equal(result[0], before[0, :VOCABULARY])
    assert torch.equal(result[1], penalised(before[1, :VOCABULARY], 0.5, request.history))


def test_unused_touches_nothing() -> None:
    """In a batch without a penalty neither processor looks at the logits, though there was one before."""
    first, second = Request(1.0, [1]), Request(0.0, [1])
    untouchable: Any = object()
    one, two = V1Runner(), V2Runner()
    one.begin([], [first, second])
    one.begin([first], [])
    assert one.apply(untouchable) is untouchable
    two.begin([], [first, second])
    two.begin([first], [])
    assert two.apply(untouchable, [Part(second, 1, [])]) is untouchable


TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 1,
    "num_hidden_layers": 1,
}
NGRAM = {"method": "ngram", "num_speculative_tokens": MOST_DRAFTS, "prompt_lookup_max": 3}


@pytest.fixture
def configure(tmp_path: Path) -> Iterator[Callable[..., VllmConfig]]:
    """Makes vLLM's configuration for a tiny model from engine arguments. vLLM adds to the environment."""
    from vllm import EngineArgs

    (tmp_path / "config.json").write_text(json.dumps(TINY))

    def configure(**arguments: Any) -> VllmConfig:
        return EngineArgs(str(tmp_path), skip_tokenizer_init=True, **arguments).create_engine_config()

    with patch.dict(os.environ):
        yield configure


@pytest.mark.parametrize("arguments", [{}, {"speculative_config": NGRAM}, {"runner": "pooling"}])
def test_processor_is_what_the_v1_runner_takes(
    configure: Callable[..., VllmConfig], arguments: dict[str, Any]
) -> None:
    """The V1 runner loads the processor that is named for it, and where none is named it refuses any."""
    from vllm.v1.sample.logits_processor import build_logitsprocs

    from serving.penalties import AdditivePenaltyV1, processor

    config = configure(**arguments)
    pooling = config.model_config.runner_type == "pooling"
    name = processor(config)
    if name is None:
        with pytest.raises(ValueError, match=r"[Cc]ustom logits processors"):
            build_logitsprocs(config, CPU, False, pooling, [AdditivePenaltyV1])
    else:
        loaded = build_logitsprocs(config, CPU, False, pooling, [name])
        assert AdditivePenaltyV1 in map(type, loaded.all)


@pytest.mark.parametrize("arguments", [{}, {"speculative_config": NGRAM}])
def test_processor_is_what_the_v2_runner_takes(
    configure: Callable[..., VllmConfig], arguments: dict[str, Any]
) -> None:
    """The V2 runner loads the processor that is named for it, with speculative decoding too."""
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu.sample.logits_processor import build_custom_logits_processors_params_validator

    from serving.penalties import AdditivePenaltyV2, processor

    config = configure(**arguments)
    with patch.object(VllmConfig, "use_v2_model_runner", True):
        name = processor(config)
    assert name == f"{AdditivePenaltyV2.__module__}:{AdditivePenaltyV2.__name__}"
    build_custom_logits_processors_params_validator([name])
