"""vLLM's parsers behind our `Parser` protocol.

Import this module only through `serving.engines`, which sets the environment first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vllm.entrypoints.generate.base.protocol import DeltaMessage, DeltaToolCall
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser import Parser as VllmParser
from vllm.renderers.chat_utils import make_tool_call_id
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer, IncrementalDetokenizer

from serving.engine import Delta, Parsed, ToolCallDelta
from serving.messages import ToolCall

OPENING = 16
"""Tokens at a prompt's end among which stands, if anywhere, the mark that begins the answer's reasoning, and
more than how the next one is spelled can hang on."""


class ChoiceParser:
    """Reads one choice."""

    def __init__(
        self, parser: VllmParser, request: ChatCompletionRequest, prompt_token_ids: list[int]
    ) -> None:
        self._parser = parser
        self._request = request
        self._prompt = prompt_token_ids
        self._called: set[int] = set()
        # White space that nothing has followed yet.
        self._blank = ""
        self._spoken = False

    def delta(self, text: str, token_ids: Sequence[int], *, finished: bool) -> Delta | None:
        message = self._parser.parse_delta(
            text, list(token_ids), self._request, self._prompt, finished=finished
        )
        message = message or DeltaMessage()
        calls = tuple(self._call_deltas(message.tool_calls))
        content = self._shown(message.content or "", finished=finished)
        delta = Delta(content or None, message.reasoning or None, calls)
        return delta if any(delta) else None

    def whole(self, text: str, token_ids: Sequence[int]) -> Parsed:
        self._parser.set_prompt_token_ids(self._prompt)
        reasoning, content, calls = self._parser.parse(
            text, self._request, enable_auto_tools=True, model_output_token_ids=token_ids
        )
        called = [ToolCall(call.id or make_tool_call_id(), call.name, call.arguments) for call in calls or ()]
        return Parsed(content or None, reasoning or None, called)

    def reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        count = self._parser.count_reasoning_tokens
        reasoning = self._parser.reasoning_parser
        if reasoning is None or reasoning.engine_based_streaming:
            return count(token_ids)
        # These look for the mark that begins the reasoning, and many templates put it into the prompt.
        opening = self._prompt[-OPENING:]
        return count([*opening, *token_ids]) - count(opening)

    def _call_deltas(self, calls: Sequence[DeltaToolCall]) -> Iterator[ToolCallDelta]:
        for call in calls:
            name = call.function.name if call.function else None
            arguments = (call.function and call.function.arguments) or ""
            if name and call.index not in self._called:
                self._called.add(call.index)
                yield ToolCallDelta(call.index, call.id or make_tool_call_id(), name, arguments)
            elif arguments:
                yield ToolCallDelta(call.index, None, None, arguments)

    def _shown(self, content: str, *, finished: bool) -> str:
        """What of the content is to be seen now. A whole message has none beside calls where it were only
        white space, so that waits for what follows it."""
        content = self._blank + content
        self._spoken = self._spoken or bool(content.strip())
        shows = self._spoken or (finished and not self._called)
        self._blank = "" if shows else content
        return content if shows else ""


def new_decoder(
    tokenizer: Any, request: ChatCompletionRequest, prompt_token_ids: Sequence[int]
) -> Callable[[int], str]:
    """What tells of each token of an answer in turn what it adds to the text: a detokenizer as the engine's
    is, but without the stop strings for which that one holds text back."""
    asked = EngineCoreRequest(
        request_id="",
        prompt_token_ids=list(prompt_token_ids[-OPENING:]),
        mm_features=None,
        sampling_params=SamplingParams(
            skip_special_tokens=request.skip_special_tokens,
            spaces_between_special_tokens=request.spaces_between_special_tokens,
        ),
        pooling_params=None,
        arrival_time=0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    detokenizer = IncrementalDetokenizer.from_new_request(tokenizer, asked)
    if isinstance(detokenizer, FastIncrementalDetokenizer):
        return detokenizer.decode_next

    def decode(token: int) -> str:
        detokenizer.update([token], stop_terminated=False)
        return detokenizer.get_next_output_text(finished=False, delta=True)

    return decode
