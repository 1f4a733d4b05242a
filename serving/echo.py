"""The echo engine: an engine without a model, for demonstrations, tests and router benchmarks.

It repeats the words of the last user message, or of a text completion's prompt, until `max_tokens`. A word
with the space before it is a token, and usage counts words; only a word of more than LONGEST_TOKEN characters
is several. Each is certain to come, so its logprob is 0. It batches as a real engine does: a step gives every
running sequence one token, and sequences beyond `max_num_seqs` wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import islice
from zlib import crc32

from pydantic import BaseModel, ConfigDict, Field

from serving.engine import (
    EngineDead,
    FinishReason,
    Logprob,
    Prompt,
    Refusal,
    Sink,
    TokenLogprobs,
    fit,
)
from serving.messages import Chat, Load, NamedTool, Request, Sampling, Text

LONGEST_TOKEN = 256
"""Characters. As with any tokenizer a token is short, so that no request makes a step's output large."""


class EchoArguments(BaseModel):
    """The echo engine's `engine_args`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    max_model_len: int = Field(8192, ge=2, description="Tokens (words) of prompt and answer together.")
    max_num_seqs: int = Field(1024, ge=1, description="Sequences that a step advances; others wait.")
    tokens_per_second: float | None = Field(
        None, gt=0, description="Pace of one sequence; null is as fast as the machine allows."
    )
    time_to_first_token_s: float = Field(0.0, ge=0, description="Seconds from a request to its first token.")


def tokenize(text: str) -> list[str]:
    """The words of a text, each with a space before it, the longest ones in pieces."""
    return [
        word[begin : begin + LONGEST_TOKEN]
        for word in map(" {}".format, text.split())
        for begin in range(0, len(word), LONGEST_TOKEN)
    ]


def identified(words: Sequence[str]) -> list[tuple[str, tuple[int]]]:
    """Each token with its id, as a `put` takes it. The same word has the same id everywhere."""
    return [(word, (crc32(word.encode()),)) for word in words]


def certain(token: str, likeliest: int) -> TokenLogprobs:
    """The logprobs at a place where nothing but `token` can stand, with as many of the likeliest as there are
    at most."""
    chosen = Logprob(token, 0.0)
    return TokenLogprobs(chosen, (chosen,)[:likeliest])


class StopScanner:
    """Holds back text that may be the beginning of a stop string, and cuts at the first one found."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """The text that is certain now, and whether a stop string was met."""
        if not self._longest:
            return text, False
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            return self._held[: min(found)], True
        certain = max(0, len(self._held) - self._longest + 1)
        text, self._held = self._held[:certain], self._held[certain:]
        return text, False

    def rest(self) -> str:
        """What is held back, once nothing can follow."""
        return self._held


class EchoSequence:
    """One choice of one request on its way through the batch."""

    def __init__(
        self, request: Request, prompt: Prompt, sampling: Sampling, choice: int, sink: Sink, ready_at: float
    ) -> None:
        self.request_id = request.id
        self.ready_at = ready_at
        self.produced = 0
        self._prompt = prompt
        self._choice = choice
        self._sink = sink
        self._max_tokens = sampling.max_tokens
        self._scanner = StopScanner(sampling.stop)
        self._logprobs = request.logprobs
        # A message begins without the space between words. What goes on with a text begins with it.
        self._begins = isinstance(request, Chat)
        seed = sampling.choice_seed(choice % sampling.n) if sampling.temperature > 0 else None
        self._position = (seed or 0) % max(1, len(prompt.content))

    @property
    def context(self) -> int:
        """Tokens that the sequence holds."""
        return self._prompt.length + self.produced

    def step(self) -> bool:
        """Put the next token into the sink; whether it was the last."""
        tokens = self._prompt.content
        if not tokens:
            self._sink.put(self._choice, "", (), "stop")
            return True
        token, token_ids = tokens[self._position]
        self._position = (self._position + 1) % len(tokens)
        if self._begins:
            self._begins = False
            token = token.removeprefix(" ")
        text, finish_reason = self._next(token)
        if self._logprobs is None:
            self._sink.put(self._choice, text, token_ids, finish_reason)
        else:
            self._sink.put(self._choice, text, token_ids, finish_reason, (certain(token, self._logprobs),))
        return finish_reason is not None

    def _next(self, token: str) -> tuple[str, FinishReason | None]:
        self.produced += 1
        text, stopped = self._scanner.feed(token)
        if stopped:
            return text, "stop"
        if self.produced == self._max_tokens:
            return text + self._scanner.rest(), "length"
        return text, None


class EchoEngine:
    """An `Engine` whose accelerator is a loop over words."""

    def __init__(self, arguments: EchoArguments) -> None:
        self.context_length = arguments.max_model_len
        self._arguments = arguments
        self._requests: dict[str, set[EchoSequence]] = {}
        # Both are ordered sets: a sequence leaves from the middle when its request is cancelled.
        self._waiting: dict[EchoSequence, None] = {}
        self._running: dict[EchoSequence, None] = {}
        self._load = Load()
        self._work = asyncio.Event()
        self._stepping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._stepping = asyncio.create_task(self._run(), name="echo engine")

    async def render(self, request: Request) -> list[Prompt]:
        return _text_prompts(request) if isinstance(request, Text) else [_chat_prompt(request)]

    async def generate(self, request: Request, prompts: Sequence[Prompt], sink: Sink) -> None:
        param = "prompt" if isinstance(request, Text) else "messages"
        samplings = [fit(request.sampling, prompt, self.context_length, param=param) for prompt in prompts]
        sink.accepted()
        if isinstance(request, Text) and request.echo and request.logprobs is not None:
            _tell_prompts(prompts, request.logprobs, sink)
        ready_at = asyncio.get_running_loop().time() + self._arguments.time_to_first_token_s
        n = request.sampling.n
        sequences = [
            EchoSequence(request, prompts[choice // n], samplings[choice // n], choice, sink, ready_at)
            for choice in range(request.sequences)
        ]
        self._requests[request.id] = set(sequences)
        self._waiting.update(dict.fromkeys(sequences))
        self._work.set()

    def cancel(self, request_id: str) -> None:
        sequences = self._requests.pop(request_id, None)
        if sequences is None:
            return
        for sequence in sequences:
            self._waiting.pop(sequence, None)
            self._running.pop(sequence, None)
        self._measure()

    def load(self) -> Load:
        return self._load

    async def died(self) -> EngineDead:
        if self._stepping is None:
            raise RuntimeError("the echo engine was not started")
        await asyncio.wait([self._stepping])
        return EngineDead("the echo engine has stopped")

    async def close(self) -> None:
        if self._stepping is not None:
            self._stepping.cancel()
            await asyncio.wait([self._stepping])

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        interval = 1 / (self._arguments.tokens_per_second or float("inf"))
        due = 0.0
        while True:
            await self._work.wait()
            now = loop.time()
            self._step(now)
            due = max(due, now) + interval
            first_ready = min((sequence.ready_at for sequence in self._running), default=due)
            await asyncio.sleep(max(due, first_ready) - loop.time())

    def _step(self, now: float) -> None:
        places = self._arguments.max_num_seqs - len(self._running)
        for sequence in list(islice(self._waiting, places)):
            del self._waiting[sequence]
            self._running[sequence] = None
        for sequence in list(self._running):
            # A sink may have had its request cancelled: this one's siblings, or itself with its last token.
            if sequence not in self._running or sequence.ready_at > now:
                continue
            if sequence.step() and sequence in self._running:
                self._finish(sequence)
        if not self._running and not self._waiting:
            self._work.clear()
        self._measure()

    def _finish(self, sequence: EchoSequence) -> None:
        del self._running[sequence]
        siblings = self._requests[sequence.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._requests[sequence.request_id]

    def _measure(self) -> None:
        capacity = self._arguments.max_num_seqs * self._arguments.max_model_len
        held = sum(sequence.context for sequence in self._running)
        self._load = Load(len(self._running), len(self._waiting), held / capacity)


def _chat_prompt(request: Chat) -> Prompt:
    """Raises Refusal for what takes a model."""
    if request.response_format is not None:
        raise Refusal(
            "response_format: this model repeats words and cannot hold a format; only text is accepted",
            param="response_format",
        )
    if request.tools and (request.tool_choice == "required" or isinstance(request.tool_choice, NamedTool)):
        raise Refusal(
            "tool_choice: this model repeats words and never calls a tool; only none and auto are accepted",
            param="tool_choice",
        )
    length = sum(len(tokenize(message.content or "")) for message in request.messages)
    spoken = [message.content or "" for message in request.messages if message.role == "user"]
    return Prompt(length, identified(tokenize(spoken[-1])) if spoken else [])


def _text_prompts(request: Text) -> list[Prompt]:
    """Of token ids each is the word of its decimal digits."""
    texts = [prompt if isinstance(prompt, str) else " ".join(map(str, prompt)) for prompt in request.prompts]
    contents = [identified(tokenize(text)) for text in texts]
    return [
        Prompt(len(content), content, text if request.echo else None)
        for text, content in zip(texts, contents, strict=True)
    ]


def _tell_prompts(prompts: Sequence[Prompt], likeliest: int, sink: Sink) -> None:
    for at, prompt in enumerate(prompts):
        if prompt.content:
            first, *others = [token for token, _ in prompt.content]
            sink.prompt_logprobs(at, first.removeprefix(" "), [certain(token, likeliest) for token in others])
