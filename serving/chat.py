"""Chat completions whose messages are nothing but their text: the path that most tokens take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serving.answers import LONGEST_ANSWER, Body, EventStream, Outlet, to_json
from serving.engine import FinishReason, Prompt, TokenLogprobs
from serving.messages import Chat

ROLE = b'"role":"assistant",'


class ChatStream(EventStream):
    """A sink that writes an event for each `put` that has text, and one for each choice that ends."""

    def __init__(self, request: Chat, prompts: Sequence[Prompt], outlet: Outlet) -> None:
        super().__init__(request, prompts, outlet, "chat.completion.chunk")
        # Up to where a choice's text goes. Only its first delta says the role, unless every one has to.
        self._openings = [self._opening(choice, ROLE) for choice in range(request.sequences)]
        self._unspoken = set(range(request.sequences))
        self._later_role = ROLE if request.role_in_every_chunk else b""
        self._closed_delta = b'},"logprobs":null,"finish_reason":null}' + self._tail
        self._last_delta = b'{"role":"assistant","content":""}' if request.role_in_every_chunk else b"{}"

    def put(
        self,
        choice: int,
        text: str,
        token_ids: Sequence[int],
        finish_reason: FinishReason | None,
        logprobs: Sequence[TokenLogprobs] = (),
    ) -> None:
        tokens = len(token_ids)
        self._completion_tokens += tokens
        self._held_tokens += tokens
        data = b""
        if text or (finish_reason is not None and choice in self._unspoken):
            data = b"".join((self._openings[choice], to_json(text), self._closed_delta))
            if choice in self._unspoken:
                self._unspoken.remove(choice)
                self._openings[choice] = self._opening(choice, self._later_role)
        if finish_reason is not None:
            self._send(data + self._finish(choice, finish_reason), ends=True)
        elif data:
            # As `_send` would, were it not for one call more in what most tokens go through.
            self._outlet.chunk(data, self._held_tokens)
            self._held_tokens = 0
        else:
            self._outlet.progress()

    def _finish(self, choice: int, finish_reason: FinishReason) -> bytes:
        end = b'{"index":%d,"delta":%b,"logprobs":null,"finish_reason":"%b"}'
        return self._head + end % (choice, self._last_delta, finish_reason.encode()) + self._tail

    def _opening(self, choice: int, role: bytes) -> bytes:
        return self._head + b'{"index":%d,"delta":{%b"content":' % (choice, role)


class ChatBody(Body):
    """A sink that gathers the choices' texts."""

    def __init__(self, request: Chat, prompts: Sequence[Prompt], outlet: Outlet) -> None:
        super().__init__(request, prompts, outlet, "chat.completion")
        self._texts: list[list[str]] = [[] for _ in range(request.sequences)]

    def put(
        self,
        choice: int,
        text: str,
        token_ids: Sequence[int],
        finish_reason: FinishReason | None,
        logprobs: Sequence[TokenLogprobs] = (),
    ) -> None:
        self._completion_tokens += len(token_ids)
        self._length += len(text)
        self._texts[choice].append(text)
        if finish_reason is None and self._length <= LONGEST_ANSWER:
            # As `_gathered` would, were it not for one call more in what most tokens go through.
            self._outlet.progress()
        else:
            self._gathered(choice, finish_reason)

    def _choice(self, choice: int) -> dict[str, Any]:
        return {
            "index": choice,
            "message": {"role": "assistant", "content": "".join(self._texts[choice])},
            "logprobs": None,
            "finish_reason": self._finish_reasons[choice],
        }
