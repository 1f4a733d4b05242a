"""Chat completions with reasoning, tool calls or logprobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serving.answers import CHARACTER, Body, EventStream, Outlet, to_json
from serving.engine import Delta, FinishReason, Parsed, Prompt, TokenLogprobs, ToolCallDelta
from serving.logprobs import ChatLogprobs
from serving.messages import Chat, ToolCall
from serving.parsing import ParsedChoice


class RichStream(EventStream):
    """A sink that writes an event for each `put` that adds to its choice's message, and one for each choice
    that ends."""

    def __init__(self, request: Chat, prompts: Sequence[Prompt], outlet: Outlet) -> None:
        super().__init__(request, prompts, outlet, "chat.completion.chunk")
        self._choices = [ParsedChoice(request, prompts[0]) for _ in range(request.sequences)]
        # Those of tokens whose text is held back; they ride with the next event.
        self._logprobs = [ChatLogprobs() for _ in self._choices]
        self._spoken = [False for _ in self._choices]
        self._every = request.role_in_every_chunk

    def put(
        self,
        choice: int,
        text: str,
        token_ids: Sequence[int],
        finish_reason: FinishReason | None,
        logprobs: Sequence[TokenLogprobs] = (),
    ) -> None:
        self._completion_tokens += len(token_ids)
        self._held_tokens += len(token_ids)
        self._logprobs[choice].add(logprobs)
        parsed = self._choices[choice]
        ends = finish_reason is not None
        delta = parsed.delta(text, token_ids, finished=ends)
        events = b""
        if any(delta) or (ends and not self._spoken[choice]):
            events = self._event(choice, self._delta(choice, delta))
        if finish_reason is not None:
            if self._reasoning_tokens is not None:
                self._reasoning_tokens += parsed.reasoning_tokens()
            last = {"role": "assistant", "content": ""} if self._every else {}
            events += self._event(choice, last, parsed.finish_reason(finish_reason))
        self._send(events, ends=ends)

    def _event(self, choice: int, delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        logprobs = self._logprobs[choice]
        entry = {
            "index": choice,
            "delta": delta,
            "logprobs": logprobs.take() if logprobs else None,
            "finish_reason": finish_reason,
        }
        return self._head + to_json(entry) + self._tail

    def _delta(self, choice: int, delta: Delta) -> dict[str, Any]:
        message: dict[str, Any] = {}
        if self._every or not self._spoken[choice]:
            message["role"] = "assistant"
        if self._every or delta.content or not any(delta):
            message["content"] = delta.content or ""
        if delta.reasoning:
            message["reasoning_content"] = delta.reasoning
        if delta.tool_calls:
            message["tool_calls"] = [_call_delta(call) for call in delta.tool_calls]
        self._spoken[choice] = True
        return message


class RichBody(Body):
    """A sink that gathers what a stream would have shown of each choice."""

    def __init__(self, request: Chat, prompts: Sequence[Prompt], outlet: Outlet) -> None:
        super().__init__(request, prompts, outlet, "chat.completion")
        self._choices = [ParsedChoice(request, prompts[0]) for _ in range(request.sequences)]
        self._messages: list[dict[str, Any]] = [{} for _ in self._choices]
        self._logprobs = [ChatLogprobs() for _ in self._choices]
        self._with_logprobs = request.logprobs is not None

    def put(
        self,
        choice: int,
        text: str,
        token_ids: Sequence[int],
        finish_reason: FinishReason | None,
        logprobs: Sequence[TokenLogprobs] = (),
    ) -> None:
        self._completion_tokens += len(token_ids)
        self._length += len(text) + self._logprobs[choice].add(logprobs) // CHARACTER
        parsed = self._choices[choice]
        parsed.delta(text, token_ids, finished=finish_reason is not None)
        if finish_reason is None:
            self._gathered(choice, None)
            return
        message = parsed.message()
        # A parser may write more than the model did.
        self._length += _length(message) - parsed.length
        self._messages[choice] = _message(message)
        if self._reasoning_tokens is not None:
            self._reasoning_tokens += parsed.reasoning_tokens()
        self._gathered(choice, parsed.finish_reason(finish_reason))

    def _choice(self, choice: int) -> dict[str, Any]:
        return {
            "index": choice,
            "message": self._messages[choice],
            "logprobs": self._logprobs[choice].take() if self._with_logprobs else None,
            "finish_reason": self._finish_reasons[choice],
        }


def _message(parsed: Parsed) -> dict[str, Any]:
    calls = [_call(call) for call in parsed.tool_calls]
    message: dict[str, Any] = {"role": "assistant", "content": parsed.content or (None if calls else "")}
    if parsed.reasoning:
        message["reasoning_content"] = parsed.reasoning
    if calls:
        message["tool_calls"] = calls
    return message


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _call_delta(call: ToolCallDelta) -> dict[str, Any]:
    if call.id is None:
        return {"index": call.call, "function": {"arguments": call.arguments}}
    return {"index": call.call, **_call(ToolCall(call.id, call.name or "", call.arguments))}


def _length(parsed: Parsed) -> int:
    calls = sum(len(call.id) + len(call.name) + len(call.arguments) for call in parsed.tool_calls)
    return len(parsed.content or "") + len(parsed.reasoning or "") + calls
