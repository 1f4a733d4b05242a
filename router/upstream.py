"""Models that live at an OpenAI-compatible provider: requests go there as they came, and answers come back
under the name that was asked for.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pydantic import SecretStr
from pydantic_core import to_json

from router.backend import Direct, Job, Kind, Piece, State, Stream, within
from router.errors import ApiError, FirstTokenTimeout, MissingProviderKey, SlowReader, Stalled, UpstreamFailed
from router.provider import Answer, Provider
from router.provider_errors import REFUSAL_BYTES, provider_error
from router.refusals import wrong
from router.relay import Asked, relay
from router.settings import ModelTimeouts, UpstreamModel, is_provider_key
from serving.messages import Chat

REFUSAL_S = 5.0
"""Seconds that a refusal's body may take; without it the status speaks for itself."""


class Upstream:
    """One model at a provider. Nothing waits here: the provider says itself when it has too much to do.

    To be made on a running event loop.
    """

    kind: Kind = "upstream"
    state: State = "ready"
    context_length: int | None = None
    waiting = 0

    def __init__(self, settings: UpstreamModel) -> None:
        self.provider = Provider(
            settings.base_url,
            connect_s=settings.timeouts.upstream_connect_s,
            buffer_bytes=settings.limits.stream_buffer_bytes,
        )
        self._settings = settings

    async def generate(self, job: Job, timeout_s: float, tried: Callable[[Stream], None]) -> UpstreamStream:
        """A stream of what the provider answers. It is asked once: who wants to try again is the client."""
        key = self._key(job)
        body = request_body(job, self._settings.upstream_name)
        stream = UpstreamStream(self.provider, job, key, self._settings.timeouts)
        tried(stream)
        try:
            await stream.start(body)
        except BaseException:
            stream.close()
            raise
        return stream

    def check(self, job: Job) -> None:
        self._key(job)

    async def close(self) -> None:
        await self.provider.close()

    def _key(self, job: Job) -> SecretStr:
        # Where the deployment has a key the caller's stays here: clients send one provider's key with every
        # request, whoever is asked.
        key = self._settings.api_key or job.provider_key
        if key is None or not is_provider_key(key.get_secret_value()):
            raise MissingProviderKey(job.request.model)
        return key


class UpstreamStream:
    """One request at a provider. The provider is read no faster than the client reads."""

    def __init__(self, provider: Provider, job: Job, key: SecretStr, timeouts: ModelTimeouts) -> None:
        self.accepted = False
        self.overflowed: Callable[[SlowReader], None] | None = None
        self.direct: Direct | None = None
        self._provider = provider
        # Of the job no more is kept than is needed: a conversation may be long, and so may an answer take.
        self._path = "/chat/completions" if isinstance(job.request, Chat) else "/completions"
        self._request_id = job.key
        self._key = key
        self._timeouts = timeouts
        self._relay = relay(Asked.by(job.request), key)
        self._answer: Answer | None = None

    @property
    def prompt_tokens(self) -> int:
        return self._relay.prompt_tokens

    @property
    def completion_tokens(self) -> int | None:
        return self._relay.completion_tokens

    @property
    def replica(self) -> str:
        return self._provider.host

    async def start(self, body: bytes) -> None:
        """Returns when there is something to read. Raises ApiError."""
        seconds = self._timeouts.first_token_s
        async with within(seconds, FirstTokenTimeout(seconds)):
            answer = self._answer = await self._provider.post(self._path, body, self._key, self._request_id)
            if answer.status != 200:
                raise await self._refusal(answer)
            self.accepted = True
            while not self._relay.begun:
                self._relay.feed(await answer.read())

    async def read(self) -> Piece:
        seconds = self._timeouts.stall_s
        while (piece := self._relay.take()) is None:
            async with within(seconds, Stalled(seconds)):
                self._relay.feed(await self._answer.read() if self._answer else b"")
        return piece

    def close(self) -> None:
        self.overflowed = self.direct = None
        answer, self._answer = self._answer, None
        if answer is None:
            return
        if self._relay.done:
            answer.end()
        else:
            answer.close()

    async def _refusal(self, answer: Answer) -> ApiError:
        """What the provider says instead of an answer."""
        if not 400 <= answer.status < 600:
            return UpstreamFailed(f"the provider answered with status {answer.status}, which is no answer")
        body = b""
        with suppress(TimeoutError, ApiError):
            async with asyncio.timeout(REFUSAL_S):
                while len(body) < REFUSAL_BYTES and (more := await answer.read()):
                    body += more
        return provider_error(answer.status, body, self._key, answer.headers)


def request_body(job: Job, upstream_name: str) -> bytes:
    """What the provider is asked: the client's own JSON, under the name that the model has there.

    Of the two names of max_tokens one is sent: there are providers that refuse both. A neutral
    repetition_penalty is left out, as many do not know the field; any other goes as it was given, and what it
    means is the provider's to say: additive or multiplicative.
    """
    sampling = job.request.sampling
    fields = {name: value for name, value in job.data.items() if value is not None}
    fields["model"] = upstream_name
    if "max_completion_tokens" in fields:
        fields.pop("max_tokens", None)
    else:
        fields.setdefault("max_tokens", sampling.max_tokens)
    if sampling.repetition_penalty == 0 and sampling.repetition_factor == 1:
        fields.pop("repetition_penalty", None)
    if job.request.stream:
        # What was used is always asked for; the relay keeps it from clients that did not ask.
        fields["stream_options"] = {**fields.get("stream_options", {}), "include_usage": True}
    written = to_json(fields)
    if b"Infinity" in written and (found := _infinite(fields)) is not None:
        # No other number is one to everybody who reads JSON.
        raise wrong(found[0], "a number from -1.8e308 to 1.8e308", found[1])
    return written


def _infinite(value: Any, path: str = "") -> tuple[str, float] | None:
    """The first number in some JSON that was too large to be one, and where it stands."""
    if isinstance(value, dict):
        places = ((f"{path}.{name}".removeprefix("."), each) for name, each in value.items())
    elif isinstance(value, list):
        places = ((f"{path}[{number}]", each) for number, each in enumerate(value))
    else:
        return (path, value) if isinstance(value, float) and math.isinf(value) else None
    return next(filter(None, (_infinite(each, place) for place, each in places)), None)
