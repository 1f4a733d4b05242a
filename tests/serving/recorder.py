"""Where a test looks at what a client would read of an answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from msgspec.structs import replace

from serving.engine import Engine, FinishReason, Refusal, TokenLogprobs
from serving.generate import generate
from serving.messages import Chat, Message, Request, Sampling, Text, Usage
from tests.harness import HandEngine
from tests.waiting import until


class Recorder:
    """An outlet that keeps what a client would be sent."""

    def __init__(self) -> None:
        self.prompt_tokens: int | None = None
        self.data = b""
        self.tokens = 0
        self.chunks = 0
        self.progressed = 0
        self.refusal: Refusal | None = None
        self.usage: Usage | None = None
        self.failed = False

    @property
    def over(self) -> bool:
        """Whether the answer has ended, one way or the other."""
        return self.refusal is not None or self.usage is not None

    def accepted(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens

    def refused(self, refusal: Refusal) -> None:
        self.refusal = refusal

    def chunk(self, data: bytes, tokens: int) -> None:
        assert not self.over
        assert data
        self.data += data
        self.tokens += tokens
        self.chunks += 1

    def progress(self) -> None:
        self.progressed += 1

    def ended(self, data: bytes, tokens: int, usage: Usage, *, failed: bool = False) -> None:
        assert not self.over
        self.data += data
        self.tokens += tokens
        self.usage = usage
        self.failed = failed

    @property
    def body(self) -> dict[str, Any]:
        """The whole answer."""
        body: dict[str, Any] = json.loads(self.data)
        return body

    @property
    def events(self) -> list[dict[str, Any]]:
        """The events of a stream that has ended, without [DONE]."""
        assert self.data.endswith(b"\n\n")
        *events, done = self.data.removesuffix(b"\n\n").split(b"\n\n")
        assert done == b"data: [DONE]"
        assert all(event.startswith(b"data: {") and b"\n" not in event for event in events)
        return [json.loads(event.removeprefix(b"data: ")) for event in events]

    def choices(self, choice: int) -> list[dict[str, Any]]:
        """A choice's entry of every event that has one."""
        return [each for event in self.events for each in event["choices"] if each["index"] == choice]


def joined(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The choice of a whole answer that a stream's entries for it add up to."""
    content, reasoning = "", ""
    calls: list[dict[str, Any]] = []
    logprobs: list[dict[str, Any]] = []
    for entry in entries:
        delta = entry["delta"]
        content += delta.get("content") or ""
        reasoning += delta.get("reasoning_content", "")
        for call in delta.get("tool_calls", ()):
            if call["index"] == len(calls):
                calls.append({name: call[name] for name in ("id", "type", "function")})
            else:
                assert set(call) == {"index", "function"}
                assert set(call["function"]) == {"arguments"}
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        if entry["logprobs"] is not None:
            assert entry["logprobs"]["refusal"] is None
            assert entry["logprobs"]["content"]
            logprobs += entry["logprobs"]["content"]
    assert [entry["finish_reason"] for entry in entries[:-1]] == [None] * (len(entries) - 1)
    message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else "")}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return {"message": message, "finish_reason": entries[-1]["finish_reason"], "logprobs": logprobs}


async def answer(engine: Engine, request: Request) -> Recorder:
    """All that a client would read, once there is nothing more."""
    outlet = Recorder()
    await generate(engine, request, outlet)
    await until(lambda: outlet.over)
    return outlet


class Put(NamedTuple):
    """What an engine makes of one choice in one step."""

    text: str
    token_ids: Sequence[int] = (0,)
    logprobs: Sequence[TokenLogprobs] = ()


class Part(NamedTuple):
    """All that an engine makes of one choice."""

    puts: Sequence[Put]
    finish_reason: FinishReason = "stop"


async def perform(engine: HandEngine, request: Request, *parts: Part) -> Recorder:
    """What a client would read where the engine makes this of the choices, all of them in each step."""
    outlet = Recorder()
    await generate(engine, request, outlet)
    sink = engine.requests.pop(request.id).sink
    for step in range(max(len(part.puts) for part in parts)):
        for choice, part in enumerate(parts):
            if step < len(part.puts):
                reason = part.finish_reason if step == len(part.puts) - 1 else None
                text, token_ids, logprobs = part.puts[step]
                sink.put(choice, text, token_ids, reason, () if request.logprobs is None else logprobs)
    return outlet


def chat(text: str = "to be or not to be", **fields: Any) -> Chat:
    """A chat with one user message, and these fields of the request or its sampling."""
    sampling, others = _sampling(fields)
    return replace(Chat("chatcmpl-1", "a/b:C", 1234, (Message("user", text),), sampling), **others)


def completion(*prompts: str | tuple[int, ...], **fields: Any) -> Text:
    """A text completion of these prompts, and these fields of the request or its sampling."""
    sampling, others = _sampling(fields)
    return replace(Text("cmpl-1", "a/b:C", 1234, prompts, sampling), **others)


def _sampling(fields: dict[str, Any]) -> tuple[Sampling, dict[str, Any]]:
    ours = {name: fields[name] for name in fields if name in Sampling.__struct_fields__}
    others = {name: fields[name] for name in fields if name not in ours}
    return Sampling(**{"max_tokens": 8, **ours}), others
