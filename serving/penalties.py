"""The additive repetition penalty as a vLLM logits processor.

Every token's logit falls by its request's penalty times the number of times that the token stands in the
prompt and the generated text. vLLM's own `repetition_penalty` is another: multiplicative, neutral at 1.

vLLM has two model runners, each with an interface of its own for such processors. There is a class for each
below; both only say which tokens stand in the history of which row, and `subtract_counts` does the rest.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.sample.logits_processor import interface as v1
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor import interface as v2

PENALTY = "trunkline_repetition_penalty"
"""The key in `SamplingParams.extra_args` under which a request carries its penalty, a float."""

NO_TOKEN = -1
"""An id that `subtract_counts` passes over."""


def processor(config: VllmConfig) -> str | None:
    """What to put into vLLM's `logits_processors`, for the model runner that it will choose. None where it
    runs no custom processor: with speculative decoding on V1, and for models that do not make token after
    token.
    """
    model = config.model_config
    if model.runner_type == "pooling" or model.is_diffusion:
        return None
    if config.use_v2_model_runner:
        return f"{__name__}:{AdditivePenaltyV2.__name__}"
    return None if config.speculative_config else f"{__name__}:{AdditivePenaltyV1.__name__}"


def penalty_of(params: SamplingParams) -> float:
    """The penalty that a request carries; 0, which is neutral, if none."""
    return float((params.extra_args or {}).get(PENALTY, 0.0))


def subtract_counts(
    logits: torch.Tensor, penalties: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor
) -> None:
    """Take from each logit, in place, its row's penalty times the count of its token in the row's history.

    logits: [batch, vocabulary], float32, contiguous. penalties: [batch], float32. rows and tokens: [n],
    integers, for each token of each history, in any order: its row and its id. An id outside the vocabulary
    is passed over. Takes time and memory for n tokens, whatever the vocabulary, and never waits for the
    device.
    """
    vocabulary = logits.shape[1]
    counted = (tokens >= 0) & (tokens < vocabulary)
    rows = rows.long()
    places = rows * vocabulary + torch.where(counted, tokens, 0)
    flat = logits.view(-1)
    before = flat.gather(0, places)
    # For a moment the logits' own places hold the counts: whole numbers, which float32 adds exactly, up to
    # 2^24, and so in any order. A place that is named several times is given the same value each time.
    flat.index_fill_(0, places, 0.0)
    flat.scatter_add_(0, places, counted.to(flat.dtype))
    counts = flat.gather(0, places)
    flat.scatter_(0, places, before - penalties[rows] * counts)


class AdditivePenaltyV1(v1.LogitsProcessor):
    """For the V1 runner, which reports changes of its batch and keeps the token ids in lists on the host."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:  # noqa: FBT001 - vLLM's interface
        self._device = device
        self._histories: dict[int, History] = {}
        """Of the penalised requests, by row."""

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: v1.BatchUpdate | None) -> None:
        process_dict_updates(self._histories, batch_update, History.begin)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        if not self._histories:
            return logits
        penalties = np.zeros(len(logits), np.float32)
        for row, history in self._histories.items():
            penalties[row] = history.penalty
            # Not before: under async scheduling the last step's tokens become known after `update_state`.
            history.catch_up()
        histories = [history.tokens for history in self._histories.values()]
        rows = np.repeat(list(self._histories), [len(tokens) for tokens in histories])
        parts = (penalties, rows, np.concatenate(histories))
        logits = logits.contiguous()  # it is not where vLLM has cut a padded vocabulary to its size
        subtract_counts(logits, *(async_tensor_h2d(part, self._device) for part in parts))
        return logits


class History:
    """The token ids of one penalised request, on the V1 runner."""

    __slots__ = ("_outputs", "_prompt_length", "penalty", "tokens")

    def __init__(self, penalty: float, prompt: Sequence[int], outputs: list[int]) -> None:
        self.penalty = penalty
        self.tokens = array("i", prompt)
        """Prompt and output as of the last `catch_up`."""
        self._prompt_length = len(prompt)
        self._outputs = outputs  # the runner's own list, which it goes on changing

    @classmethod
    def begin(cls, params: SamplingParams, prompt: list[int] | None, outputs: list[int]) -> History | None:
        """For a request that joins the batch, again perhaps; None if it has no penalty. A prompt that came as
        embeddings has no token ids, so only its output counts.
        """
        penalty = penalty_of(params)
        return cls(penalty, prompt or (), outputs) if penalty else None

    def catch_up(self) -> None:
        """Drop what the runner has taken back of its output, and add what is new."""
        tokens = self.tokens
        del tokens[self._prompt_length + len(self._outputs) :]
        tokens.extend(self._outputs[len(tokens) - self._prompt_length :])


class AdditivePenaltyV2(v2.LogitsProcessor):
    """For the V2 runner, which keeps the token ids on the device, in a slot for each request.

    They are read there at each step, by default over the bus, and take some hundred bytes a token for the
    moment. Penalised histories of millions of tokens would want counts that are kept from step to step.
    """

    def __init__(self, vllm_config: VllmConfig, req_states: v2.LogitsProcRequestState) -> None:
        self._states = req_states
        self._most_rows = 1 + vllm_config.num_speculative_tokens
        self._penalties = np.zeros(req_states.max_num_reqs, np.float32)
        self._changed = True
        self.apply_staged_writes()

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        penalty = penalty_of(sampling_params)
        self._changed |= bool(self._penalties[req_idx] != penalty)
        self._penalties[req_idx] = penalty
        return bool(penalty)

    def apply_staged_writes(self) -> None:
        if self._changed:
            # A copy, or on a CPU the tensor would be the array.
            self._penalties_on_device = async_tensor_h2d(self._penalties.copy(), self._states.device)
            self._changed = False

    def apply(self, logits: torch.Tensor, ctx: v2.LogitsContext) -> torch.Tensor:
        slots = ctx.idx_mapping_np
        penalised = self._penalties[slots] != 0
        if penalised.any():
            # vLLM pads the lengths behind the batch. A request has one row, but for drafts to be verified.
            at_most = int(ctx.seq_lens_upper_bound_np[: len(slots)][penalised].sum())
            if len(logits) > len(slots):
                at_most *= self._most_rows
            subtract_counts(logits, *self._histories(ctx, at_most))
        return logits

    def _histories(
        self, ctx: v2.LogitsContext, at_most: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What `subtract_counts` takes: penalties [rows]; rows and tokens [at_most]. The histories stand one
        after another. Only the device knows their lengths, so what is left behind them is NO_TOKEN.
        """
        slots = ctx.expanded_idx_mapping.long()
        penalties = self._penalties_on_device[slots]
        lengths = torch.where(penalties != 0, ctx.pos + 1, 0)
        ends = lengths.cumsum(0)
        index = torch.arange(at_most, device=ends.device)
        rows = torch.searchsorted(ends, index, right=True).clamp_(max=len(slots) - 1)
        positions = index - (ends - lengths)[rows]
        within = positions < lengths[rows]
        positions = torch.where(within, positions, 0)
        committed = self._states.all_token_ids.gpu[slots[rows], positions]
        # A draft is not among them. It is the input of a row, and the rows of a request stand in order.
        back = ctx.pos[rows] - positions
        drafted = back < ctx.expanded_local_pos[rows]
        drafts = ctx.input_ids[torch.where(drafted, rows - back, rows)]
        tokens = torch.where(drafted, drafts, committed)
        return penalties, rows, torch.where(within, tokens, NO_TOKEN)
