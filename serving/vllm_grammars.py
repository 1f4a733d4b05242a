"""Constraints on an answer, tried out before vLLM's engine gets them.

The engine compiles a grammar in a thread that nothing can stop, in the process that makes every request's
tokens. What has gone through here it compiles too, in about the same time.

Import this module only through `serving.engines`, which sets the environment first.
"""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec
import structlog
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams, check_json_nesting
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.structured_output.backend_types import StructuredOutputOptions
from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

from serving import grammars
from serving.drain import DrainRate
from serving.engine import Refusal
from serving.grammars import READY, Trial

log = structlog.get_logger(__name__)

REMEMBERED = 1024
"""Trials whose outcome is kept: most schemas come again and again."""

MOST_TRIALS = 64
"""Schemas that may wait to be tried. Each of them may take as long as a trial may."""


@dataclass(slots=True)
class _Trying:
    """A trial that is going on or waits for its turn."""

    outcome: asyncio.Future[str | None]
    waiters: int = 0


class Grammars:
    """The trials of one engine, one at a time, in a program that is started with the first."""

    def __init__(self, config: VllmConfig) -> None:
        self._config = config
        self._outputs = config.structured_outputs_config
        # The other backends take bounded time, or are somebody's own choice; auto is mostly this one.
        self._tries = self._outputs.backend in {"xgrammar", "auto"}
        self._thread = ThreadPoolExecutor(1, "grammars")
        self._process: subprocess.Popen[bytes] | None = None
        self._trials: dict[bytes, _Trying] = {}
        self._drain = DrainRate()
        self._outcomes: dict[bytes, str | None] = {}

    async def check(self, constraint: StructuredOutputsParams, param: str) -> None:
        """Raises Refusal, for the field `param`, where the engine could not hold an answer to this."""
        try:
            check_json_nesting(constraint.json)
            check_json_nesting(constraint.structural_tag, structural_tag=True)
        except VLLMValidationError as error:
            raise Refusal(f"{param}: {error.args[0]}", param=param) from error
        trial = self._trial(constraint)
        flaw = None if trial is None else await self._outcome(trial)
        if flaw is not None:
            raise Refusal(f"{param}: {flaw}", param=param)

    async def close(self) -> None:
        """End the program, and with it the trial that is going on. Idempotent."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._end()
        await asyncio.to_thread(self._thread.shutdown)
        self._end()  # it was just being started

    def _trial(self, constraint: StructuredOutputsParams) -> Trial | None:
        loose = not self._outputs.disable_any_whitespace
        if not self._tries:
            return None
        if isinstance(constraint.json, str):
            return Trial("json", constraint.json, loose)
        if constraint.structural_tag is not None:
            return Trial("structural_tag", constraint.structural_tag, loose)
        return None

    async def _outcome(self, trial: Trial) -> str | None:
        line = msgspec.json.encode(trial)
        key = hashlib.sha256(line).digest()
        if key not in self._outcomes:
            self._outcomes[key] = await self._tried(key, line)
            if len(self._outcomes) > REMEMBERED:
                self._outcomes.pop(next(iter(self._outcomes)))
        return self._outcomes[key]

    async def _tried(self, key: bytes, line: bytes) -> str | None:
        """The outcome of a trial that others may wait for too. When the last of them has left, one that has
        not begun never does."""
        trying = self._trials.get(key)
        if trying is None:
            if len(self._trials) >= MOST_TRIALS:
                raise Refusal(
                    f"{len(self._trials)} other schemas wait to be tried",
                    status=429,
                    code="overloaded",
                    retry_after=self._drain.seconds_for(1),
                )
            outcome = asyncio.get_running_loop().run_in_executor(self._thread, self._try, line)
            trying = self._trials[key] = _Trying(outcome)
        trying.waiters += 1
        try:
            return await asyncio.shield(trying.outcome)
        finally:
            trying.waiters -= 1
            if not trying.waiters:
                del self._trials[key]
                trying.outcome.cancel()
                self._drain.freed(1)

    def _try(self, line: bytes) -> str | None:
        process = self._process or self._start()
        answer = _asked(process, line + b"\n")
        if answer:
            return msgspec.json.decode(answer, type=str | None)
        self._end()
        log.warning("a grammar took too much", status=process.returncode)
        return "making a grammar of it takes too much time or memory"

    def _start(self) -> subprocess.Popen[bytes]:
        model = self._config.model_config
        backend = XgrammarBackend(
            self._config, tokenizer=cached_tokenizer_from_config(model), vocab_size=model.get_vocab_size()
        )
        # Of any grammar; how it is made of a tokenizer differs from one to the next.
        grammar: Any = backend.compile_grammar(StructuredOutputOptions.JSON_OBJECT, "")
        vocabulary = grammar.ctx.tokenizer_info
        process = self._process = subprocess.Popen(  # noqa: S603 - a program of this very package
            [sys.executable, "-m", grammars.__name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        if _asked(process, vocabulary.serialize_json().encode() + b"\n") != READY:
            self._end()
            raise RuntimeError("the program that tries out grammars does not start")
        return process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            # It may have left what was written to it.
            with suppress(BrokenPipeError), process:
                process.kill()


def _asked(process: subprocess.Popen[bytes], line: bytes) -> bytes:
    """The program's answer to a line; nothing where it has ended over it."""
    assert process.stdin is not None  # noqa: S101 - both are pipes
    assert process.stdout is not None  # noqa: S101
    try:
        process.stdin.write(line)
        process.stdin.flush()
    except BrokenPipeError:
        return b""
    return process.stdout.readline()
