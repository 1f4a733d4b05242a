"""Limits counted in memory, where there is one router."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from functools import partial

from limits.aio.storage import MemoryStorage

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
)
from router.accounts.settings import Limits

FORGET_FROM = 1024
"""Scopes from which on those are forgotten of which nothing counts any more."""


class MemoryMeter:
    """Counts for this process alone. What was used dies with it, but for money, which the ledger knows."""

    def __init__(self, spent: Spent, *, window_s: int = WINDOW_S) -> None:
        """`window_s`: the seconds of a minute."""
        self._slice_us = window_s * 1_000_000 // SLICES
        self._windows = RequestWindows(_Windows(), window_s)
        self._questions = Questions(spent)
        self._scopes: dict[str, _Scope] = {}
        self._money: dict[tuple[str, str], _Money] = {}
        self._forget_from = FORGET_FROM
        self._asked = 0
        """Questions to the ledger so far, by which each has a number."""

    def __repr__(self) -> str:
        running = max((scope.running for scope in self._scopes.values()), default=0)
        return f"<limits in memory: {len(self._scopes)} scopes, at most {running} requests in one>"

    async def reserve(self, request: str, claims: Sequence[Claim], bound: Bound) -> Grant:
        return await meter.reserve(claims, bound, self._windows, partial(self._hold, bound))

    async def recount(self, scope: str) -> None:
        if money := self._money.get((scope, month())):
            money.known, money.asking = False, 0

    async def close(self) -> None:
        """There is nothing to close."""

    async def _hold(self, bound: Bound, claims: Sequence[Claim], rates: Sequence[Rate]) -> Grant:
        # Not later: what this request is about to take must not be among it.
        if len(self._scopes) >= self._forget_from:
            self._forget()
        now_month = ""
        if any(claim.limits.dollars_per_month is not None for claim in claims):
            now_month = month()
            while unknown := self._unknown(claims, now_month):
                await self._ask(unknown, now_month)
        return self._take(bound, claims, rates, now_month)

    def _unknown(self, claims: Sequence[Claim], now_month: str) -> str:
        """A scope of which nobody knows what it has spent, if there is one."""
        for scope, limits in claims:
            if limits.dollars_per_month is not None:
                money = self._money.setdefault((scope, now_month), _Money())
                if not money.known:
                    return scope
        return ""

    async def _ask(self, scope: str, now_month: str) -> None:
        money = self._money[scope, now_month]
        if not money.asking:
            self._asked += 1
            money.asking = self._asked
            # Of what has been charged so far the ledger knows, and it will tell.
            money.spent = 0
        number = money.asking
        spent = await self._questions.ask(scope, now_month, number)
        if money.asking == number:
            money.known, money.asking = True, 0
            money.spent += spent

    def _take(self, bound: Bound, claims: Sequence[Claim], rates: Sequence[Rate], now_month: str) -> Grant:
        """Everything that is claimed, or nothing. Raises RateLimited or QuotaExceeded."""
        now = time.monotonic_ns() // 1000
        grant = _Grant(now // self._slice_us, bound)
        fits, tokens = True, []
        for claim in claims:
            scope = self._scope(claim.scope, grant.slice)
            fits &= grant.fits(claim.limits, scope, self._money.get((claim.scope, now_month)))
            if (limit := claim.limits.tokens_per_minute) is not None:
                left = limit - scope.held - scope.used - bound.tokens
                tokens.append(Rate(limit, left, scope.reset_us(now, self._slice_us)))
        if not fits:
            standings = [self._standing(claim, now_month, bound, now) for claim in claims]
            raise refusal(claims, bound, standings, rates)
        grant.headers = headers(rates, tokens)
        grant.take()
        return grant

    def _standing(self, claim: Claim, now_month: str, bound: Bound, now: int) -> Standing:
        scope = self._scopes[claim.scope]
        money = self._money.get((claim.scope, now_month), _Money())
        lacking = scope.held + scope.used + bound.tokens - (claim.limits.tokens_per_minute or 0)
        return Standing(
            scope.running,
            scope.held + scope.used,
            money.spent + money.reserved,
            scope.reset_us(now, self._slice_us),
            scope.room_us(lacking, now, self._slice_us),
        )

    def _scope(self, name: str, at: int) -> _Scope:
        """What counts of a scope in the slice of time `at`."""
        scope = self._scopes.get(name)
        if scope is None:
            scope = self._scopes[name] = _Scope()
        scope.forget_before(at - SLICES)
        return scope

    def _forget(self) -> None:
        """Drop what counts nothing any more."""
        oldest = time.monotonic_ns() // 1000 // self._slice_us - SLICES
        for scope in self._scopes.values():
            scope.forget_before(oldest)
        self._scopes = {
            name: scope for name, scope in self._scopes.items() if scope.running or scope.held or scope.slices
        }
        now_month = month()
        self._money = {
            key: money for key, money in self._money.items() if key[1] == now_month or money.reserved
        }
        self._forget_from = max(FORGET_FROM, 2 * len(self._scopes))


class _Scope:
    """What counts of a scope's requests and tokens."""

    __slots__ = ("held", "oldest", "running", "slices", "used")

    def __init__(self) -> None:
        self.running = 0
        self.held = 0
        """Tokens reserved by requests that run."""
        self.used = 0
        """Tokens of all slices."""
        self.slices: dict[int, int] = {}
        """Tokens used by the requests that were let in during each slice of time."""
        self.oldest = 0
        """The first of the slices, where there are any."""

    def use(self, tokens: int, at: int) -> None:
        """Count tokens in a slice."""
        self.oldest = min(self.oldest, at) if self.slices else at
        self.slices[at] = self.slices.get(at, 0) + tokens
        self.used += tokens

    def forget_before(self, first: int) -> None:
        """Drop the slices that have left the window, which begins with `first`."""
        if self.slices and self.oldest < first:
            for at in [at for at in self.slices if at < first]:
                self.used -= self.slices.pop(at)
            self.oldest = min(self.slices, default=0)

    def reset_us(self, now: int, slice_us: int) -> int:
        """Microseconds until the oldest of its tokens leave the window."""
        oldest = self.oldest if self.slices else now // slice_us
        return (oldest + SLICES + 1) * slice_us - now

    def room_us(self, lacking: int, now: int, slice_us: int) -> int:
        """Microseconds until as many tokens have left it, or -1 where it has not as many."""
        for at in sorted(self.slices):
            lacking -= self.slices[at]
            if lacking <= 0:
                return (at + SLICES + 1) * slice_us - now
        return -1


class _Money:
    """What counts of a scope's money in one month, in nano-dollars."""

    __slots__ = ("asking", "known", "reserved", "spent")

    def __init__(self) -> None:
        self.known = False
        """Whether `spent` has what was spent before it was counted here."""
        self.asking = 0
        """The number of the question by which that will be known; 0 where it has not been asked."""
        self.spent = 0
        self.reserved = 0


class _Grant:
    """What one request holds."""

    __slots__ = ("_bound", "_held", "_money", "_running", "_scopes", "headers", "slice")

    def __init__(self, at: int, bound: Bound) -> None:
        """`at`: the slice of time in which the request is let in."""
        self.headers: tuple[tuple[str, str], ...] = ()
        self.slice = at
        self._scopes: list[_Scope] = []
        """Of which it has tokens."""
        self._running: list[_Scope] = []
        """In which it is one of the requests at this moment."""
        self._money: list[_Money] = []
        self._bound = bound
        self._held = False

    def fits(self, limits: Limits, scope: _Scope, money: _Money | None) -> bool:
        """Whether there is room for what `take` will take under these limits."""
        fits = True
        if limits.tokens_per_minute is not None:
            self._scopes.append(scope)
            fits = scope.held + scope.used + self._bound.tokens <= limits.tokens_per_minute
        if limits.concurrent_requests is not None:
            self._running.append(scope)
            fits &= scope.running < limits.concurrent_requests
        if money is not None and (limit := nano_limit(limits)) is not None:
            self._money.append(money)
            fits &= money.spent + money.reserved + self._bound.nano <= limit
        return fits

    def take(self) -> None:
        """Reserve what may be used."""
        self._held = True
        for scope in self._running:
            scope.running += 1
        for scope in self._scopes:
            scope.held += self._bound.tokens
        for money in self._money:
            money.reserved += self._bound.nano

    def settle(self, tokens: int, nano: int) -> None:
        if not self._held:
            return
        self._held = False
        for scope in self._running:
            scope.running -= 1
        for scope in self._scopes:
            scope.held -= self._bound.tokens
            if tokens:
                scope.use(tokens, self.slice)
        for money in self._money:
            money.reserved -= self._bound.nano
            money.spent += nano

    def close(self) -> None:
        self.settle(0, 0)


class _Windows(MemoryStorage):
    """The library's storage in memory, where no request pays for the others' windows: in the library's own
    each has a thread look at all of them, and waits while that is at its own."""

    def __init__(self) -> None:
        super().__init__()
        self._windows: dict[str, deque[float]] = {}
        self._forget_from = FORGET_FROM

    async def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        now = time.monotonic()
        window = self._windows.get(key)
        if window is None:
            if len(self._windows) >= self._forget_from:
                self._forget(now - expiry)
            window = self._windows[key] = deque()
        _forget_before(window, now - expiry)
        if len(window) + amount > limit:
            return False
        window.extend([now] * amount)
        return True

    async def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        now = time.monotonic()
        window = self._windows.get(key)
        if window is None:
            return now, 0
        _forget_before(window, now - expiry)
        return (window[0] if window else now), len(window)

    def _forget(self, before: float) -> None:
        """Drop the windows in which nothing is any more."""
        for window in self._windows.values():
            _forget_before(window, before)
        self._windows = {key: window for key, window in self._windows.items() if window}
        self._forget_from = max(FORGET_FROM, 2 * len(self._windows))


def _forget_before(window: deque[float], moment: float) -> None:
    while window and window[0] < moment:
        window.popleft()
