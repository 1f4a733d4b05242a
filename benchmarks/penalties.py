"""What the additive repetition penalty adds to a step of vLLM's sampler: `python -m benchmarks.penalties`.

No model runs: the V1 runner's own batch and sampler take random logits, greedily. The cases take turns, so
that whatever else the machine does falls on all of them.
"""

from __future__ import annotations

import argparse
import os
from statistics import median
from time import perf_counter

from benchmarks.rows import Row, table
from serving.engines import VLLM_ENVIRONMENT

os.environ.update(VLLM_ENVIRONMENT)

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.sampler import Sampler
from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch

from serving.penalties import PENALTY, AdditivePenaltyV1

CPU = torch.device("cpu")


class Case:
    """A full batch of requests with the same sampling parameters."""

    def __init__(self, options: argparse.Namespace, params: SamplingParams, *, installed: bool) -> None:
        context = options.tokens + options.steps
        processors = [AdditivePenaltyV1(None, CPU, is_pin_memory=False)] if installed else []  # type: ignore[arg-type]
        self._batch = InputBatch(
            max_num_reqs=options.batch,
            max_model_len=context,
            max_num_batched_tokens=context,
            device=CPU,
            vocab_size=options.vocabulary,
            block_sizes=[context],
            max_num_blocks_per_req=[1],
            logitsprocs=LogitsProcessors(processors),
            logitsprocs_need_output_token_ids=installed,
        )
        self._sampler = Sampler()
        self._outputs: list[list[int]] = [[] for _ in range(options.batch)]
        for number, outputs in enumerate(self._outputs):
            prompt = torch.randint(options.vocabulary, (options.tokens,)).tolist()
            self._batch.add_request(
                CachedRequestState(str(number), prompt, [], params, None, ([0],), 0, outputs)
            )

    def step(self, logits: torch.Tensor) -> float:
        """Sample once; returns the seconds that it took."""
        began = perf_counter()
        self._batch.refresh_metadata()  # type: ignore[no-untyped-call]
        sampled = self._sampler(logits, self._batch.sampling_metadata).sampled_token_ids
        for outputs, (token,) in zip(self._outputs, sampled.tolist(), strict=True):
            outputs.append(token)
        return perf_counter() - began


def measure(options: argparse.Namespace) -> list[Row]:
    """The median step of each case, and by how much it is longer than that without the processor."""
    plain = SamplingParams(temperature=0.0)
    penalised = SamplingParams(temperature=0.0, extra_args={PENALTY: 0.5})
    cases = {
        "not installed": Case(options, plain, installed=False),
        "installed, unused": Case(options, plain, installed=True),
        "used by all": Case(options, penalised, installed=True),
        "vLLM's frequency penalty": Case(
            options, SamplingParams(temperature=0.0, frequency_penalty=0.5), installed=False
        ),
    }
    logits = torch.randn(options.batch, options.vocabulary)
    rounds = [[case.step(logits.clone()) for case in cases.values()] for _ in range(options.steps)]
    medians = dict(zip(cases, map(median, zip(*rounds, strict=True)), strict=True))
    without = medians["not installed"]
    return [
        row
        for name, seconds in medians.items()
        for row in (Row(name, seconds * 1e3, "ms"), Row("  ratio", seconds / without, ""))
    ]


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64, help="requests in the batch")
    parser.add_argument("--vocabulary", type=int, default=49152, help="tokens in the vocabulary")
    parser.add_argument("--tokens", type=int, default=1000, help="tokens in each prompt")
    parser.add_argument("--steps", type=int, default=200, help="steps to take the median of")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(table(measure(options)))


if __name__ == "__main__":
    main()
