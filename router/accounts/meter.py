"""Limits, counted: what a request holds of them while it runs. `MemoryMeter` counts for one router alone,
`RedisMeter` for several together.

Of tokens and money a request reserves the most that it can use before it is let in, and what it did not use
is given back when it ends. So no limit is ever exceeded, and none is looked at twice.

- Requests are counted with the library `limits`, in a window that moves. All windows are looked at before
  any of them counts; where another request takes the last place in one of them just then, those before it
  have counted a request that is refused.
- Tokens are counted in slices, a sixtieth of the window each. What a request has used counts in the slice in
  which it was let in, until all of that slice has left the window: up to a second longer than a minute. In
  exchange a scope costs as much with a thousand requests a second as with one. What a running request has
  reserved counts for as long as it runs.
- Money counts in the month, by UTC, in which its request was let in. What was spent before a counter was
  there is asked of the ledger: once, unless a request is lost whose price the ledger alone may know.
- A request that is refused takes nothing.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import NamedTuple, Protocol, TypeVar

from limits import RateLimitItemPerSecond
from limits.aio.storage import Storage
from limits.aio.strategies import MovingWindowRateLimiter

from router.accounts.limits import Bound, Claim, scope_of
from router.accounts.money import dollars, nano
from router.accounts.settings import Limits
from router.errors import MAX_RETRY_AFTER, ApiError, QuotaExceeded, RateLimited, shown

__all__ = ["Bound", "Claim", "Grant", "Meter", "Spent"]

WINDOW_S = 60
"""Seconds of requests and tokens per minute."""

SLICES = 60
"""Parts of a window."""

SOON_US = 1_000_000
"""What is said where a request has to wait until others end: nobody knows when that will be."""

Spent = Callable[[str, str], Awaitable[int]]
"""Asks the ledger what a scope has spent in a month, `2026-11`, in nano-dollars."""

T = TypeVar("T")


class Grant(Protocol):
    """What one request holds of its limits."""

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """OpenAI's `x-ratelimit-*`, of whichever limit has the least left: what there is, what is left, and
        how long it is until more is."""

    def settle(self, tokens: int, nano: int) -> None:
        """So much was used, in the place of what was reserved, and the request runs no more.

        The first call counts, and any after it is none. Never waits.
        """

    def close(self) -> None:
        """The request used nothing: only that there was one counts. After `settle` this does nothing."""


class Meter(Protocol):
    """Counts what is used of limits."""

    async def reserve(self, request: str, claims: Sequence[Claim], bound: Bound) -> Grant:
        """Take `bound` of all the claims, or of none. `request`: an id that no other request has.

        Raises RateLimited (requests and tokens per minute, concurrent requests), QuotaExceeded (money),
        LimitsUnavailable where nobody can count, and whatever asking the ledger raises.
        """

    async def recount(self, scope: str) -> None:
        """Ask the ledger again what the scope has spent in this month, before it spends more: its limits have
        changed, and requests that fell under none were not counted."""

    async def close(self) -> None:
        """Count no more."""


class Free:
    """What a request holds whose limits have nothing to give back."""

    __slots__ = ("headers",)

    def __init__(self, headers: tuple[tuple[str, str], ...] = ()) -> None:
        self.headers = headers

    def settle(self, tokens: int, nano: int) -> None:
        """Nothing was reserved."""

    def close(self) -> None:
        """Nothing was reserved."""


FREE = Free()
"""For every request without limits."""


class Rate(NamedTuple):
    """How a limit per minute stands once a request is let in."""

    limit: int
    remaining: int
    reset_us: int
    """Microseconds until the oldest of what counts leaves the window."""


class Standing(NamedTuple):
    """How a scope stands before a request is let in."""

    running: int
    tokens: int
    """Used in the window, and reserved."""
    nano: int
    """Spent in the month, and reserved."""
    reset_us: int
    """Microseconds until the oldest of its tokens leave the window."""
    room_us: int
    """Microseconds until as many have left it as the request lacks; -1 where it needs others to end."""


# ---- which claims count --------------------------------------------------------------------------------


def rated(claims: Iterable[Claim]) -> list[tuple[str, int]]:
    """The claims' scopes whose requests per minute are limited, with the limits."""
    return [
        (scope, limits.requests_per_minute)
        for scope, limits in claims
        if limits.requests_per_minute is not None
    ]


def held(claims: Iterable[Claim]) -> list[Claim]:
    """The claims of which a request holds something while it runs."""
    return [
        claim
        for claim in claims
        if claim.limits.tokens_per_minute is not None
        or claim.limits.concurrent_requests is not None
        or claim.limits.dollars_per_month is not None
    ]


def nano_limit(limits: Limits) -> int | None:
    """The money of a month, in nano-dollars."""
    return None if limits.dollars_per_month is None else nano(limits.dollars_per_month)


def month() -> str:
    """The month that a request which is let in now is charged to: `2026-11`."""
    # By this router's clock, as the ledger's is.
    now = time.gmtime()
    return f"{now.tm_year:04}-{now.tm_mon:02}"


# ---- refusals ------------------------------------------------------------------------------------------


def refuse_impossible(claims: Iterable[Claim], bound: Bound) -> None:
    """Raises RateLimited or QuotaExceeded where the request would not fit if it were alone."""
    for claim in claims:
        limit = claim.limits.tokens_per_minute
        if limit is not None and bound.tokens > limit:
            raise RateLimited(
                f"tokens_per_minute: a request that may use {bound.tokens} tokens can never fit into"
                f" {_whose(claim.scope)} limit of {limit}",
                retry_after=MAX_RETRY_AFTER,
                never=True,
            )
        money = nano_limit(claim.limits)
        if money is not None and bound.nano > money:
            raise QuotaExceeded(
                f"dollars_per_month: a request that may cost {dollars(bound.nano)} can never fit into"
                f" {_whose(claim.scope)} limit of {dollars(money)}"
            )


def refusal(
    claims: Sequence[Claim], bound: Bound, standings: Sequence[Standing], rates: Sequence[Rate]
) -> ApiError:
    """Why the request is not let in now: for want of money, or of what takes longest to come. `rates`: of its
    requests per minute, as they would be."""
    lacks: list[tuple[int, str]] = []
    for (scope, limits), standing in zip(claims, standings, strict=True):
        money = nano_limit(limits)
        if money is not None and standing.nano + bound.nano > money:
            return QuotaExceeded(
                f"dollars_per_month: {_whose(scope)} limit of {dollars(money)} has"
                f" {dollars(max(0, money - standing.nano))} left, and this request may cost"
                f" {dollars(bound.nano)}"
            )
        limit = limits.tokens_per_minute
        if limit is not None and standing.tokens + bound.tokens > limit:
            has = max(0, limit - standing.tokens)
            message = (
                f"tokens_per_minute: {_whose(scope)} limit of {limit} has {has} left now,"
                f" and this request may use {bound.tokens}"
            )
            lacks.append((SOON_US if standing.room_us < 0 else standing.room_us, message))
        limit = limits.concurrent_requests
        if limit is not None and standing.running + 1 > limit:
            lacks.append((SOON_US, f"concurrent_requests: {_whose(scope)} limit of {limit} is reached"))
    wait_us, message = max(lacks)
    unused = [Rate(rate.limit, rate.remaining + 1, rate.reset_us) for rate in rates]
    left = token_rates(claims, Bound(0, 0), standings)
    return RateLimited(message, retry_after=wait_us / 1e6, headers=dict(headers(unused, left)))


def _whose(scope: str) -> str:
    kind, _, model = scope_of(scope)
    if kind == "model":
        return f"the model {shown(model)}'s"
    whose = "the account's" if kind == "account" else "this key's"
    return f"{whose} {shown(model)}" if model else whose


# ---- headers -------------------------------------------------------------------------------------------


def token_rates(claims: Sequence[Claim], bound: Bound, standings: Sequence[Standing]) -> list[Rate]:
    """How the claims' limits of tokens stand once the request is let in."""
    return [
        Rate(limit, limit - standing.tokens - bound.tokens, standing.reset_us)
        for (_, limits), standing in zip(claims, standings, strict=True)
        if (limit := limits.tokens_per_minute) is not None
    ]


def headers(requests: Sequence[Rate], tokens: Sequence[Rate]) -> tuple[tuple[str, str], ...]:
    """What a client is told of its limits, by OpenAI's names."""
    return (*_headers("requests", requests), *_headers("tokens", tokens))


def _headers(what: str, rates: Sequence[Rate]) -> tuple[tuple[str, str], ...]:
    if not rates:
        return ()
    tightest = min(rates, key=_remaining)
    return (
        (f"x-ratelimit-limit-{what}", str(tightest.limit)),
        (f"x-ratelimit-remaining-{what}", str(max(0, tightest.remaining))),
        (f"x-ratelimit-reset-{what}", duration(tightest.reset_us)),
    )


def _remaining(rate: Rate) -> int:
    return rate.remaining


def duration(microseconds: int) -> str:
    """As OpenAI writes it, rounded up to milliseconds: `20ms`, `1.5s`, `6m0s`."""
    milliseconds = max(1, -(-microseconds // 1000))
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, milliseconds = divmod(milliseconds, 60_000)
    seconds = f"{milliseconds / 1000:g}s"
    return f"{minutes}m{seconds}" if minutes else seconds


# ---- requests per minute -------------------------------------------------------------------------------


class _Item(RateLimitItemPerSecond):
    """So many requests in a window, which goes on when their number is changed."""

    def key_for(self, *identifiers: bytes | str | float) -> str:
        return "/".join(map(str, identifiers))


class RequestWindows:
    """Requests per minute, by the library's strategy for windows that move."""

    def __init__(self, storage: Storage, window_s: int) -> None:
        """The storage tells by `time.monotonic` when a window began."""
        self._limiter = MovingWindowRateLimiter(storage)
        self._window_s = window_s

    async def look(self, limits: Sequence[tuple[str, int]]) -> list[Rate]:
        """How the scopes will stand when one more request has been counted, each with its limit. Raises
        RateLimited where it cannot be."""
        rates = await _each([self._look(*each) for each in limits])
        fullest = max(range(len(rates)), key=lambda at: rates[at].reset_us if rates[at].remaining < 0 else -1)
        if rates[fullest].remaining < 0:
            raise _too_many(limits[fullest][0], rates[fullest])
        return rates

    async def count(self, limits: Sequence[tuple[str, int]]) -> None:
        """Count one more request. Raises RateLimited where others have come first."""
        counted = await _each([self._limiter.hit(self._item(limit), scope) for scope, limit in limits])
        for (scope, limit), was_counted in zip(limits, counted, strict=True):
            if not was_counted:
                raise _too_many(scope, await self._look(scope, limit))

    async def _look(self, scope: str, limit: int) -> Rate:
        reset_s, remaining = await self._limiter.get_window_stats(self._item(limit), scope)
        return Rate(limit, remaining - 1, math.ceil((reset_s - time.monotonic()) * 1e6))

    def _item(self, limit: int) -> _Item:
        return _Item(limit, self._window_s)


def _too_many(scope: str, rate: Rate) -> RateLimited:
    return RateLimited(
        f"requests_per_minute: {_whose(scope)} limit of {rate.limit} is reached",
        retry_after=rate.reset_us / 1e6,
        headers=dict(headers([rate], [])),
    )


async def _each(coroutines: Sequence[Awaitable[T]]) -> list[T]:
    """The result of each, all at once where there are several."""
    if len(coroutines) == 1:
        return [await coroutines[0]]
    return await asyncio.gather(*coroutines)


# ---- all together --------------------------------------------------------------------------------------

Hold = Callable[[Sequence[Claim], Sequence[Rate]], Awaitable[Grant]]
"""Takes tokens, money and a place among the running of all claims, or of none. The rates are those of
requests per minute, for the headers."""


async def reserve(claims: Sequence[Claim], bound: Bound, windows: RequestWindows, hold: Hold) -> Grant:
    """What a meter does. Raises what `Meter.reserve` does."""
    refuse_impossible(claims, bound)
    counting, holding = rated(claims), held(claims)
    if not counting and not holding:
        return FREE
    rates = await windows.look(counting) if counting else []
    grant = await hold(holding, rates) if holding else Free(headers(rates, []))
    if counting:
        try:
            await windows.count(counting)
        except BaseException:
            grant.close()
            raise
    return grant


# ---- what was spent ------------------------------------------------------------------------------------


class Questions:
    """What is being asked of the ledger: whoever wants to know the same waits for the same answer."""

    def __init__(self, spent: Spent) -> None:
        self._spent = spent
        self._asked: dict[tuple[str, str, int], asyncio.Task[int]] = {}

    async def ask(self, scope: str, month: str, number: int) -> int:
        """Nano-dollars that a scope has spent in a month. `number`: of the question, as the same one may have
        to be asked again later."""
        key = (scope, month, number)
        if (asked := self._asked.get(key)) is None:
            asked = self._asked[key] = asyncio.ensure_future(self._answer(scope, month))
            asked.add_done_callback(lambda _: self._asked.pop(key, None))
        # Whoever asked first may leave before the answer is there.
        return await asyncio.shield(asked)

    async def _answer(self, scope: str, month: str) -> int:
        return await self._spent(scope, month)
