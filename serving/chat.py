"""One chat completion in the replica: render, generate, bytes.

The bytes made here are the ones the client reads; nothing after this file looks inside them.
"""

from __future__ import annotations

from typing import Any, Protocol

import msgspec
import structlog

from serving.engine import Engine, EngineDead, FinishReason, Refusal
from serving.messages import Chat, Sampling, Usage

log = structlog.get_logger(__name__)

_json = msgspec.json.Encoder().encode

DONE = b"data: [DONE]\n\n"

LONGEST_ANSWER = 8 * 1024 * 1024
"""Characters of a whole answer, all choices together. At six bytes each in JSON, it fits a frame."""

_TOO_LONG = Refusal(
    f"the answer has more than {LONGEST_ANSWER} characters, which only a stream may have",
    param="stream",
    code="answer_too_long",
)


INTERNAL = Refusal("internal error", status=500, code="internal_error")
"""What a client learns of a fault of ours; the log says more."""


class Outlet(Protocol):
    """The trunk's end of one stream. Exactly one of `refused` and `ended` closes it; after that, nothing that
    is called has an effect."""

    def accepted(self, prompt_tokens: int) -> None:
        """The engine has the request."""

    def refused(self, refusal: Refusal) -> None:
        """Nothing will be generated, or no more of it."""

    def chunk(self, data: bytes, tokens: int) -> None:
        """`data` for the client, carrying `tokens` tokens."""

    def progress(self) -> None:
        """There are more tokens, and none for the client yet."""

    def ended(self, data: bytes, tokens: int, usage: Usage, *, failed: bool = False) -> None:
        """The last bytes and what was used in all. A failed stream has none."""


async def generate(engine: Engine, request: Chat, outlet: Outlet) -> None:
    """Render the prompt and start generating into `outlet`; returns when the engine has the request.

    Never raises: what the client may know becomes a refusal, the rest is logged and refused as internal.
    """
    try:
        prompt = await engine.render(request.messages)
        sampling = fit(request.sampling, prompt.length, engine.context_length)
        sink = (EventStream if request.stream else Completion)(request, prompt.length, outlet)
        await engine.generate(request.id, prompt, sampling, sink)
    except Refusal as refusal:
        outlet.refused(refusal)
    except EngineDead as error:
        log.warning("the engine took no request", completion=request.id, error=str(error))
        outlet.ended(b"", 0, Usage(0, 0), failed=True)
    except Exception:
        log.exception("request failed before generation", completion=request.id)
        outlet.refused(INTERNAL)


def fit(sampling: Sampling, prompt_tokens: int, context_length: int) -> Sampling:
    """The sampling with `max_tokens`, and what must not exceed it, clamped to the room that the prompt
    leaves in the context.

    Raises Refusal where it leaves none.
    """
    room = context_length - prompt_tokens
    if room < 1:
        raise Refusal(
            f"messages: the prompt has {prompt_tokens} tokens, and with at least one token of answer it must"
            f" fit the model's context of {context_length} tokens",
            param="messages",
            code="context_length_exceeded",
        )
    if sampling.max_tokens <= room:
        return sampling
    return msgspec.structs.replace(sampling, max_tokens=room, min_tokens=min(sampling.min_tokens, room))


class _Answer:
    """What the two forms of an answer share: counting, and the ways to end."""

    def __init__(self, request: Chat, prompt_tokens: int, outlet: Outlet) -> None:
        self.cached_tokens = 0
        self._request = request
        self._outlet = outlet
        self._prompt_tokens = prompt_tokens
        self._completion_tokens = 0
        self._unfinished = request.sampling.n

    def accepted(self) -> None:
        self._outlet.accepted(self._prompt_tokens)

    def fail(self, error: Exception) -> None:
        log.error("generation failed", completion=self._request.id, error=repr(error))
        if isinstance(error, EngineDead):
            self._outlet.ended(b"", 0, self._usage(), failed=True)
        else:
            self._outlet.refused(INTERNAL)

    def _usage(self) -> Usage:
        return Usage(self._prompt_tokens, self._completion_tokens, self.cached_tokens)

    def _usage_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class EventStream(_Answer):
    """A sink that writes server-sent events, one for each `put` that has text."""

    def __init__(self, request: Chat, prompt_tokens: int, outlet: Outlet) -> None:
        super().__init__(request, prompt_tokens, outlet)
        self._held_tokens = 0
        usage = b',"usage":null' if request.include_usage else b""
        self._head = self._event_head()
        self._tail = b"]" + usage + b"}\n\n"
        self._closed_delta = b'},"logprobs":null,"finish_reason":null}' + self._tail
        # Up to where a choice's text goes; only its first delta says the role.
        self._openings = [self._opening(choice, b'"role":"assistant",') for choice in range(self._unfinished)]
        self._spoken = [False] * self._unfinished

    def put(self, choice: int, text: str, tokens: int, finish_reason: FinishReason | None) -> None:
        self._completion_tokens += tokens
        # Tokens whose text is held back ride with the next bytes.
        self._held_tokens += tokens
        ends_silent = finish_reason is not None and not self._spoken[choice]
        data = self._delta(choice, text) if text or ends_silent else b""
        if finish_reason is not None:
            self._unfinished -= 1
            data += self._finish(choice, finish_reason)
            if not self._unfinished:
                self._outlet.ended(data + self._closing(), self._held_tokens, self._usage())
                return
        if data:
            self._outlet.chunk(data, self._held_tokens)
            self._held_tokens = 0
        else:
            self._outlet.progress()

    def _delta(self, choice: int, text: str) -> bytes:
        delta = b"".join((self._openings[choice], _json(text), self._closed_delta))
        if not self._spoken[choice]:
            self._spoken[choice] = True
            self._openings[choice] = self._opening(choice)
        return delta

    def _finish(self, choice: int, finish_reason: FinishReason) -> bytes:
        end = {"index": choice, "delta": {}, "logprobs": None, "finish_reason": finish_reason}
        return self._head + _json(end) + self._tail

    def _closing(self) -> bytes:
        if not self._request.include_usage:
            return DONE
        return self._head + b'],"usage":' + _json(self._usage_json()) + b"}\n\n" + DONE

    def _event_head(self) -> bytes:
        common = {
            "id": self._request.id,
            "object": "chat.completion.chunk",
            "created": self._request.created,
            "model": self._request.model,
        }
        return b"data: " + _json(common)[:-1] + b',"choices":['

    def _opening(self, choice: int, role: bytes = b"") -> bytes:
        return self._head + b'{"index":%d,"delta":{%b"content":' % (choice, role)


class Completion(_Answer):
    """A sink that gathers the choices and writes one JSON body when the last has ended."""

    def __init__(self, request: Chat, prompt_tokens: int, outlet: Outlet) -> None:
        super().__init__(request, prompt_tokens, outlet)
        self._texts: list[list[str]] = [[] for _ in range(self._unfinished)]
        self._length = 0
        self._finish_reasons: list[FinishReason | None] = [None] * self._unfinished

    def put(self, choice: int, text: str, tokens: int, finish_reason: FinishReason | None) -> None:
        self._completion_tokens += tokens
        self._texts[choice].append(text)
        self._length += len(text)
        if self._length > LONGEST_ANSWER:
            self._outlet.refused(_TOO_LONG)
        elif finish_reason is None:
            self._outlet.progress()
        else:
            self._unfinished -= 1
            self._finish_reasons[choice] = finish_reason
            if not self._unfinished:
                self._outlet.ended(self._body(), self._completion_tokens, self._usage())

    def _body(self) -> bytes:
        return _json(
            {
                "id": self._request.id,
                "object": "chat.completion",
                "created": self._request.created,
                "model": self._request.model,
                "choices": [self._choice(choice) for choice in range(len(self._texts))],
                "usage": self._usage_json(),
            }
        )

    def _choice(self, choice: int) -> dict[str, Any]:
        return {
            "index": choice,
            "message": {"role": "assistant", "content": "".join(self._texts[choice])},
            "logprobs": None,
            "finish_reason": self._finish_reasons[choice],
        }
