"""One request in the ledger, from its caller's being known to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from time import monotonic

from router.accounts.keys import Key
from router.accounts.ledger import Ledger
from router.accounts.meter import Grant
from router.accounts.row import Row
from router.accounts.settings import Price
from router.gate import Settlement
from router.settings import ModelSettings
from serving.messages import Request

Reserve = Callable[[Key, str, ModelSettings, Request, int, int | None], Awaitable[Grant | None]]
"""Holds of a key's limits what a request can use at most; None where nothing limits it. Raises ApiError."""

Ended = Callable[[Key, str, float], None]
"""Told when a request of a key for a model, let in at that moment of `monotonic`, has been charged."""

KEPT_TEXT = 64 * 1024
"""Bytes of what was asked, and of what was answered, that the ledger keeps where it keeps them."""


class Entry:
    """What the ledger says of one request, and what the request holds of its key's limits."""

    __slots__ = (
        "_answered",
        "_ended",
        "_grant",
        "_key",
        "_ledger",
        "_model",
        "_price",
        "_reserve",
        "_row",
        "_since",
        "_written",
        "caller",
        "keeps_text",
    )

    def __init__(
        self,
        ledger: Ledger,
        reserve: Reserve,
        ended: Ended,
        key: Key,
        row: Row,
        *,
        keeps_text: bool = False,
    ) -> None:
        self.caller = key.id
        self._ended = ended
        self.keeps_text = keeps_text
        self._answered = bytearray()
        self._key = key
        self._row = row
        self._price = Price()
        self._ledger = ledger
        self._reserve = reserve
        self._grant: Grant | None = None
        self._model = ""
        self._since = 0.0
        """For which model the request was let in, and when."""
        self._written: asyncio.Future[None] | None = None

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        return () if self._grant is None else self._grant.headers

    async def admit(
        self, model: ModelSettings, request: Request, body_bytes: int, context: int | None
    ) -> None:
        row = self._row
        row.model, row.stream, self._price = request.model, request.stream, model.price
        self._model, self._since = model.name, monotonic()
        self._grant = await self._reserve(self._key, row.id, model, request, body_bytes, context)
        # It is on its way to the store while the answer's first bytes are made.
        self._written = self._ledger.put(row)

    def asked(self, body: bytes) -> None:
        if self.keeps_text:
            self._row.asked = _text(body)

    def answered(self, data: bytes) -> None:
        if len(self._answered) < KEPT_TEXT:
            self._answered += data

    async def written(self) -> None:
        if self._written is not None and not self._written.done():
            # Many rows share what is waited for.
            await asyncio.shield(self._written)

    def settle(self, end: Settlement) -> None:
        row = self._row
        row.outcome, row.status, row.model = end.outcome, end.status, end.model
        # What a provider has called an error, and its host's name, may be longer than there is room for.
        row.error, row.replica = end.error[:64], end.replica[:200]
        row.prompt_tokens, row.completion_tokens = end.prompt_tokens, end.completion_tokens
        row.first_us, row.duration_us = end.first_us, end.duration_us
        if self.keeps_text:
            row.answered = _text(self._answered)
        row.price_nano = self._price.of(end.prompt_tokens, end.completion_tokens)
        if self._written is None and self._ledger.full:
            return  # it was never let in: of those there may be any number while the store is away
        self._written = self._ledger.put(row)
        # Not before: who asks the ledger in between what was spent must find it there, or here.
        self._written.add_done_callback(self._charge)

    def _charge(self, _: object) -> None:
        row = self._row
        if self._grant is not None:
            self._grant.settle(row.prompt_tokens + row.completion_tokens, row.price_nano)
        if self._model:
            self._ended(self._key, self._model, self._since)


def _text(data: bytes | bytearray) -> str:
    """The beginning of a body as every store takes it."""
    return data[:KEPT_TEXT].decode(errors="replace").replace("\0", "\N{REPLACEMENT CHARACTER}")
