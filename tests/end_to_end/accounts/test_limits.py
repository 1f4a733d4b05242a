from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest

from router.accounts.limits import TEMPLATE_TOKENS
from router.accounts.row import Row
from tests.end_to_end.accounts import ECHO, PACED, SHARED, SHARED_PER_MINUTE
from tests.end_to_end.accounts.office import Issued, Office, bearer, is_settled, ledger, price
from tests.end_to_end.accounts.told import STREAM, Body, words
from tests.end_to_end.client import Exchange, asking, chat
from tests.end_to_end.conftest import Report
from tests.end_to_end.server import Server, until

CLIENTS = 16

MINUTE_US = 60_000_000

LONG = 60
"""Tokens of a streamed answer."""

RATE = "x-ratelimit-{}-{}"


class Trial(NamedTuple):
    """One request, by its client's clock in seconds."""

    answer: Exchange
    first_at: float
    """When its first bytes were there,"""
    still_at: float
    """and when some were there while others had still to be generated."""

    @property
    def admitted(self) -> bool:
        """Whether it was let in."""
        return self.answer.status == 200


class Press:
    """Clients who all ask for more than they may have, on new connections: any router may get them."""

    def __init__(self, server: Server, keys: Sequence[Issued], body: Body) -> None:
        """The clients share the keys."""
        self.trials: list[Trial] = []
        self._server = server
        self._keys = keys
        self._body = body
        self._names = (f"press-{id(self)}-{number}" for number in itertools.count())
        self._running = 0
        self._refusals = 0
        """How many are still waited for."""
        self._something_ended = asyncio.Event()

    async def all_at_once(self, refusals: int) -> list[Trial]:
        """Each asks again and again, where it was refused as soon as anything has ended, until there have
        been so many refusals."""
        self._refusals = refusals
        await asyncio.gather(*(self._client(self._keys[at % len(self._keys)]) for at in range(CLIENTS)))
        return self.trials

    async def until_refused(self) -> list[Trial]:
        """One request after the other, until nothing is left."""
        while (await self.ask(self._keys[0])).admitted:
            pass
        return self.trials

    async def ask(self, key: Issued) -> Trial:
        """One request."""
        headers = bearer(key.secret, x_request_id=next(self._names))
        async with asking(self._server, self._body, headers) as answer:
            await answer.first()
            admitted = answer.status == 200
            self._running += admitted
            first_at = still_at = answer.heard_at
            while not answer.ended.done():
                # All that was there has been read: what lacks of it had not been sent by then.
                if LONG - words(answer) > 5:
                    still_at = answer.heard_at
                await answer.more()
            await answer.end()
        self._running -= admitted
        if admitted:
            self._something_ended.set()
            self._something_ended = asyncio.Event()
        self.trials.append(Trial(answer, first_at, still_at))
        return self.trials[-1]

    async def _client(self, key: Issued) -> None:
        while self._refusals > 0:
            if not (await self.ask(key)).admitted:
                self._refusals -= 1
                if self._running:
                    await self._something_ended.wait()


async def test_no_more_run_at_once_than_may(
    server: Server, office: Office, store: str, report: Report
) -> None:
    """Of a key that may have five requests at one moment never more than five run, by the ledger and by the
    clocks of its clients, and five do; the others are told so."""
    limits = {"models": {PACED: {"concurrent_requests": 5, "requests_per_minute": 10_000}}}
    key = office.key("five at once", limits=limits)
    press = Press(server, [key], chat(PACED, "a b c", max_tokens=LONG) | STREAM)
    trials = await press.all_at_once(refusals=200)
    rows = await admitted(store, [key], trials)
    assert most(rows, lambda _: 1, lambda _: 0) == 5
    ran = [(trial.first_at, trial.still_at) for trial in trials if trial.admitted]
    assert 1 < max(sum(begun <= at <= still for begun, still in ran) for at, _ in ran) <= 5
    for trial in trials:
        assert_told(trial, "concurrent_requests", "requests", 10_000)
    report("five at once", f"{len(rows)} of {len(trials)} were let in, {by_router(rows)}")


@pytest.mark.parametrize("of_all", [False, True])
async def test_no_more_requests_a_minute_than_may(
    server: Server, office: Office, store: str, report: Report, of_all: bool
) -> None:
    """In a minute as many requests are let in as a key may make, or all keys together of a model, and not one
    more."""
    limit = SHARED_PER_MINUTE if of_all else 40
    limits = None if of_all else {"overall": {"requests_per_minute": limit}}
    keys = [office.key(f"some a minute {number}", limits=limits) for number in range(2 if of_all else 1)]
    press = Press(server, keys, chat(SHARED if of_all else ECHO, "a b c", max_tokens=3))
    trials = await press.all_at_once(refusals=60)
    rows = await admitted(store, keys, trials)
    assert len(rows) == limit
    for trial in trials:
        assert_told(trial, "requests_per_minute", "requests", limit)
    report(f"{limit} a minute, of_all={of_all}", f"of {len(trials)} were let in, {by_router(rows)}")


@pytest.mark.parametrize("stream", [False, True])
async def test_no_more_tokens_a_minute_than_may(
    server: Server, office: Office, store: str, report: Report, stream: bool
) -> None:
    """At no moment has a key used more tokens in a minute than it may, what its running requests may still
    use included; and it can use them until not one more request would be sure to fit."""
    limit = 4_000
    key = office.key("tokens", limits={"overall": {"tokens_per_minute": limit}})
    body = chat(PACED if stream else ECHO, "a b c " * 10, max_tokens=LONG) | (STREAM if stream else {})
    press = Press(server, [key], body)
    await press.all_at_once(refusals=500 if stream else 100)
    trials = await press.until_refused()
    rows = await admitted(store, [key], trials)
    bound, _ = at_most(body)
    peak = most(rows, lambda _: bound, tokens, MINUTE_US)
    assert limit - bound < peak <= limit
    assert limit - bound < sum(map(tokens, rows)) <= limit
    for trial in trials:
        assert_told(trial, "tokens_per_minute", "tokens", limit)
    report(f"{limit} tokens a minute, stream={stream}", f"used {sum(map(tokens, rows))}, at most {peak}")


async def test_no_more_money_a_month_than_may(
    server: Server, office: Office, store: str, report: Report
) -> None:
    """At no moment has a key cost more than it may, what its running requests may still cost included, to the
    last nano-dollar."""
    limit = 3_000_000
    key = office.key("money", limits={"models": {ECHO: {"dollars_per_month": "0.003"}}})
    body = chat(ECHO, "a b c", max_tokens=20)
    press = Press(server, [key], body)
    await press.all_at_once(refusals=100)
    trials = await press.until_refused()
    rows = await admitted(store, [key], trials)
    _, bound = at_most(body)
    peak = most(rows, lambda _: bound, lambda row: row.price_nano)
    assert limit - bound < peak <= limit
    assert limit - bound < sum(row.price_nano for row in rows) <= limit
    for trial in trials:
        if not trial.admitted:
            assert (trial.answer.status, trial.answer.error["code"]) == (429, "insufficient_quota")
            assert trial.answer.error["message"].startswith("dollars_per_month: ")
            assert trial.answer.headers["x-should-retry"] == "false"
    report(
        "0.003 dollars a month", f"nano-dollars spent {sum(row.price_nano for row in rows)}, at most {peak}"
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_no_window_has_more_than_may(
    server: Server, office: Office, store: str, report: Report
) -> None:
    """In none of all the windows of minutes in which clients ask as fast as they can is a limit of requests
    or of tokens exceeded, and as soon as there is room again, it is used."""
    limits = {"requests_per_minute": 50, "tokens_per_minute": 5_000}
    keys = [office.key(name, limits={"overall": {name: limit}}) for name, limit in limits.items()]
    body = chat(ECHO, "a b c " * 10, max_tokens=LONG)
    presses = [Press(server, [key], body) for key in keys]
    loop = asyncio.get_running_loop()
    end = loop.time() + 190
    await asyncio.gather(
        *(again_and_again(press, key, end) for press, key in zip(presses, keys, strict=True))
    )
    bound, _ = at_most(body)
    for press, key, (name, limit) in zip(presses, keys, limits.items(), strict=True):
        rows = await admitted(store, [key], press.trials)
        of_tokens = name == "tokens_per_minute"
        peak = most(rows, lambda _: bound, tokens, MINUTE_US) if of_tokens else most_began(rows)
        used = sum(map(tokens, rows)) if of_tokens else len(rows)
        assert (limit - bound if of_tokens else limit - 1) < peak <= limit
        assert used > 2.8 * limit
        report(f"{limit} {name}, over 190 s", f"used {used}, at most {peak}, {len(press.trials)} asked")


async def again_and_again(press: Press, key: Issued, end: float) -> None:
    """Some clients that ask until then, a few times a second each."""
    loop = asyncio.get_running_loop()

    async def client() -> None:
        while loop.time() < end:
            if not (await press.ask(key)).admitted:
                await asyncio.sleep(0.25)

    await asyncio.gather(*(client() for _ in range(CLIENTS)))


# ---- what the ledger says ------------------------------------------------------------------------------


async def admitted(store: str, keys: Sequence[Issued], trials: Sequence[Trial]) -> list[Row]:
    """The rows of what was let in; the ledger has all the others too, and both routers took some."""
    await asyncio.to_thread(until, lambda: is_settled(store), 10, "the end of every request")
    rows = ledger(store, [key.id for key in keys])
    statuses = Counter(trial.answer.status for trial in trials)
    assert Counter(row.status for row in rows) == statuses
    assert statuses.keys() == {200, 429}
    assert len({row.router for row in rows}) == 2
    return [row for row in rows if row.status == 200]


def most(
    rows: Sequence[Row],
    running: Callable[[Row], int],
    ended: Callable[[Row], int],
    window_us: int | None = None,
) -> int:
    """The most that counted at any moment, surely: of a request from its first bytes on what it counts while
    it runs, and after its end what it counts then, until it came as long ago as the window is."""

    def at(moment: int) -> int:
        return sum(
            running(row) if moment < row.began_us + (row.duration_us or 0) else ended(row)
            for row in rows
            if first_us(row) <= moment and (window_us is None or row.began_us > moment - window_us)
        )

    return max(at(first_us(row)) for row in rows)


def most_began(rows: Sequence[Row]) -> int:
    """The most requests that surely were let in within one minute."""
    return most(rows, lambda _: 1, lambda _: 1, MINUTE_US)


def first_us(row: Row) -> int:
    """When its first bytes went out: it had been let in by then."""
    assert row.first_us is not None
    return row.began_us + row.first_us


def tokens(row: Row) -> int:
    """What counts of it under a limit of tokens."""
    return row.prompt_tokens + row.completion_tokens


def at_most(body: Body) -> tuple[int, int]:
    """The tokens and the nano-dollars that a request may use, as the router can tell: a token of the prompt
    stands for a byte of the body at least."""
    prompt_tokens = len(json.dumps(body)) + TEMPLATE_TOKENS
    return prompt_tokens + body["max_tokens"], price(body["model"], prompt_tokens, body["max_tokens"])


def by_router(rows: Sequence[Row]) -> str:
    """How many each router has let in."""
    return f"by router {sorted(Counter(row.router for row in rows).values())}"


def assert_told(trial: Trial, limit: str, of: str, number: int) -> None:
    """Every answer says how its limit stands; a refusal says which one it was, and when to come back."""
    headers: dict[str, Any] = trial.answer.headers
    assert headers[RATE.format("limit", of)] == str(number)
    assert 0 <= int(headers[RATE.format("remaining", of)]) <= number
    assert headers[RATE.format("reset", of)].endswith("s")
    if not trial.admitted:
        assert (trial.answer.status, trial.answer.error["code"]) == (429, "rate_limit_exceeded")
        assert trial.answer.error["message"].startswith(f"{limit}: ")
        assert 1 <= int(headers["retry-after"]) <= 61
