"""Both meters are held to the same: one in memory, and several that share a Redis."""

from __future__ import annotations

import asyncio
import itertools
import random
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.accounts import memory_meter, redis_meter, redis_wire
from router.accounts.limits import Bound, Claim
from router.accounts.memory_meter import MemoryMeter
from router.accounts.meter import Grant, Meter, duration, month
from router.accounts.money import NANO
from router.accounts.redis_meter import RedisMeter
from router.accounts.redis_wire import Message, Script, Wire
from router.accounts.settings import Limits
from router.errors import LimitsUnavailable, QuotaExceeded, RateLimited
from tests.redis_server import RedisServer, running_redis
from tests.waiting import PATIENCE_S, soon, until

NOTHING = Bound(0, 0)

SOON_S = 3.0
"""What a second may take on a busy machine."""

_ids = itertools.count()


class Ledger:
    """Knows what was spent before."""

    def __init__(self) -> None:
        self.spent: Counter[str] = Counter()
        """Nano-dollars, by scope."""
        self.asked: list[tuple[str, str]] = []
        self.fails = False
        self.answers = asyncio.Event()
        """Cleared, it holds up whoever asks."""
        self.answers.set()

    async def __call__(self, scope: str, month: str) -> int:
        self.asked.append((scope, month))
        await self.answers.wait()
        if self.fails:
            raise ConnectionResetError
        return self.spent[scope]


OnRedis = Callable[..., RedisMeter]


class Routers:
    """Makes meters of one kind that count together."""

    def __init__(self, redis_url: str | None) -> None:
        self.ledger = Ledger()
        self.kind = "memory" if redis_url is None else "redis"
        self._redis_url = redis_url
        self._meters: list[Meter] = []

    def meter(self, **options: Any) -> Meter:
        """The meter of one more router; in memory there is only one router."""
        if self._redis_url is None and self._meters:
            return self._meters[0]
        made: Meter = (
            MemoryMeter(self.ledger, **options)
            if self._redis_url is None
            else RedisMeter(self._redis_url, self.ledger, patience_s=PATIENCE_S, **options)
        )
        self._meters.append(made)
        return made

    async def close(self) -> None:
        """Close them all."""
        for meter in self._meters:
            await soon(meter.close())


@pytest.fixture(params=["memory", "redis"])
async def routers(request: pytest.FixtureRequest) -> AsyncIterator[Routers]:
    """One kind of meters, which have counted nothing yet."""
    made = Routers(None if request.param == "memory" else request.getfixturevalue("redis_url"))
    yield made
    await made.close()


@pytest.fixture
async def on_redis() -> AsyncIterator[OnRedis]:
    """Makes meters on any Redis, and closes them."""
    made: list[RedisMeter] = []

    def make(url: str, ledger: Ledger, *, patience_s: float = PATIENCE_S, **options: Any) -> RedisMeter:
        made.append(RedisMeter(url, ledger, patience_s=patience_s, **options))
        return made[-1]

    yield make
    for meter in made:
        await soon(meter.close())


@pytest.fixture
def meter(routers: Routers) -> Meter:
    """One of them."""
    return routers.meter()


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """A server that the test may stop."""
    with running_redis() as server:
        yield server


def claim(scope: str, **limits: object) -> Claim:
    """Limits as the configuration writes them."""
    return Claim(scope, Limits.model_validate(limits))


async def reserve(meter: Meter, *claims: Claim, tokens: int = 0, nano: int = 0) -> Grant:
    """What one more request holds."""
    return await soon(meter.reserve(f"request-{next(_ids)}", claims, Bound(tokens, nano)))


async def admitted(meter: Meter, *claims: Claim, tokens: int = 0, nano: int = 0) -> Grant | None:
    """The same, or None where the request is refused."""
    try:
        return await reserve(meter, *claims, tokens=tokens, nano=nano)
    except (RateLimited, QuotaExceeded):
        return None


async def until_admitted(meter: Meter, *claims: Claim, tokens: int = 0, nano: int = 0) -> Grant:
    """The same, asked for again and again until there is room."""
    grants: list[Grant] = []

    async def ask() -> None:
        while not grants:
            with suppress(LimitsUnavailable):
                grants.extend(filter(None, [await admitted(meter, *claims, tokens=tokens, nano=nano)]))
            await asyncio.sleep(0.005)

    await soon(ask())
    return grants[0]


async def until_refused(meter: Meter, *claims: Claim, tokens: int = 0) -> None:
    """The same, where there is none; but it may be that Redis is too slow to say so."""

    async def ask() -> None:
        while True:
            try:
                assert await admitted(meter, *claims, tokens=tokens) is None
            except LimitsUnavailable:
                continue
            return

    await soon(ask())


# ---- what each limit means -----------------------------------------------------------------------------


async def test_without_limits_nothing_is_counted(routers: Routers, on_redis: OnRedis) -> None:
    """A request that falls under no limit asks nobody, not even a Redis that is not there."""
    meter = routers.meter() if routers.kind == "memory" else on_redis("redis://127.0.0.1:1/0", routers.ledger)
    grant = await reserve(meter, claim("key:a"), claim("model:m"), tokens=10**9, nano=10**18)
    assert grant.headers == ()
    grant.settle(10**9, 10**18)
    grant.close()
    assert routers.ledger.asked == []


async def test_requests_per_minute(meter: Meter) -> None:
    """So many requests are let in, whatever becomes of them, and the next is told when there is room."""
    one = claim("key:a", requests_per_minute=3)
    (await reserve(meter, one)).close()
    (await reserve(meter, one)).settle(0, 0)
    grant = await reserve(meter, one)
    told = dict(grant.headers)
    assert told["x-ratelimit-limit-requests"] == "3"
    assert told["x-ratelimit-remaining-requests"] == "0"
    with pytest.raises(
        RateLimited, match=r"^requests_per_minute: this key's limit of 3 is reached$"
    ) as refused:
        await reserve(meter, one)
    assert 50 <= int(refused.value.headers["retry-after"]) <= 60
    assert refused.value.headers["x-ratelimit-remaining-requests"] == "0"


async def test_a_changed_limit_of_requests_counts_those_before(meter: Meter) -> None:
    """Where the limit is raised or lowered, the requests of the last minute still count."""
    for _ in range(3):
        await reserve(meter, claim("key:a", requests_per_minute=3))
    await reserve(meter, claim("key:a", requests_per_minute=4))
    for limit in (2, 3, 4):
        with pytest.raises(RateLimited):
            await reserve(meter, claim("key:a", requests_per_minute=limit))


async def test_tokens_per_minute(meter: Meter) -> None:
    """A request reserves its bound, and what it did not use is there for others once it has ended."""
    one = claim("key:a", tokens_per_minute=1000)
    grant = await reserve(meter, one, tokens=700)
    told = dict(grant.headers)
    assert told["x-ratelimit-limit-tokens"] == "1000"
    assert told["x-ratelimit-remaining-tokens"] == "300"
    words = r"^tokens_per_minute: this key's limit of 1000 has 300 left now, and this request may use 301$"
    with pytest.raises(RateLimited, match=words) as refused:
        await reserve(meter, one, tokens=301)
    assert refused.value.headers["x-ratelimit-remaining-tokens"] == "300"
    grant.settle(100, 0)
    with pytest.raises(RateLimited) as refused:
        await reserve(meter, one, tokens=901)
    assert 50 <= int(refused.value.headers["retry-after"]) <= 61, "what was used leaves the window by then"
    assert dict((await reserve(meter, one, tokens=900)).headers)["x-ratelimit-remaining-tokens"] == "0"


async def test_concurrent_requests(meter: Meter) -> None:
    """So many requests run at a moment, and one that ends makes room, however it ends."""
    one = claim("key:a", concurrent_requests=2)
    first, second = await reserve(meter, one), await reserve(meter, one)
    with pytest.raises(
        RateLimited, match=r"^concurrent_requests: this key's limit of 2 is reached$"
    ) as refused:
        await reserve(meter, one)
    assert refused.value.headers["retry-after"] == "1"
    first.settle(0, 0)
    third = await reserve(meter, one)
    assert await admitted(meter, one) is None
    for grant in (second, third):
        grant.close()
    assert await admitted(meter, one)
    assert await admitted(meter, one)
    assert await admitted(meter, one) is None


async def test_dollars_per_month(meter: Meter) -> None:
    """What was spent and what is reserved never exceed the limit, to the last nano-dollar."""
    one = claim("key:a", dollars_per_month="0.001")
    grant = await reserve(meter, one, nano=999_999)
    with pytest.raises(QuotaExceeded) as refused:
        await reserve(meter, one, nano=2)
    assert str(refused.value) == (
        "dollars_per_month: this key's limit of 0.001 has 0.000000001 left, and this request may cost"
        " 0.000000002"
    )
    assert "retry-after" not in refused.value.headers
    other = await reserve(meter, one, nano=1)
    grant.settle(10**6, 999_998)
    other.settle(10**6, 1)
    assert await admitted(meter, one, nano=2) is None
    assert await admitted(meter, one, nano=1)
    assert await admitted(meter, one, nano=1) is None
    assert await admitted(meter, one, nano=0)


async def test_money_is_exact_up_to_a_million_dollars(meter: Meter) -> None:
    """No digit is lost of the largest limit that can be set."""
    one = claim("key:a", dollars_per_month=1_000_000)
    most = 1_000_000 * NANO
    (await reserve(meter, one, nano=most - 1)).settle(1, most - 3)
    assert await admitted(meter, one, nano=4) is None
    (await reserve(meter, one, nano=3)).settle(1, 2)
    assert await admitted(meter, one, nano=2) is None
    assert await admitted(meter, one, nano=1)


WHOSE = {
    "key:ab12": "this key's limit",
    "key:ab12/Smol/LM": 'this key\'s "Smol/LM" limit',
    "account:ab12": "the account's limit",
    "account:ab12/Smol/LM": 'the account\'s "Smol/LM" limit',
    "model:Smol/LM": 'the model "Smol/LM"\'s limit',
}


@pytest.mark.parametrize("scope", WHOSE)
async def test_what_never_fits_is_told_so(meter: Meter, scope: str) -> None:
    """A request that alone is over a limit is told which, whose, and not to come again."""
    with pytest.raises(RateLimited) as tokens:
        await reserve(meter, claim(scope, tokens_per_minute=99), tokens=100)
    assert str(tokens.value) == (
        f"tokens_per_minute: a request that may use 100 tokens can never fit into {WHOSE[scope]} of 99"
    )
    with pytest.raises(QuotaExceeded) as money:
        await reserve(meter, claim(scope, dollars_per_month="0.001"), nano=1_000_001)
    assert str(money.value) == (
        f"dollars_per_month: a request that may cost 0.001000001 can never fit into {WHOSE[scope]} of 0.001"
    )
    for refused in (tokens, money):
        assert refused.value.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("scope", WHOSE)
@pytest.mark.parametrize("limit", ["requests_per_minute", "tokens_per_minute", "concurrent_requests"])
async def test_a_refusal_names_the_limit(meter: Meter, scope: str, limit: str) -> None:
    """It says which limit it is, the key's or the account's, that of either for a model or the model's, and
    its value."""
    one = claim(scope, **{limit: 1})
    await reserve(meter, one, tokens=1)
    with pytest.raises(RateLimited, match=rf"^{limit}: {WHOSE[scope]} of 1 ") as refused:
        await reserve(meter, one, tokens=1)
    assert "ab12" not in str(refused.value)


async def test_the_headers_are_those_of_the_tightest(meter: Meter) -> None:
    """Of several limits a client is told of the one with the least left, and of none that does not exist."""
    claims = [
        claim("key:a", requests_per_minute=100, tokens_per_minute=500),
        claim("key:a/m", requests_per_minute=7),
        claim("model:m", tokens_per_minute=400, concurrent_requests=3),
    ]
    assert dict((await reserve(meter, *claims, tokens=100)).headers) == {
        "x-ratelimit-limit-requests": "7",
        "x-ratelimit-remaining-requests": "6",
        "x-ratelimit-reset-requests": ANY_RESET,
        "x-ratelimit-limit-tokens": "400",
        "x-ratelimit-remaining-tokens": "300",
        "x-ratelimit-reset-tokens": ANY_RESET,
    }
    assert (await reserve(meter, claims[2]._replace(limits=Limits(concurrent_requests=9)))).headers == ()


class _Reset(str):
    """Equals every time from here to when a minute has passed, as OpenAI writes it."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and (
            other.startswith("1m") or 50 <= float(other.removesuffix("s")) < 60
        )


ANY_RESET = _Reset()


@pytest.mark.parametrize(
    ("microseconds", "written"),
    [
        (0, "1ms"),
        (19_001, "20ms"),
        (999_999, "1s"),
        (1_500_000, "1.5s"),
        (59_999_000, "59.999s"),
        (60_000_000, "1m0s"),
        (360_000_000, "6m0s"),
        (3_660_250_000, "61m0.25s"),
    ],
)
def test_times_are_written_as_openai_does(microseconds: int, written: str) -> None:
    """In milliseconds below a second, then in seconds, then in minutes and seconds, and never too short."""
    assert duration(microseconds) == written


# ---- all or nothing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", ["tokens_per_minute", "concurrent_requests", "dollars_per_month"])
@pytest.mark.parametrize("at", [0, 1])
async def test_a_refused_request_takes_nothing(meter: Meter, full: str, at: int) -> None:
    """Where one of several limits has no room, the others lose nothing to the request that was refused, and
    its requests per minute neither."""
    filled = claim("key:full", **{full: 1})
    await reserve(meter, filled, tokens=1, nano=NANO)
    roomy = claim(
        "key:a", requests_per_minute=1, tokens_per_minute=1, concurrent_requests=1, dollars_per_month=1
    )
    claims = [roomy]
    claims.insert(at, filled)
    for _ in range(3):
        assert await admitted(meter, *claims, tokens=1, nano=NANO) is None
    assert await admitted(meter, roomy, tokens=1, nano=NANO)


async def test_no_window_counts_a_request_that_another_refuses(meter: Meter) -> None:
    """All windows are looked at before one of them counts."""
    full, roomy = claim("model:m", requests_per_minute=1), claim("key:a", requests_per_minute=1)
    await reserve(meter, full)
    for claims in ([roomy, full], [full, roomy]):
        assert await admitted(meter, *claims) is None
    assert await admitted(meter, roomy)


async def test_who_comes_too_late_for_a_window_gives_the_rest_back(routers: Routers) -> None:
    """Of requests that all saw the last place in a window one takes it, and the others hold nothing."""
    last, roomy = claim("model:m", requests_per_minute=1), claim("key:a", concurrent_requests=8)
    meters = [routers.meter() for _ in range(4)]
    asked = await soon(asyncio.gather(*(admitted(meters[at % 4], last, roomy) for at in range(8))))
    assert len(list(filter(None, asked))) == 1
    for meter in (meters * 2)[:7]:
        await until_admitted(meter, roomy)
    assert await admitted(meters[0], roomy) is None


async def test_the_first_word_of_an_end_counts(meter: Meter) -> None:
    """Whatever is said of a request that has ended, in whatever order, only the first is heard."""
    one = claim("key:a", tokens_per_minute=100, concurrent_requests=1, dollars_per_month=1)
    grant = await reserve(meter, one, tokens=100, nano=NANO)
    grant.settle(30, NANO // 2)
    grant.settle(99, NANO)
    grant.close()
    assert await admitted(meter, one, tokens=71, nano=1) is None
    assert await admitted(meter, one, tokens=1, nano=NANO // 2 + 1) is None
    other = await reserve(meter, one, tokens=70, nano=NANO // 2)
    other.close()
    other.settle(70, NANO // 2)
    other.close()
    assert await admitted(meter, one, tokens=70, nano=NANO // 2)
    assert await admitted(meter, one, tokens=0, nano=0) is None


async def test_a_client_that_leaves_while_it_waits_holds_nothing(routers: Routers) -> None:
    """Cancelled while the ledger or Redis is asked, a reservation leaves no trace."""
    meter = routers.meter()
    one = claim("key:a", concurrent_requests=1, tokens_per_minute=10, dollars_per_month=1)
    for known in (False, True):
        for turns in range(12):
            task = asyncio.create_task(meter.reserve(f"left-{known}-{turns}", [one], Bound(10, NANO)))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                task.result().close()
        # From here on the ledger need not be asked.
        (await reserve(meter, one, tokens=10, nano=NANO)).close()


class Step(NamedTuple):
    """Something that happens to a meter."""

    what: str
    claims: frozenset[int]
    tokens: int
    nano: int
    which: int
    """Of the requests so far."""


THREE: tuple[dict[str, object], ...] = (
    {"tokens_per_minute": 60, "concurrent_requests": 3},
    {"dollars_per_month": "0.001", "concurrent_requests": 4},
    {"tokens_per_minute": 90, "dollars_per_month": "0.002"},
)
"""The limits of three scopes."""

steps = st.builds(
    Step,
    what=st.sampled_from(["reserve", "reserve", "settle", "close"]),
    claims=st.frozensets(st.integers(0, 2), min_size=1),
    tokens=st.integers(0, 60),
    nano=st.integers(0, 1_000_000),
    which=st.integers(0, 100),
)


class Books:
    """What the scopes should have, counted in the simplest way."""

    def __init__(self) -> None:
        self.running = Counter[int]()
        self.tokens = Counter[int]()
        self.nano = Counter[int]()

    def fit(self, step: Step) -> bool:
        """Whether there is room for a request."""
        for at in step.claims:
            limits = Limits.model_validate(THREE[at])
            if limits.concurrent_requests is not None and self.running[at] >= limits.concurrent_requests:
                return False
            if (
                limits.tokens_per_minute is not None
                and self.tokens[at] + step.tokens > limits.tokens_per_minute
            ):
                return False
            money = limits.dollars_per_month
            if money is not None and self.nano[at] + step.nano > money * NANO:
                return False
        return True

    def count(self, step: Step, sign: int, running: int = 1) -> None:
        """Add a request to the books, or take it out."""
        for at in step.claims:
            self.running[at] += sign * running
            self.tokens[at] += sign * step.tokens
            self.nano[at] += sign * step.nano


@settings(max_examples=60)
@given(taken=st.lists(steps, min_size=5, max_size=60))
async def test_a_request_is_let_in_exactly_where_there_is_room(routers: Routers, taken: list[Step]) -> None:
    """Requests come, end and fail in any order, under any of three scopes' limits: each is let in if and only
    if all of its limits have room by the simplest account."""
    meter, example = routers.meter(), next(_ids)
    claims = [claim(f"key:{example}/{at}", **limits) for at, limits in enumerate(THREE)]
    books, requests, ended = Books(), dict[int, tuple[Step, Grant]](), set[int]()
    for at, step in enumerate(taken):
        if step.what == "reserve":
            fits = books.fit(step)
            grant = await admitted(
                meter, *(claims[each] for each in step.claims), tokens=step.tokens, nano=step.nano
            )
            assert bool(grant) == fits, f"step {at}"
            if grant:
                books.count(step, +1)
                requests[len(requests)] = (step, grant)
            continue
        if not requests:
            continue
        which = step.which % len(requests)
        reserved, grant = requests[which]
        # What was used is no more than what was reserved.
        used = reserved._replace(tokens=min(step.tokens, reserved.tokens), nano=min(step.nano, reserved.nano))
        if step.what == "settle":
            grant.settle(used.tokens, used.nano)
        else:
            grant.close()
        if which not in ended:
            ended.add(which)
            books.count(reserved, -1)
            if step.what == "settle":
                books.count(used, +1, running=0)


# ---- what was spent ------------------------------------------------------------------------------------


async def test_what_was_spent_before_counts(routers: Routers) -> None:
    """The ledger is asked once for each scope and month, and what it says is spent."""
    routers.ledger.spent["key:a"] = NANO // 2
    one = claim("key:a", dollars_per_month=1)
    before = month()
    for meter in (routers.meter(), routers.meter()):
        assert await admitted(meter, one, nano=NANO // 2 + 1) is None
        assert await admitted(meter, one, nano=NANO // 8)
    assert len(routers.ledger.asked) == 1
    assert routers.ledger.asked[0][0] == "key:a"
    assert before <= routers.ledger.asked[0][1] <= month()


async def test_the_ledger_is_asked_once_by_many(routers: Routers) -> None:
    """Requests that come while it answers wait for the same answer, which counts once, also where whoever
    asked first has left."""
    routers.ledger.spent["key:a"] = NANO // 2
    routers.ledger.answers.clear()
    one = claim("key:a", dollars_per_month=1)
    meters = [routers.meter() for _ in range(3)]
    tasks = [asyncio.create_task(admitted(meters[at % 3], one, nano=NANO // 10)) for at in range(12)]
    await until(lambda: len(routers.ledger.asked) == (1 if routers.kind == "memory" else 3))
    for task in tasks[:3]:
        task.cancel()
    routers.ledger.answers.set()
    await soon(asyncio.wait(tasks))
    assert sum(bool(task.result()) for task in tasks[3:]) == 5
    assert len(routers.ledger.asked) <= 3


async def test_a_ledger_that_fails_is_asked_again(routers: Routers) -> None:
    """What it raises reaches whoever asked, and the next request asks anew."""
    one, meter = claim("key:a", dollars_per_month=1), routers.meter()
    routers.ledger.spent["key:a"] = NANO
    routers.ledger.fails = True
    for _ in range(2):
        with pytest.raises(ConnectionResetError):
            await reserve(meter, one, nano=1)
    routers.ledger.fails = False
    assert await admitted(meter, one, nano=1) is None
    assert len(routers.ledger.asked) == 3


async def test_a_request_is_charged_to_the_month_in_which_it_came(
    routers: Routers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs when a month ends is charged to that month, and the new one begins with what the ledger says
    of it."""
    one, meter = claim("key:a", dollars_per_month=1), routers.meter()
    now = ["2026-11"]
    for module in (memory_meter, redis_meter):
        monkeypatch.setattr(module, "month", lambda: now[0])
    grant = await reserve(meter, one, nano=NANO)
    now[0] = "2026-12"
    other = await reserve(meter, one, nano=NANO)
    grant.settle(1, NANO)
    other.settle(1, NANO // 2)
    assert await admitted(meter, one, nano=NANO // 2 + 1) is None
    assert await admitted(meter, one, nano=NANO // 2)
    assert [asked for _, asked in routers.ledger.asked] == ["2026-11", "2026-12"]


async def test_a_recount_believes_the_ledger(routers: Routers) -> None:
    """Where limits have changed the ledger is asked again. What is reserved stays so, and is charged once."""
    meter = routers.meter()
    one = claim("key:a", dollars_per_month=1)
    grant = await reserve(meter, one, nano=NANO // 4)
    (await reserve(meter, one, nano=NANO // 4)).settle(1, NANO // 4)
    routers.ledger.spent["key:a"] = NANO // 2
    await soon(meter.recount("key:a"))
    assert await admitted(meter, one, nano=NANO // 4 + 1) is None
    grant.settle(1, NANO // 8)
    assert await admitted(meter, one, nano=NANO // 4 + NANO // 8 + 1) is None
    assert await admitted(meter, one, nano=NANO // 4 + NANO // 8)


# ---- many at once --------------------------------------------------------------------------------------


class Watch:
    """Counts, from the outside, what requests hold: never more than the meter counts."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.running = self.tokens = self.nano = self.requests = 0

    def let_in(self, bound: Bound) -> None:
        """A request was let in. No limit may be exceeded now."""
        self.requests += 1
        self.running += 1
        self.tokens += bound.tokens
        self.nano += bound.nano
        limits = self.limits
        assert self.requests <= (limits.requests_per_minute or self.requests)
        assert self.running <= (limits.concurrent_requests or self.running)
        assert self.tokens <= (limits.tokens_per_minute or self.tokens)
        assert self.nano <= (limits.dollars_per_month or self.nano) * NANO

    def over(self, bound: Bound, used: Bound) -> None:
        """It is about to end."""
        self.running -= 1
        self.tokens += used.tokens - bound.tokens
        self.nano += used.nano - bound.nano


ROUTERS, CLIENTS, TURNS = 4, 16, 25


async def hammer(meter: Meter, one: Claim, watch: Watch, seed: int) -> None:
    """A client that sends one request after the other."""
    chance = random.Random(seed)  # noqa: S311 - nothing is secret here
    for _ in range(TURNS):
        bound = Bound(chance.randint(0, 40), chance.randint(0, NANO // 50))
        grant = await admitted(meter, one, tokens=bound.tokens, nano=bound.nano)
        if grant is None:
            await asyncio.sleep(0)
            continue
        watch.let_in(bound)
        for _ in range(chance.randint(0, 5)):
            await asyncio.sleep(0)
        used = Bound(chance.randint(0, bound.tokens), chance.randint(0, bound.nano))
        if chance.random() < 0.2:
            used = NOTHING
        watch.over(bound, used)
        if used is NOTHING:
            grant.close()
        else:
            grant.settle(*used)


@pytest.mark.parametrize(
    "limits",
    [
        {"requests_per_minute": 50},
        {"tokens_per_minute": 600},
        {"concurrent_requests": 5},
        {"dollars_per_month": "0.5"},
        {
            "requests_per_minute": 200,
            "tokens_per_minute": 2000,
            "concurrent_requests": 7,
            "dollars_per_month": 1,
        },
    ],
    ids="+".join,
)
async def test_no_limit_is_ever_exceeded(routers: Routers, limits: dict[str, object]) -> None:
    """Many clients at several routers, all at once: not one request too many runs, is counted or is paid for.
    When all have ended there is exactly as much left as they did not use."""
    one = claim("key:a", **limits)
    watch = Watch(one.limits)
    meters = [routers.meter() for _ in range(ROUTERS)]
    await soon(asyncio.gather(*(hammer(meters[at % ROUTERS], one, watch, at) for at in range(CLIENTS))))
    if limits == {"requests_per_minute": 50}:
        assert watch.requests == 50
    if one.limits.requests_per_minute is not None:
        one = Claim(one.scope, one.limits.model_copy(update={"requests_per_minute": None}))
    tokens = (one.limits.tokens_per_minute or 0) - watch.tokens
    nano = int((one.limits.dollars_per_month or 0) * NANO) - watch.nano
    if one.limits.tokens_per_minute is not None:
        (await until_admitted(meters[0], one, tokens=tokens)).close()
        assert await admitted(meters[0], one, tokens=tokens + 1) is None
    if one.limits.dollars_per_month is not None:
        (await until_admitted(meters[0], one, nano=nano)).close()
        assert await admitted(meters[0], one, nano=nano + 1) is None
    if one.limits.concurrent_requests is not None:
        for _ in range(one.limits.concurrent_requests):
            await until_admitted(meters[0], one)
        assert await admitted(meters[0], one) is None


@pytest.mark.parametrize(("limit", "value"), [("requests_per_minute", 10), ("tokens_per_minute", 200)])
async def test_no_window_has_more_than_its_limit(routers: Routers, limit: str, value: int) -> None:
    """Over several windows, short ones here: none of them, wherever it begins, has more than it may."""
    one = claim("key:a", **{limit: value})
    meters = [routers.meter(window_s=1) for _ in range(ROUTERS)]
    let_in: list[tuple[float, float, int]] = []
    """For each request the moments before and after, and what it used of the limit."""

    async def client(meter: Meter, seed: int) -> None:
        chance = random.Random(seed)  # noqa: S311 - nothing is secret here
        while sum(used for _, _, used in let_in) < 2.5 * value:
            tokens = chance.randint(5, 30)
            before = monotonic()
            grant = await admitted(meter, one, tokens=tokens)
            if grant is not None:
                let_in.append((before, monotonic(), tokens if limit == "tokens_per_minute" else 1))
                grant.settle(tokens, 0)
            # Little more comes than fits, so that windows begin anywhere.
            await asyncio.sleep(chance.uniform(0, 2))

    await soon(asyncio.gather(*(client(meters[at % ROUTERS], at) for at in range(CLIENTS))))
    for began, _, _ in let_in:
        # Only of these it is certain that they were let in within the second.
        window = [used for before, after, used in let_in if began <= before and after <= began + 1]
        assert sum(window) <= value


async def test_there_is_room_when_it_was_said(routers: Routers) -> None:
    """Who waits as long as the refusal says is let in."""
    meter = routers.meter(window_s=1)
    for limit in ("requests_per_minute", "tokens_per_minute"):
        one = claim(f"key:{limit}", **{limit: 1})
        (await reserve(meter, one, tokens=1)).settle(1, 0)
        with pytest.raises(RateLimited) as refused:
            await reserve(meter, one, tokens=1)
        later = monotonic() + int(refused.value.headers["retry-after"])
        await until(lambda: monotonic() >= later)  # noqa: B023 - it is called in this turn of the loop
        assert await admitted(meter, one, tokens=1)


async def test_a_running_request_keeps_what_it_reserved(routers: Routers) -> None:
    """Its tokens count until it ends, though the window in which it was let in is long over."""
    meter = routers.meter(window_s=1)
    one = claim("key:a", tokens_per_minute=10)
    grant = await reserve(meter, one, tokens=10)
    over = monotonic() + 1.2
    await until(lambda: monotonic() >= over)
    assert await admitted(meter, one, tokens=1) is None
    grant.settle(10, 0)
    assert await admitted(meter, one, tokens=10), "it was let in in a window that is over"


async def test_scopes_that_count_nothing_are_forgotten() -> None:
    """A meter in memory grows with what counts, not with all that ever did."""
    meter = MemoryMeter(Ledger(), window_s=1)
    kept = claim("key:kept", concurrent_requests=1, requests_per_minute=9)
    await reserve(meter, kept)
    for at in range(1500):
        (await reserve(meter, claim(f"key:{at}", concurrent_requests=1, dollars_per_month=1))).close()
    assert len(meter._scopes) <= 1024
    assert await admitted(meter, kept) is None
    many = [claim(f"key:{at}", requests_per_minute=1) for at in range(1500)]
    for one in many[:1000]:
        await reserve(meter, one)
    over = monotonic() + 1.1
    await until(lambda: monotonic() >= over)
    for one in many[1000:]:
        await reserve(meter, one)
    assert len(meter._windows._limiter.storage._windows) <= 600  # type: ignore[attr-defined]
    assert await admitted(meter, many[-1]) is None


async def test_nothing_is_forgotten_that_is_about_to_count() -> None:
    """However many scopes there are, each of a request's counts it."""
    meter = MemoryMeter(Ledger())
    pairs = [
        [claim(f"key:{at}", concurrent_requests=1), claim(f"key:{at}/m", concurrent_requests=1)]
        for at in range(1500)
    ]
    for pair in pairs:
        await reserve(meter, *pair)
    assert [one for pair in pairs for one in pair if await admitted(meter, one)] == []


# ---- Redis ---------------------------------------------------------------------------------------------

HOLDER = """
import asyncio, sys
from router.accounts import memory_meter, redis_meter, redis_wire
from router.accounts.limits import Bound, Claim
from router.accounts.redis_meter import RedisMeter
from router.accounts.redis_wire import Message, Script, Wire
from router.accounts.settings import Limits

async def main(url):
    async def spent(scope, month):
        return 0
    meter = RedisMeter(url, spent, lease_s=3, patience_s=20)
    limits = Limits(tokens_per_minute=10, concurrent_requests=1, dollars_per_month=1)
    await meter.reserve("held", [Claim("key:a", limits)], Bound(10, 1_000_000_000))
    print("held", flush=True)
    await asyncio.Event().wait()

asyncio.run(main(sys.argv[1]))
"""
"""A router that holds everything for as long as it lives."""

EVERYTHING = {"tokens_per_minute": 10, "concurrent_requests": 1, "dollars_per_month": 1}


@contextmanager
def holder(redis_url: str) -> Iterator[subprocess.Popen[bytes]]:
    """That router, in a process that is gone after the block. Its first line says that it holds all."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, redis_url], stdout=subprocess.PIPE)
    with process:
        try:
            yield process
        finally:
            process.kill()


async def test_a_dead_routers_requests_free_themselves(
    shared_redis: RedisServer, redis_url: str, on_redis: OnRedis
) -> None:
    """While a router lives its requests hold what they have for any time; killed, it has freed it by the end
    of the leases, and the ledger is asked again, which alone knows what it has spent."""
    ledger = Ledger()
    meter = on_redis(redis_url, ledger)
    one = claim("key:a", **EVERYTHING)
    with holder(redis_url) as other:
        assert other.stdout is not None
        assert await asyncio.to_thread(other.stdout.readline) == b"held\n"
        over = monotonic() + 3.5
        while monotonic() < over:
            assert await admitted(meter, one, tokens=1) is None, "a lease has passed"
            await asyncio.sleep(0.02)
        assert ledger.asked == []
        ledger.spent["key:a"] = NANO // 4
    grant = await until_admitted(meter, one, tokens=10, nano=NANO - NANO // 4)
    assert [scope for scope, _ in ledger.asked] == ["key:a"]
    grant.close()
    assert await admitted(meter, one, nano=NANO - NANO // 4 + 1) is None


async def test_a_redis_that_is_away_is_said_within_a_second(
    own_redis: RedisServer, on_redis: OnRedis
) -> None:
    """Whether it answers nothing or is gone, a request is refused soon with 503. What ends meanwhile is
    counted when it is back."""
    meter = on_redis(own_redis.url, Ledger(), patience_s=redis_wire.PATIENCE_S)
    assert redis_wire.PATIENCE_S < 1
    one = claim("key:a", requests_per_minute=1000, tokens_per_minute=100, concurrent_requests=2)
    first, second = [await until_admitted(meter, one, tokens=40) for _ in range(2)]
    own_redis.pause()
    began = monotonic()
    with pytest.raises(LimitsUnavailable) as refused:
        await reserve(meter, one, tokens=1)
    assert refused.value.headers["retry-after"] == "1"
    first.settle(10, 0)
    with pytest.raises(LimitsUnavailable):
        await reserve(meter, one, tokens=1)
    assert monotonic() - began < 2 * SOON_S
    own_redis.go_on()
    third = await until_admitted(meter, one, tokens=50)
    await until_refused(meter, one)
    for grant in (second, third):
        grant.close()
    await until_admitted(meter, one, tokens=90)
    await until_refused(meter, one, tokens=1)
    own_redis.stop()
    began = monotonic()
    with pytest.raises(LimitsUnavailable):
        await reserve(meter, one, tokens=1)
    assert monotonic() - began < SOON_S


async def test_a_redis_that_lost_everything_is_told_again(own_redis: RedisServer, on_redis: OnRedis) -> None:
    """Started again and empty, it is told of what runs, and what was spent it learns from the ledger."""
    ledger = Ledger()
    meter = on_redis(own_redis.url, ledger, lease_s=3)
    other = on_redis(own_redis.url, ledger)
    one = claim("key:a", concurrent_requests=2, tokens_per_minute=10, dollars_per_month=1)
    (await reserve(meter, one, tokens=5, nano=NANO // 2)).settle(5, NANO // 4)
    running = await reserve(meter, one, tokens=5, nano=NANO // 2)
    own_redis.stop()
    ledger.spent["key:a"] = NANO // 4
    own_redis.start()
    with own_redis.client() as client:
        await until(lambda: client.keys("*:grant:*"))
    assert await admitted(other, one, tokens=6, nano=1) is None
    assert await admitted(other, one, tokens=1, nano=NANO // 4 + 1) is None
    (await reserve(other, one, tokens=5, nano=NANO // 4)).close()
    running.settle(5, NANO // 2)
    assert await until_admitted(meter, one, tokens=5, nano=NANO // 4)
    assert await admitted(meter, one, nano=1) is None


async def test_what_is_settled_after_its_lease_is_asked_of_the_ledger(
    own_redis: RedisServer, on_redis: OnRedis
) -> None:
    """A router that was cut off for longer than a lease settles late. The price is counted once: by whoever
    asks the ledger, which has it."""
    ledger = Ledger()
    meter = on_redis(own_redis.url, ledger)
    one = claim("key:a", dollars_per_month=1)
    grant = await reserve(meter, one, nano=NANO // 2)
    with own_redis.client() as client:
        client.zadd("{trunkline}:leases", {grant.request: 1})  # type: ignore[attr-defined]
    assert await admitted(meter, one, nano=NANO), "the lease has ended"
    ledger.spent["key:a"] = NANO // 2
    grant.settle(1, NANO // 2)
    other = on_redis(own_redis.url, ledger)
    await until(meter._wire._idle.is_set)
    asked = len(ledger.asked)
    assert await admitted(other, one, nano=1) is None
    assert len(ledger.asked) == asked + 1


async def test_a_lost_connection_or_script_is_not_noticed(
    shared_redis: RedisServer, redis_url: str, on_redis: OnRedis
) -> None:
    """Redis may close connections and forget scripts: the next request finds both again."""
    meter = on_redis(redis_url, Ledger())
    one = claim("key:a", requests_per_minute=100, tokens_per_minute=100)
    await reserve(meter, one, tokens=1)
    with shared_redis.client() as client:
        client.script_flush()
        await reserve(meter, one, tokens=1)
        client.client_kill_filter(_type="normal", skipme=True)
        grant = await reserve(meter, one, tokens=1)
    assert dict(grant.headers)["x-ratelimit-remaining-tokens"] == "97"


async def test_a_reservation_that_is_sent_twice_is_taken_once(meter: Meter) -> None:
    """Nobody knows of a reservation whose answer was lost whether Redis has it, and it may be sent again."""
    one = claim("key:a", tokens_per_minute=10, concurrent_requests=1)
    if isinstance(meter, RedisMeter):
        grants = [await soon(meter.reserve("the same", [one], Bound(10, 0))) for _ in range(2)]
        grants[1].close()
    assert await admitted(meter, one, tokens=10)


async def test_a_lost_key_makes_no_room(shared_redis: RedisServer, redis_url: str, on_redis: OnRedis) -> None:
    """Where Redis has forgotten a scope whose requests run, what they give back is not given to others."""
    meter = on_redis(redis_url, Ledger())
    one = claim("key:a", tokens_per_minute=10, concurrent_requests=2)
    grant = await reserve(meter, one, tokens=5)
    with shared_redis.client() as client:
        assert client.delete("{trunkline}:scope:key:a") == 1
    grant.close()
    await reserve(meter, one, tokens=10)
    await reserve(meter, one)
    assert await admitted(meter, one) is None
    with pytest.raises(RateLimited):
        await reserve(meter, claim("key:a", tokens_per_minute=10), tokens=1)


async def test_nothing_stays_in_redis(shared_redis: RedisServer, redis_url: str, on_redis: OnRedis) -> None:
    """When all requests have ended, no lease and no grant is left, and all the rest ends by itself."""
    meter = on_redis(redis_url, Ledger())
    claims = [claim("key:a", **EVERYTHING, requests_per_minute=10), claim("model:m", concurrent_requests=9)]
    (await reserve(meter, *claims, tokens=3, nano=5)).settle(2, 4)
    (await reserve(meter, *claims, tokens=3, nano=5)).close()
    await meter.close()
    with shared_redis.client() as client:
        left: Any = client.keys("*")
        assert {key.split(":")[1] for key in left} == {"scope", "money", "requests"}
        assert all(client.ttl(key) > 0 for key in left)


async def test_what_is_told_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """While Redis is away no more than so many ends wait for it; the others are left to their leases."""
    monkeypatch.setattr(redis_wire, "MOST_TOLD", 5)
    wire = Wire("redis://127.0.0.1:1/0")
    for _ in range(9):
        wire.tell(Message(Script("return 1"), [], []))
    assert "5 messages wait" in repr(wire)
    await wire.close()
