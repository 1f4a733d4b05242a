"""Limits counted in Redis, where several routers count together.

Redis decides: a reservation is one script there, and its clock is the only one. What a request holds, it
holds by a lease, which its router renews while the request runs, so that what a dead router's requests held
comes back by itself. A router that returns to Redis after its leases have ended takes again what its requests
hold, whether there is room or not.

A reservation and its settlement are about 60 microseconds of Redis, so that one of them serves some ten
thousand requests a second. Past that, the keys of one key's requests would have to be on several.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import structlog
from limits.aio.storage import RedisStorage
from limits.aio.storage.redis.bridge import RedisBridge

from router.accounts import meter
from router.accounts.limits import Bound, Claim
from router.accounts.meter import (
    SLICES,
    WINDOW_S,
    Grant,
    Questions,
    Rate,
    RequestWindows,
    Spent,
    Standing,
    headers,
    month,
    nano_limit,
    refusal,
    token_rates,
)
from router.accounts.redis_wire import PATIENCE_S, Message, Script, Wire
from router.errors import LimitsUnavailable

log = structlog.get_logger(__name__)

LEASE_S = 30.0
"""Seconds after which what a dead router's requests held is free again."""

RENEWALS = 3
"""Of each lease, before it would end."""

RENEWED_AT_ONCE = 1000
"""Leases in one script: Redis does nothing else meanwhile."""

_SCRIPT = Script(Path(__file__).with_name("meter.lua").read_text())

_REFUSED, _UNKNOWN = 0, 2
"""What the script answers, as in meter.lua."""


class RedisMeter:
    """Counts together with every other router that has the same Redis."""

    def __init__(
        self,
        url: str,
        spent: Spent,
        *,
        window_s: int = WINDOW_S,
        lease_s: float = LEASE_S,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """Connects to nothing yet. `window_s`: the seconds of a minute; within `patience_s` Redis has to
        answer. Raises ValueError where `url` is none of Redis."""
        self._wire = Wire(url, patience_s)
        self._windows = RequestWindows(_Windows(self._wire), window_s)
        self._questions = Questions(spent)
        self._slice_us = window_s * 1_000_000 // SLICES
        self._lease_us = int(lease_s * 1_000_000)
        self._living: dict[str, _Grant] = {}
        self._renewer: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<limits in Redis: {len(self._living)} requests hold something, {self._wire!r}>"

    async def reserve(self, request: str, claims: Sequence[Claim], bound: Bound) -> Grant:
        return await meter.reserve(claims, bound, self._windows, partial(self._hold, request, bound))

    async def recount(self, scope: str) -> None:
        await self._wire.ask(Message(_SCRIPT, [_money_key(scope, month())], ["recount"]))

    async def close(self) -> None:
        if self._renewer is not None:
            self._renewer.cancel()
            await asyncio.wait([self._renewer])
        await self._wire.close()

    async def _hold(
        self, request: str, bound: Bound, claims: Sequence[Claim], rates: Sequence[Rate]
    ) -> Grant:
        grant = _Grant(self, request, claims, bound, month())
        while True:
            status, *numbers = await self._ask_for(grant)
            if status != _UNKNOWN:
                break
            await self._learn(grant, numbers)
        standings = [Standing(*numbers[at : at + 5]) for at in range(1, len(numbers), 5)]
        if status == _REFUSED:
            raise refusal(claims, bound, standings, rates)
        grant.slice = numbers[0]
        grant.headers = headers(rates, token_rates(claims, bound, standings))
        self._living[request] = grant
        if self._renewer is None:
            self._renewer = asyncio.create_task(self._renew())
        return grant

    async def _ask_for(self, grant: _Grant) -> list[int]:
        message = grant.reservation()
        try:
            answer: list[int] = await self._wire.ask(message)
        except BaseException:
            if message.sent:
                # It may hold what nobody will ever give back.
                self._wire.tell(grant.dropping())
            raise
        return answer

    async def _learn(self, grant: _Grant, questions: Sequence[int]) -> None:
        """Ask the ledger what Redis does not know."""
        for (scope, _), number in zip(grant.claims, questions, strict=True):
            if number:
                spent = await self._questions.ask(scope, grant.month, number)
                key = _money_key(scope, grant.month)
                await self._wire.ask(Message(_SCRIPT, [key], ["learn", number, spent]))

    def end(self, grant: _Grant, message: Message) -> None:
        """A request runs no more, and Redis is to know by this."""
        self._living.pop(grant.request, None)
        self._wire.tell(message)

    @property
    def lease_us(self) -> int:
        """Microseconds that a lease lasts unless it is renewed."""
        return self._lease_us

    @property
    def slice_us(self) -> int:
        """Microseconds in which tokens are counted together."""
        return self._slice_us

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._lease_us / 1_000_000 / RENEWALS)
            living = list(self._living)
            for at in range(0, len(living), RENEWED_AT_ONCE):
                await self._renew_some(living[at : at + RENEWED_AT_ONCE])

    async def _renew_some(self, requests: Sequence[str]) -> None:
        try:
            lost: list[bytes] = await self._wire.ask(
                Message(_SCRIPT, [], ["renew", self._lease_us, *requests])
            )
        except LimitsUnavailable:
            return
        for request in lost:
            if grant := self._living.get(request.decode()):
                self._wire.tell(grant.reservation())
        if lost:
            log.warning("leases had ended and were taken again", requests=len(lost))


class _Grant:
    """What one request holds."""

    __slots__ = ("_bound", "_over", "_owner", "claims", "headers", "month", "request", "slice")

    def __init__(
        self, owner: RedisMeter, request: str, claims: Sequence[Claim], bound: Bound, month: str
    ) -> None:
        self.headers: tuple[tuple[str, str], ...] = ()
        self.request = request
        self.claims = claims
        self.month = month
        """The one that is charged."""
        self.slice: int | None = None
        """The slice of time in which the request was let in."""
        self._owner = owner
        self._bound = bound
        self._over = False

    def settle(self, tokens: int, nano: int) -> None:
        if not self._over:
            self._over = True
            self._owner.end(self, self._settling(tokens, nano))

    def close(self) -> None:
        if not self._over:
            self._over = True
            self._owner.end(self, self.dropping())

    def reservation(self) -> Message:
        """What takes everything that is claimed: if there is room, or in any case once it has been taken."""
        keys: list[str] = []
        arguments: list[str | int] = ["reserve", self.request, self._owner.lease_us, self._owner.slice_us]
        arguments += [*self._bound, "" if self.slice is None else self.slice]
        for scope, limits in self.claims:
            keys += [_scope_key(scope), _money_key(scope, self.month)]
            each = (limits.tokens_per_minute, nano_limit(limits), limits.concurrent_requests)
            arguments += ["" if limit is None else limit for limit in each]
        return Message(_SCRIPT, keys, arguments)

    def dropping(self) -> Message:
        """What gives everything back."""
        return Message(_SCRIPT, [], ["drop", self.request])

    def _settling(self, tokens: int, nano: int) -> Message:
        scopes = [_scope_key(scope) for scope, limits in self.claims if limits.tokens_per_minute is not None]
        money = [
            _money_key(scope, self.month)
            for scope, limits in self.claims
            if limits.dollars_per_month is not None
        ]
        arguments: list[str | int] = ["settle", self.request, self.slice or 0]
        arguments += [tokens, nano, len(scopes)]
        return Message(_SCRIPT, [*scopes, *money], arguments)


def _scope_key(scope: str) -> str:
    return f"{{trunkline}}:scope:{scope}"


def _money_key(scope: str, month: str) -> str:
    return f"{{trunkline}}:money:{scope}:{month}"


# ---- requests per minute -------------------------------------------------------------------------------


def _by_its_own_clock(source: bytes, answer: str) -> Script:
    """A script of the library, whose first argument is a moment by the clock of the router that asks, made to
    take Redis's: the argument is what comes on top of that."""
    return Script(
        "local time = redis.call('TIME')\n"
        "local now = time[1] + time[2] / 1000000\n"
        "ARGV[1] = string.format('%.6f', now + ARGV[1])\n"
        f"local function library()\n{source.decode()}\nend\n"
        f"local answer = library()\n{answer}\n"
    )


_ACQUIRE = _by_its_own_clock(RedisBridge.SCRIPT_ACQUIRE_MOVING_WINDOW, "return answer")
_LOOK = _by_its_own_clock(
    RedisBridge.SCRIPT_MOVING_WINDOW,
    "return answer and {string.format('%.0f', (now - answer[1]) * 1000000), answer[2]}",
)


class _Windows(RedisStorage):
    """The library's storage in Redis, over our wire and by Redis's clock."""

    def __init__(self, wire: Wire) -> None:
        super().__init__("async+redis://", implementation="redispy", key_prefix="{trunkline}:requests")
        self._wire = wire

    async def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        arguments = [0, limit, expiry, amount]
        return bool(await self._wire.ask(Message(_ACQUIRE, [self.bridge.prefixed_key(key)], arguments)))

    async def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        answer: Any = await self._wire.ask(Message(_LOOK, [self.bridge.prefixed_key(key)], [-expiry, limit]))
        if not answer:
            return time.monotonic(), 0
        age_us, requests = answer
        return time.monotonic() - int(age_us) / 1_000_000, requests
