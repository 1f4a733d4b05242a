"""What a provider answers, as our client reads it: under the name that was asked for, counted, and in our
envelope where it is an error. Everything else in it stays as it was written.
"""

from __future__ import annotations

from typing import Annotated, Any, Protocol

import msgspec
from pydantic import SecretStr

from router.backend import Job, Piece
from router.errors import ApiError, UpstreamFailed
from router.provider_errors import provider_error
from router.sse import EventReader
from serving.messages import Chat

MAX_ANSWER = 16 * 1024 * 1024
"""Bytes of a whole answer, millions of tokens of text: it is kept until its end, and read in one go while all
other requests wait."""

MAX_EVENT = 8 * 1024 * 1024
"""Bytes of a stream's event."""

_DONE = b"[DONE]"
_CUT_OFF = "the provider's answer ended before it was complete"
_SENSELESS = "what the provider sent is no answer"

_Fields = dict[str, msgspec.Raw]
"""A JSON object whose values stay as they were written."""

_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class _Usage(msgspec.Struct):
    prompt_tokens: _Count = 0
    completion_tokens: _Count = 0


_as_fields = msgspec.json.Decoder(_Fields)
_as_usage: msgspec.json.Decoder[_Usage | None] = msgspec.json.Decoder(_Usage | None)
_as_choices = msgspec.json.Decoder(list[dict[str, Any]] | None)


class Relay(Protocol):
    """One answer on its way through."""

    prompt_tokens: int
    """By the provider's count; 0 until it has told it."""

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


def relay(job: Job, key: SecretStr) -> Relay:
    """What turns the answer to a job into the client's. No error that it raises tells anything of `key`."""
    return StreamRelay(job, key) if job.request.stream else WholeRelay(job, key)


class WholeRelay:
    """An answer in one piece."""

    def __init__(self, job: Job, key: SecretStr) -> None:
        self.prompt_tokens = 0
        self.begun = False
        self.done = False
        self._job = job
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
        fields["model"] = _written(self._job.request.model)
        usage = _usage(fields) or _Usage()
        self.prompt_tokens = usage.prompt_tokens
        return Piece(msgspec.json.encode(fields), usage.completion_tokens, last=True)


class StreamRelay:
    """An answer as server-sent events. It is complete with [DONE], or where the body ends without it, if
    every choice has had its end before."""

    def __init__(self, job: Job, key: SecretStr) -> None:
        self.prompt_tokens = 0
        self.done = False
        self._job = job
        self._model = _written(job.request.model)
        self._key = key
        self._events = EventReader(MAX_EVENT)
        self._gathered: list[bytes] = []
        self._tokens = 0
        """In what has gathered."""
        self._relayed_tokens = 0
        """In all chunks so far: one for each choice that says something in a chunk."""
        self._completion_tokens = 0
        """By the provider's count."""
        self._role_in_every_chunk = isinstance(job.request, Chat) and job.request.role_in_every_chunk
        self._unended = set(range(job.request.sequences))
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
        self._gather(_DONE, max(0, self._completion_tokens - self._relayed_tokens))

    def _chunk(self, fields: _Fields) -> None:
        choices = _choices(fields)
        self._unended -= _ended(choices)
        usage = _usage(fields)
        if usage is not None:
            self.prompt_tokens = usage.prompt_tokens
            self._completion_tokens = usage.completion_tokens
        if not self._job.request.include_usage:
            # Asked for by us, not by the client.
            fields.pop("usage", None)
            if usage is not None and not choices:
                return
        fields["model"] = self._model
        if self._role_in_every_chunk and choices:
            fields["choices"] = _written(list(map(_with_role, choices)))
        self._gather(msgspec.json.encode(fields), sum(map(_says_something, choices)))

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
    if bytes(fields.get("error", b"null")) != b"null":
        raise provider_error(502, data, key)
    return fields


def _choices(fields: _Fields) -> list[dict[str, Any]]:
    """The choices of an answer or a chunk, of which there may be none. Raises ValueError."""
    return _as_choices.decode(fields.get("choices", b"null")) or []


def _usage(fields: _Fields) -> _Usage | None:
    """What an answer says was used. A provider that counts in a way of its own is not counted."""
    try:
        return _as_usage.decode(fields.get("usage", b"null"))
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


def _with_role(choice: dict[str, Any]) -> dict[str, Any]:
    """The choice with a role and a content that is never null, where it is a chat's."""
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        return choice
    given = {name: value for name, value in delta.items() if value is not None}
    return choice | {"delta": {"role": "assistant", "content": ""} | given}
