"""What a provider answers, as our client reads it: under the name that was asked for, counted, and in our
envelope where it is an error. Everything else in it stays as it was written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any, NamedTuple, Protocol, Self

import msgspec
from pydantic import SecretStr

from router.backend import Piece
from router.errors import ApiError, UpstreamFailed
from router.provider_errors import provider_error
from router.sse import EventReader
from serving.messages import Chat, Request

MAX_ANSWER = 16 * 1024 * 1024
"""Bytes of a whole answer, millions of tokens of text: it is kept until its end, and read in one go while all
other requests wait."""

MAX_EVENT = 8 * 1024 * 1024
"""Bytes of a stream's event."""

BYTES_OF_A_TOKEN = 4
"""Of UTF-8, in most texts and vocabularies: what is counted where a provider does not count."""

_DONE = b"[DONE]"
_NULL = msgspec.Raw(b"null")
_CUT_OFF = "the provider's answer ended before it was complete"
_SENSELESS = "what the provider sent is no answer"

_Fields = dict[str, msgspec.Raw]
"""A JSON object whose values stay as they were written."""

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**31)]


class _Usage(msgspec.Struct):
    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None


class Asked(NamedTuple):
    """What a relay has to know of a request. That is kept until the answer ends, and the messages are not."""

    model: msgspec.Raw
    """The name that was asked for, as JSON."""
    stream: bool
    include_usage: bool
    sequences: int
    role_in_every_chunk: bool

    @classmethod
    def by(cls, request: Request) -> Self:
        """What a request asks."""
        every = isinstance(request, Chat) and request.role_in_every_chunk
        return cls(_written(request.model), request.stream, request.include_usage, request.sequences, every)


_as_fields = msgspec.json.Decoder(_Fields)
_as_usage: msgspec.json.Decoder[_Usage | None] = msgspec.json.Decoder(_Usage | None)
_as_choices = msgspec.json.Decoder(list[dict[str, Any]] | None)


class Relay(Protocol):
    """One answer on its way through."""

    prompt_tokens: int
    """By the provider's count; 0 until it has told it."""
    completion_tokens: int | None
    """The same; None until it has told it."""

    @property
    def begun(self) -> bool:
        """Whether any of the answer is there."""

    @property
    def done(self) -> bool:
        """Whether all of it is there."""

    def feed(self, data: bytes) -> None:
        """More of the answer's body; nothing where it has ended."""

    def take(self) -> Piece | None:
        """What has gathered for the client, if anything has.

        Raises the ApiError that ended the answer early, once all that came before it has been taken.
        """


def relay(asked: Asked, key: SecretStr) -> Relay:
    """What turns an answer into the client's. No error that it raises tells anything of `key`."""
    return StreamRelay(asked, key) if asked.stream else WholeRelay(asked, key)


class WholeRelay:
    """An answer in one piece."""

    def __init__(self, asked: Asked, key: SecretStr) -> None:
        self.prompt_tokens = 0
        self.completion_tokens: int | None = None
        self.begun = False
        self.done = False
        self._asked = asked
        self._key = key
        self._body = bytearray()

    def feed(self, data: bytes) -> None:
        self.begun = True
        self.done = not data
        self._body += data

    def take(self) -> Piece | None:
        if len(self._body) > MAX_ANSWER:
            raise UpstreamFailed(f"the provider's answer is longer than {MAX_ANSWER} bytes")
        if not self.done:
            return None
        try:
            fields = _read(bytes(self._body), self._key)
            choices = _choices(fields)
        except ValueError:
            raise UpstreamFailed(_SENSELESS) from None
        if not choices:
            raise UpstreamFailed(_SENSELESS)
        fields["model"] = self._asked.model
        usage = _usage(fields) or _Usage()
        self.prompt_tokens = usage.prompt_tokens or 0
        self.completion_tokens = tokens = usage.completion_tokens
        if tokens is None:
            tokens = sum(map(_tokens, choices))
        return Piece(msgspec.json.encode(fields), tokens, last=True)


class StreamRelay:
    """An answer as server-sent events. It is complete with [DONE], or where the body ends without it, if
    every choice has had its end before."""

    def __init__(self, asked: Asked, key: SecretStr) -> None:
        self.prompt_tokens = 0
        self.completion_tokens: int | None = None
        self.done = False
        self._asked = asked
        self._key = key
        self._events = EventReader(MAX_EVENT)
        self._gathered: list[bytes] = []
        self._tokens = 0
        """In what has gathered."""
        self._relayed_tokens = 0
        """In all chunks so far: one for each choice that says something in a chunk."""
        self._introduced: set[str] = set()
        """Indices of the choices whose role has been told."""
        self._unended = set(range(asked.sequences))
        """Indices of the choices that have had no finish_reason."""
        self._error: ApiError | None = None

    @property
    def begun(self) -> bool:
        return bool(self._gathered) or self._error is not None

    def feed(self, data: bytes) -> None:
        try:
            for event in self._events.feed(data) if data else self._events.end():
                if not self.done:
                    self._receive(event)
            if not data and not self.done:
                self._complete()
        except ValueError:
            self._error = UpstreamFailed(_SENSELESS)
        except ApiError as error:
            self._error = error

    def take(self) -> Piece | None:
        if self._gathered:
            piece = Piece(b"".join(self._gathered), self._tokens, self.done)
            self._gathered, self._tokens = [], 0
            return piece
        if self._error is not None:
            raise self._error
        return None

    def _receive(self, event: bytes) -> None:
        if event == _DONE:
            self._complete()
        else:
            self._chunk(_read(event, self._key))

    def _complete(self) -> None:
        if self._unended:
            raise UpstreamFailed(_CUT_OFF)
        self.done = True
        # A chunk may have several tokens, or a few of them may have made no text.
        self._gather(_DONE, max(0, (self.completion_tokens or 0) - self._relayed_tokens))

    def _chunk(self, fields: _Fields) -> None:
        choices = _choices(fields)
        self._unended -= _ended(choices)
        usage = _usage(fields)
        if usage is not None:
            self.prompt_tokens = usage.prompt_tokens or self.prompt_tokens
            if usage.completion_tokens is not None:
                self.completion_tokens = usage.completion_tokens
        if not self._asked.include_usage and fields.pop("usage", _NULL) != _NULL and not choices:
            return  # asked for by us, not by the client
        fields["model"] = self._asked.model
        shown = list(map(self._with_role, choices))
        if shown != choices:
            fields["choices"] = _written(shown)
        self._gather(msgspec.json.encode(fields), sum(map(_says_something, choices)))

    def _with_role(self, choice: dict[str, Any]) -> dict[str, Any]:
        """The choice, where it is a chat's, with a role that is told once; or in every delta, with a content
        that is never null."""
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            return choice
        if self._asked.role_in_every_chunk:
            given = {name: value for name, value in delta.items() if value is not None}
            return choice | {"delta": {"role": "assistant", "content": ""} | given}
        index = str(choice.get("index", 0))
        if not delta.get("role"):
            return choice
        if index not in self._introduced:
            self._introduced.add(index)
            return choice
        return choice | {"delta": {name: value for name, value in delta.items() if name != "role"}}

    def _gather(self, event: bytes, tokens: int) -> None:
        # JSON that came in several lines has line breaks between its values.
        self._gathered.append(b"data: %b\n\n" % event.replace(b"\n", b" "))
        self._tokens += tokens
        self._relayed_tokens += tokens


def _read(data: bytes, key: SecretStr) -> _Fields:
    """The JSON object of an answer. Raises ValueError where it is none, ProviderError where it says no."""
    data.decode()  # what stays as it was written is not looked into
    try:
        fields = _as_fields.decode(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    # Some say with every answer that there is no error.
    if msgspec.json.decode(fields.pop("error", _NULL)):
        raise provider_error(502, data, key)
    return fields


def _choices(fields: _Fields) -> list[dict[str, Any]]:
    """The choices of an answer or a chunk, of which there may be none. Raises ValueError."""
    return _as_choices.decode(fields.get("choices", _NULL)) or []


def _usage(fields: _Fields) -> _Usage | None:
    """What an answer says was used. A provider that counts in a way of its own is not counted."""
    try:
        return _as_usage.decode(fields.get("usage", _NULL))
    except msgspec.ValidationError:
        return None


def _written(value: Any) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))


def _ended(choices: list[dict[str, Any]]) -> set[int]:
    """The indices of those that end here. One without an index is the only one."""
    indices = (choice.get("index", 0) for choice in choices if choice.get("finish_reason"))
    return {index for index in indices if isinstance(index, int)}


def _says_something(choice: dict[str, Any]) -> bool:
    """Whether a chunk has anything generated for this choice."""
    delta = choice.get("delta")
    if isinstance(delta, dict):
        return any(value for name, value in delta.items() if name != "role")
    return bool(choice.get("text"))


def _tokens(choice: dict[str, Any]) -> int:
    """The tokens of a whole answer's choice, which its provider has not counted: those that it has log-probs
    of, or as many as a text of its length has."""
    logprobs = choice.get("logprobs")
    if isinstance(logprobs, dict):
        told = logprobs.get("content") or logprobs.get("tokens")
        if isinstance(told, list):
            return len(told)
    said = choice.get("message", choice.get("text"))
    return math.ceil(sum(len(text.encode()) for text in _texts(said)) / BYTES_OF_A_TOKEN)


def _texts(value: Any) -> Iterable[str]:
    """All that is said somewhere in a message."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for name, each in value.items() if isinstance(value, dict) else enumerate(value):
            if name not in {"role", "id", "type"}:
                yield from _texts(each)
