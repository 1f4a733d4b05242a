"""Questions to the ledger, on a store of each kind."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from datetime import UTC, date, datetime
from typing import Any, get_args

import pytest
import pytest_asyncio
from sqlalchemy import delete, func, insert, select

from router.accounts import schema, usage
from router.accounts.store import Store, StoreDown
from router.accounts.usage import DAY_US, By, Filter, Record, Span, Sum, Usage, day_of
from router.errors import InvalidRequest, NotFound
from tests.router.accounts.ledgers import MONDAY, row

ACCOUNTS = ("ada", "bob")
KEYS = ("ada-1", "ada-2", "bob-1")
MODELS = ("echo", "org/Echo:latest")

EVERY_BY: list[tuple[By, ...]] = [by for n in range(4) for by in itertools.combinations(get_args(By), n)]


def many(count: int, seed: int = 7) -> list[dict[str, Any]]:
    """Rows of three days, some of them of one moment, whose sums no float could hold."""
    chance = random.Random(seed)  # noqa: S311 - the same each time
    keys = chance.choices(KEYS, k=count)
    return [
        row(
            number,
            key_id=key,
            account_id=key.partition("-")[0],
            model=chance.choice(MODELS),
            began_us=MONDAY + chance.randrange(12) * (DAY_US // 4) + chance.randrange(3),
            prompt_tokens=chance.randrange(10_000),
            completion_tokens=chance.randrange(10_000),
            price_nano=10**15 + chance.randrange(10**9),
            outcome=chance.choice(["completed", "cancelled", "failed", schema.INTERRUPTED]),
        )
        for number, key in enumerate(keys)
    ]


def summed(rows: Iterable[dict[str, Any]], by: Iterable[str]) -> dict[tuple[Any, ...], tuple[int, ...]]:
    """The same as `sums`, from the rows themselves."""
    place: dict[str, Callable[[dict[str, Any]], Any]] = {
        "day": lambda one: datetime.fromtimestamp(one["began_us"] // 10**6, UTC).strftime("%Y-%m-%d"),
        "model": lambda one: one["model"],
        "key": lambda one: one["key_id"],
    }
    sums: dict[tuple[Any, ...], tuple[int, ...]] = {}
    for one in rows:
        apart = tuple(place[name](one) for name in by)
        counted = (1, one["prompt_tokens"], one["completion_tokens"], one["price_nano"])
        sums[apart] = tuple(map(sum, zip(sums.get(apart, (0,) * 4), counted, strict=True)))
    return sums


def told(sums: Iterable[Sum], by: tuple[By, ...]) -> dict[tuple[Any, ...], tuple[int, ...]]:
    """What `sums` says, in the same form."""
    field = {"day": "day", "model": "model", "key": "key_id"}
    return {
        tuple(getattr(one, field[name]) for name in by): (
            one.requests,
            one.prompt_tokens,
            one.completion_tokens,
            one.price_nano,
        )
        for one in sums
    }


@pytest_asyncio.fixture
async def store(store_url: str) -> AsyncIterator[Store]:
    """A store with its tables, two accounts and three keys."""
    store = Store(store_url)
    async with store.begin() as connection:
        await connection.run_sync(schema.metadata.create_all)
        common = {"role": "member", "password": "", "disabled": False, "limits": {}, "created_us": 0}
        people = [{"id": name, "name": name.title(), **common} for name in ACCOUNTS]
        await connection.execute(insert(schema.accounts), people)
        await connection.execute(
            insert(schema.keys),
            [
                {
                    "id": key,
                    "account_id": key.partition("-")[0],
                    "name": f"key {key}",
                    "kind": "api",
                    "prefix": "",
                    "digest": b"",
                    "models": None,
                    "limits": {},
                    "created_us": 0,
                    "revoked_us": None,
                }
                for key in KEYS
            ],
        )
    yield store
    await store.close()


@pytest.fixture
def asked(store: Store) -> Usage:
    """What is asked."""
    return Usage(store)


async def put(store: Store, *rows: dict[str, Any]) -> None:
    """Write rows into the ledger."""
    async with store.begin() as connection:
        await connection.execute(insert(schema.requests), list(rows))


async def count(store: Store, table: Any = schema.requests) -> int:
    """The rows of a table."""
    async with store.begin() as connection:
        found: int = (await connection.execute(select(func.count()).select_from(table))).scalar_one()
        return found


async def everything(asked: Usage, chosen: Filter | None = None) -> list[Record]:
    """All requests of a filter."""
    return [record async for records in asked.chunks(chosen or Filter()) for record in records]


def newest_first(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The ids of rows as they are listed."""
    return [one["id"] for one in sorted(rows, key=lambda one: (one["began_us"], one["id"]), reverse=True)]


# ---- requests -----------------------------------------------------------------------------------------


async def test_pages_have_each_request_once(store: Store, asked: Usage) -> None:
    """Whatever a page's size is, and though some requests began at the same moment and newer ones arrive, all
    pages together are the requests that there were, newest first."""
    rows = many(60)
    await put(store, *rows)
    arriving = itertools.count(1000)
    for limit in (1, 7, 60, 61, 100):
        listed: list[str] = []
        there = [record.id for record in await everything(asked)]
        page = await asked.page(Filter(), limit=limit)
        while True:
            assert len(page.records) <= limit
            listed += [record.id for record in page.records]
            if page.next is None:
                break
            await put(store, row(next(arriving), began_us=MONDAY + 5 * DAY_US))
            page = await asked.page(Filter(), page.next, limit)
        assert listed == there
        assert there[-len(rows) :] == newest_first(rows)


async def test_a_record_is_its_row(store: Store, asked: Usage) -> None:
    """It has all that the row has, and the names of account and key beside their ids."""
    await put(store, row(1, first_us=None), row(2, account_id="gone", key_id="gone"))
    record, unknown = [(await asked.get(f"{number:032x}")).record for number in (1, 2)]
    fields = {name: getattr(record, name) for name in record.__struct_fields__}
    assert fields == row(1, first_us=None) | {"account": "Ada", "key": "key ada-1"}
    assert (unknown.account, unknown.key) == ("", "")


FILTERS = [
    (Filter(), {1, 2, 3}),
    (Filter(account_id="bob"), {2}),
    (Filter(key_id="ada-2"), {3}),
    (Filter(models=("Other", "else")), {3}),
    (Filter(models=("other",)), set()),
    (Filter(outcome=schema.OPEN), {2}),
    (Filter(status=404), {3}),
    (Filter(since_us=MONDAY + 2), {2, 3}),
    (Filter(until_us=MONDAY + 2), {1}),
    (Filter(since_us=MONDAY + 2, until_us=MONDAY + 3), {2}),
    (Filter(account_id="ada", status=200), {1}),
]


async def test_filters_take_what_fits_all_of_them(store: Store, asked: Usage) -> None:
    """A moment is itself in what began since then, and not in what began until then."""
    await put(
        store,
        row(1, began_us=MONDAY + 1),
        row(2, began_us=MONDAY + 2, account_id="bob", key_id="bob-1", outcome=schema.OPEN, status=0),
        row(3, began_us=MONDAY + 3, key_id="ada-2", model="Other", status=404),
    )
    for chosen, numbers in FILTERS:
        assert {int(record.id, 16) for record in await everything(asked, chosen)} == numbers, chosen


async def test_a_request_is_its_accounts_own(store: Store, asked: Usage) -> None:
    """To another account it is as if it were not there; texts come where they are kept."""
    await put(store, row(1), row(2))
    async with store.begin() as connection:
        kept = {"id": f"{1:032x}", "asked": "a?", "answered": "b."}
        await connection.execute(insert(schema.texts), kept)
    with_texts = await asked.get(f"{1:032x}", "ada")
    assert (with_texts.asked, with_texts.answered) == ("a?", "b.")
    without = await asked.get(f"{2:032x}")
    assert (without.asked, without.answered) == (None, None)
    for identifier, account in ((f"{1:032x}", "bob"), (f"{3:032x}", None)):
        with pytest.raises(NotFound):
            await asked.get(identifier, account)


async def test_reading_everything_holds_nothing(
    store: Store, asked: Usage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two chunks others write and delete, however long the reader takes: what was there all the time
    comes once."""
    monkeypatch.setattr(usage, "CHUNK", 10)
    rows = many(35)
    await put(store, *rows)
    listed: list[str] = []
    oldest = newest_first(rows)[-1]
    async for records in asked.chunks(Filter()):
        assert len(records) <= 10
        listed += [record.id for record in records]
        async with store.begin() as connection:
            await connection.execute(delete(schema.requests).where(schema.requests.c.id == oldest))
    assert listed == newest_first(rows)[:-1]


# ---- sums ---------------------------------------------------------------------------------------------


async def test_sums_are_exact_and_stay_so(store: Store, asked: Usage) -> None:
    """To the last digit, before any request is forgotten, when some are and when all are."""
    rows = many(200)
    await put(store, *rows)
    for day in range(4):
        await asked.forget(MONDAY + day * DAY_US)
        for by in EVERY_BY:
            assert told(await asked.sums(by, Span(), Filter()), by) == summed(rows, by), by
    assert await count(store) == 0


async def test_sums_of_nothing_are_none(asked: Usage) -> None:
    """Without a request there is no sum of any day, and nothing in all."""
    assert await asked.sums(("day",), Span(), Filter()) == []
    assert await asked.sums((), Span(), Filter()) == [Sum()]


async def test_sums_are_in_order_with_the_keys_names(store: Store, asked: Usage) -> None:
    """By day, then by model, then by the key's name."""
    await put(store, *many(100))
    sums = await asked.sums(("key", "model", "day"), Span(), Filter())
    places = [(one.day, one.model, one.key) for one in sums]
    assert places == sorted(places, key=repr)
    assert {(one.key_id, one.key) for one in sums} == {(key, f"key {key}") for key in KEYS}


CHOSEN = [
    (Span(date(2026, 12, 1)), Filter()),
    (Span(None, date(2026, 11, 30)), Filter()),
    (Span(date(2026, 12, 1), date(2026, 12, 1)), Filter()),
    (Span(), Filter(account_id="bob")),
    (Span(), Filter(key_id="ada-2")),
    (Span(), Filter(models=("org/Echo:latest",))),
    (Span(date(2026, 12, 1)), Filter(account_id="ada", models=("echo", "else"))),
    (Span(date(2027, 1, 1)), Filter()),
]


async def test_sums_are_of_what_was_chosen(store: Store, asked: Usage) -> None:
    """Both ends of a span belong to it, also at the first and the last microsecond of a day by UTC; what is
    forgotten counts as what is not."""
    rows = [*many(100), row(1001, began_us=MONDAY + DAY_US - 1), row(1002, began_us=MONDAY + DAY_US)]
    await put(store, *rows)
    by: tuple[By, ...] = ("day", "model")
    for until in (MONDAY, MONDAY + 10 * DAY_US):
        await asked.forget(until)
        for span, chosen in CHOSEN:
            expected = [one for one in rows if within(span, one) and fits(chosen, one)]
            assert told(await asked.sums(by, span, chosen), by) == summed(expected, by), (span, chosen)


def within(span: Span, one: dict[str, Any]) -> bool:
    """Whether a row is of these days."""
    day = day_of(one["began_us"])
    return (span.since is None or day >= str(span.since)) and (span.until is None or day <= str(span.until))


def fits(chosen: Filter, one: dict[str, Any]) -> bool:
    """Whether a row is one that sums may be asked for."""
    return (
        chosen.account_id in {None, one["account_id"]}
        and chosen.key_id in {None, one["key_id"]}
        and (chosen.models is None or one["model"] in chosen.models)
    )


async def test_too_many_sums_are_refused(store: Store, asked: Usage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than given in part."""
    await put(store, *many(100))
    monkeypatch.setattr(usage, "MOST_SUMS", 5)
    assert len(await asked.sums(("day",), Span(), Filter())) == 3
    with pytest.raises(InvalidRequest, match="more than 5 sums") as caught:
        await asked.sums(("day", "model"), Span(), Filter())
    assert caught.value.param == "by"


async def test_what_was_spent_in_a_month(store: Store, asked: Usage) -> None:
    """By a key, by an account, by either at a model and by all at a model; forgotten requests included, no
    other month's."""
    rows = many(100)  # of the end of November and the beginning of December
    await put(store, *rows)
    await asked.forget(MONDAY + DAY_US // 2)
    for month in ("2026-10", "2026-11", "2026-12"):
        own = [one for one in rows if day_of(one["began_us"]).startswith(month)]
        scopes = {f"model:{model}": [one for one in own if one["model"] == model] for model in MODELS}
        for kind, holder in [*(("key", key) for key in KEYS), *(("account", name) for name in ACCOUNTS)]:
            charged = [one for one in own if one[f"{kind}_id"] == holder]
            scopes[f"{kind}:{holder}"] = charged
            for model in MODELS:
                scopes[f"{kind}:{holder}/{model}"] = [one for one in charged if one["model"] == model]
        for scope, charged in scopes.items():
            assert await asked.spent(scope, month) == sum(one["price_nano"] for one in charged), scope


async def test_what_was_spent_under_another_name_counts(store: Store, asked: Usage) -> None:
    """A model's limit holds for all of its names."""
    await put(store, row(1, model="echo", price_nano=1), row(2, model="alias", price_nano=2))
    await put(store, row(3, model="other", price_nano=4))
    assert await asked.spent("model:echo", "2026-11") == 1
    asked.names_of = {"echo": ("echo", "alias")}.__getitem__
    assert await asked.spent("model:echo", "2026-11") == 3
    for holder in ("key:ada-1", "account:ada"):
        assert await asked.spent(f"{holder}/echo", "2026-11") == 3
        assert await asked.spent(holder, "2026-11") == 7


# ---- what is forgotten --------------------------------------------------------------------------------


async def test_what_is_old_is_forgotten(store: Store, asked: Usage) -> None:
    """With its texts; what is newer or still being answered stays whole."""
    await put(
        store,
        row(1, began_us=MONDAY - 1),
        row(2, began_us=MONDAY),
        row(3, began_us=MONDAY - 1, outcome=schema.OPEN),
    )
    async with store.begin() as connection:
        kept = [{"id": f"{n:032x}", "asked": "", "answered": ""} for n in (1, 2, 3)]
        await connection.execute(insert(schema.texts), kept)
    assert await asked.forget(MONDAY) == 1
    assert {int(record.id, 16) for record in await everything(asked)} == {2, 3}
    async with store.begin() as connection:
        left = (await connection.execute(select(schema.texts.c.id))).scalars().all()
    assert {int(identifier, 16) for identifier in left} == {2, 3}
    assert await asked.forget(MONDAY) == 0


async def test_what_is_forgotten_later_is_added(store: Store, asked: Usage) -> None:
    """A day of which something was forgotten before has the sum of both."""
    first, second = row(1), row(2, price_nano=10**16 + 1)
    for one in (first, second):
        await put(store, one)
        await asked.forget(MONDAY + DAY_US)
    assert await count(store, schema.days) == 1
    assert told(await asked.sums(("day",), Span(), Filter()), ("day",)) == summed([first, second], ("day",))


async def test_two_routers_may_forget_at_once(
    store: Store, asked: Usage, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each request is counted once, by one of them; and whoever asks for sums meanwhile gets the same as
    before and after."""
    monkeypatch.setattr(usage, "FORGOTTEN", 20)
    rows = many(600)
    await put(store, *rows)
    expected = summed(rows, ("day", "model", "key"))
    other = Store(store_url)
    forgetting = asyncio.gather(*(Usage(one).forget(MONDAY + 9 * DAY_US) for one in (store, other, store)))
    seen = []
    while not forgetting.done():
        seen.append(
            told(await asked.sums(("day", "model", "key"), Span(), Filter()), ("day", "model", "key"))
        )
    assert sum(await forgetting) == len(rows)
    await other.close()
    assert await count(store) == 0
    assert seen
    assert all(sums == expected for sums in seen)


async def test_what_cannot_be_added_is_not_deleted(store: Store, asked: Usage) -> None:
    """Both happen or neither does."""
    await put(store, *many(10))
    async with store.begin() as connection:
        await connection.run_sync(schema.days.drop)
    with pytest.raises(StoreDown):
        await asked.forget(MONDAY + 9 * DAY_US)
    assert await count(store) == 10


async def test_more_is_forgotten_than_goes_into_one_transaction(store: Store, asked: Usage) -> None:
    """All that is old goes, as often as it takes."""
    rows = many(2 * usage.FORGOTTEN + 1)
    await put(store, *rows)
    assert await asked.forget(MONDAY + 9 * DAY_US) == len(rows)
    assert Counter(one["model"] for one in rows) == Counter(
        {one.model: one.requests for one in await asked.sums(("model",), Span(), Filter())}
    )
