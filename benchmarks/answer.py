"""What came back for one request: bytes and the moments they came go in, an `Answer` comes out.

Every moment is a `time.perf_counter()` value, in seconds. Nothing here does I/O.

Of a stream only the events that carry no text are parsed as JSON (the role, the finish, the usage, an error),
and the last one that does: the generator shares the machine with what it measures, so each chunk must cost it
next to nothing.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any, Protocol

# A quote inside a JSON string is escaped, so this cannot match within the text itself.
_has_text = re.compile(rb'content": ?"[^"]').search

_DETAIL_LENGTH = 300


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an answer does not count: a kind that can be counted, and this one's own words."""

    kind: str
    detail: str


@dataclass(slots=True)
class Answer:
    """One request, from the moment it was due to its end. It is good when it has no `failure`."""

    started: float
    ended: float = math.nan
    """The last event that had choices, as `vllm bench serve` has it; of a failed answer, when it failed."""
    chunks: list[float] = field(default_factory=list)
    """When each event with text in it arrived. A chunk may hold several tokens: count those in usage."""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    """As the server's usage says, over all choices."""
    failure: Failure | None = None
    lag: float = math.nan
    """Seconds by which the generator was late in sending the request. Not a number in a closed loop, where it
    had no moment to keep."""

    def fail(self, kind: str, detail: str, now: float) -> None:
        """Record why the answer failed. What went wrong first is the reason; the rest follows from it."""
        if self.failure is None:
            self.failure = Failure(kind, detail[:_DETAIL_LENGTH])
            self.ended = now


class Reader(Protocol):
    """Where the body of one HTTP answer goes."""

    def feed(self, data: bytes, now: float) -> None:
        """More of the body, torn anywhere."""

    def end(self, now: float) -> None:
        """The body is whole: judge it."""


class StreamReader:
    """Reads server-sent events into an answer, one `data:` line each as OpenAI's API sends them."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._rest = b""
        self._last_chunk = b""
        self._finished = False
        self._done = False

    def feed(self, data: bytes, now: float) -> None:
        # Nearly always the data is one whole event with text: no line has to be taken out of it.
        if not self._rest and data.find(b"\n\n") == len(data) - 2 and _has_text(data):
            self._answer.chunks.append(now)
            self._last_chunk = data
            return
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if _has_text(line):
                self._answer.chunks.append(now)
                self._last_chunk = line
            elif line.startswith(b"data:"):
                self._event(line, now)

    def end(self, now: float) -> None:
        answer = self._answer
        if self._last_chunk:
            self._event(self._last_chunk, answer.chunks[-1])
        if not self._done:
            answer.fail("no [DONE]", "the stream ended without it", now)
        elif not self._finished:
            answer.fail("no finish_reason", "no choice of the stream had one", now)
        elif answer.completion_tokens is None:
            answer.fail("no usage", "the stream had none, although include_usage was asked for", now)

    def _event(self, line: bytes, now: float) -> None:
        payload = line[len(b"data:") :].strip()
        if payload == b"[DONE]":
            self._done = True
            return
        event = _object(payload)
        if event is None:
            self._answer.fail("bad event", repr(payload), now)
        elif "error" in event:
            self._answer.fail("error event", json.dumps(event["error"]), now)
        else:
            self._facts(event, now)

    def _facts(self, event: dict[str, Any], now: float) -> None:
        if choices := event.get("choices"):
            self._finished |= any(choice.get("finish_reason") for choice in choices)
            if not self._answer.ended >= now:  # true of NaN too: no end is known yet
                self._answer.ended = now
        _take_usage(self._answer, event)


class WholeReader:
    """Reads one JSON body into an answer."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._body = bytearray()

    def feed(self, data: bytes, now: float) -> None:
        self._body += data

    def end(self, now: float) -> None:
        answer, body = self._answer, _object(self._body)
        answer.ended = now
        if body is None:
            answer.fail("bad body", repr(bytes(self._body)), now)
            return
        _take_usage(answer, body)
        if not any(choice.get("finish_reason") for choice in body.get("choices") or ()):
            answer.fail("no finish_reason", "no choice of the answer had one", now)
        elif answer.completion_tokens is None:
            answer.fail("no usage", "the answer had none", now)


class RefusalReader:
    """Reads the body of an answer whose status is not 200, for the words in it."""

    def __init__(self, answer: Answer, status: int) -> None:
        self._answer = answer
        self._status = status
        self._body = bytearray()

    def feed(self, data: bytes, now: float) -> None:
        self._body += data

    def end(self, now: float) -> None:
        self._answer.fail(f"status {self._status}", self._body.decode(errors="replace"), now)


def _object(payload: bytes | bytearray) -> dict[str, Any] | None:
    try:
        value = json.loads(payload)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _take_usage(answer: Answer, body: dict[str, Any]) -> None:
    if usage := body.get("usage"):
        answer.prompt_tokens = usage["prompt_tokens"]
        answer.completion_tokens = usage["completion_tokens"]
