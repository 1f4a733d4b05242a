"""What the ledger says: requests one by one, sums of them, and an end to those that are old.

Days and months are those of UTC. The sums of requests that are no longer kept stand in the table `days`, and
count with the rest.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any, Literal, NamedTuple

import msgspec
from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Dialect,
    Select,
    String,
    Table,
    cast,
    delete,
    func,
    null,
    select,
    union_all,
)

from router.accounts.limits import scope_of
from router.accounts.schema import OPEN, accounts, days, keys, requests, texts
from router.accounts.store import Store, insert_into
from router.errors import InvalidRequest, NotFound

DAY_US = 86_400_000_000
"""Microseconds of a day."""

CHUNK = 200
"""Requests that are read at once where all of them are wanted: more would hold up tokens on the same loop."""

FORGOTTEN = 200
"""Requests that are forgotten in one transaction."""

PAUSE_S = 0.02
"""Seconds between two such transactions. A store in a file has one writer at a time, and answers wait for the
ledger's."""

MOST_SUMS = 10_000
"""Sums of one answer."""

By = Literal["day", "model", "key"]

_COUNTED = ("prompt_tokens", "completion_tokens", "price_nano")


class Filter(msgspec.Struct, frozen=True):
    """Which requests; None takes all."""

    account_id: str | None = None
    key_id: str | None = None
    models: tuple[str, ...] | None = None
    """Any of these."""
    outcome: str | None = None
    status: int | None = None
    since_us: int | None = None
    """They began then or later,"""
    until_us: int | None = None
    """and before then."""


class Cursor(NamedTuple):
    """A place in the requests as they are listed, newest first: after this one."""

    began_us: int
    id: str


class Record(msgspec.Struct, frozen=True):
    """A row of the ledger, as the table `requests` describes it, with the names that belong to its ids."""

    id: str
    request_id: str
    began_us: int
    account_id: str
    account: str
    key_id: str
    key: str
    path: str
    model: str
    replica: str
    stream: bool
    status: int
    outcome: str
    error: str
    prompt_tokens: int
    completion_tokens: int
    price_nano: int
    first_us: int | None
    duration_us: int | None
    user_agent: str
    router: str


class Page(NamedTuple):
    """Some of the requests, newest first."""

    records: list[Record]
    next: Cursor | None
    """Where the next page begins; None where there is none."""


class Detail(NamedTuple):
    """One request, and its texts where they are kept."""

    record: Record
    asked: str | None
    answered: str | None


class Span(NamedTuple):
    """Days, the first and the last one included; None is no bound."""

    since: date | None = None
    until: date | None = None


class Sum(msgspec.Struct):
    """What requests that have these in common used together. What they were not told apart by is None."""

    day: str | None = None
    model: str | None = None
    key_id: str | None = None
    key: str | None = None
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    price_nano: int = 0


class Usage:
    """Questions to the ledger. Each raises StoreDown."""

    def __init__(self, store: Store) -> None:
        self.names_of: Callable[[str], Sequence[str]] = lambda model: (model,)
        """Every name by which the model of that name is asked for: the ledger has the one that was."""
        self._store = store

    async def page(self, chosen: Filter, before: Cursor | None = None, limit: int = 50) -> Page:
        """Requests, newest first, from a place on. What arrives meanwhile moves none of them."""
        query = _records().where(*_conditions(chosen))
        if before is not None:
            began, identifier = requests.c.began_us, requests.c.id
            # The first half is what an index can look for.
            query = query.where(
                began <= before.began_us, (began < before.began_us) | (identifier < before.id)
            )
        query = query.order_by(requests.c.began_us.desc(), requests.c.id.desc()).limit(limit + 1)
        async with self._store.begin() as connection:
            found = [Record(**row) for row in (await connection.execute(query)).mappings()]
        records = found[:limit]
        more = len(found) > limit
        return Page(records, Cursor(records[-1].began_us, records[-1].id) if more else None)

    async def chunks(self, chosen: Filter) -> AsyncIterator[list[Record]]:
        """All requests, newest first, some at a time. Between two nothing of the store is held."""
        page = await self.page(chosen, limit=CHUNK)
        while page.records:
            yield page.records
            if page.next is None:
                return
            page = await self.page(chosen, page.next, CHUNK)

    async def get(self, identifier: str, account_id: str | None = None) -> Detail:
        """One request, of that account or of any. Raises NotFound."""
        query = _records(texts.c.asked, texts.c.answered).where(requests.c.id == identifier)
        if account_id is not None:
            query = query.where(requests.c.account_id == account_id)
        async with self._store.begin() as connection:
            row = (await connection.execute(query)).mappings().one_or_none()
        if row is None:
            raise NotFound("request", identifier)
        fields = dict(row)
        asked, answered = fields.pop("asked"), fields.pop("answered")
        return Detail(Record(**fields), asked, answered)

    async def sums(self, by: tuple[By, ...], span: Span, chosen: Filter) -> list[Sum]:
        """What was used, apart by any of day, model and key, in this order; open requests count too.

        Of the filter, account, key and models count. Raises InvalidRequest where there are too many sums.
        """
        # One statement: between two, requests could be forgotten, and be counted never or twice.
        used = union_all(_used_lately(span, chosen), _used_before(span, chosen)).subquery()
        apart = [used.c[name] for name in _columns_of(by)]
        totals = [func.sum(used.c[name]).label(name) for name in ("requests", *_COUNTED)]
        grouped = select(*apart, *totals).group_by(*apart).limit(MOST_SUMS + 1).subquery()
        query = select(grouped)
        if "key" in by:
            query = query.add_columns(keys.c.name.label("key"))
            query = query.select_from(grouped.outerjoin(keys, keys.c.id == grouped.c.key_id))
        async with self._store.begin() as connection:
            rows = (await connection.execute(query)).mappings().all()
        if len(rows) > MOST_SUMS:
            raise InvalidRequest(
                f"by: these are more than {MOST_SUMS} sums; ask for fewer days, or for one model or key",
                param="by",
            )
        return _merged(rows)

    async def spent(self, scope: str, month: str) -> int:
        """Nano-dollars that requests of a month, such as 2026-11, have cost. `scope`: as a claim has it."""
        kind, holder, model = scope_of(scope)
        chosen = Filter(
            account_id=holder if kind == "account" else None,
            key_id=holder if kind == "key" else None,
            models=tuple(self.names_of(model)) if model else None,
        )
        (total,) = await self.sums((), _month(month), chosen) or (Sum(),)
        return total.price_nano

    async def forget(self, before_us: int) -> int:
        """Delete the requests that began before then, with their texts, and keep their sums; how many there
        were. Those still being answered stay. Several routers may do it at once."""
        forgotten = 0
        while some := await self._forget_some(before_us):
            forgotten += some
            await asyncio.sleep(PAUSE_S)
        return forgotten

    async def _forget_some(self, before_us: int) -> int:
        old = (
            select(requests.c.id)
            .where(requests.c.began_us < before_us, requests.c.outcome != OPEN)
            .order_by(requests.c.began_us)
            .limit(FORGOTTEN)
            .with_for_update(skip_locked=True)  # another router is at those
        )
        counted = [
            requests.c[name] for name in ("id", "began_us", "account_id", "key_id", "model", *_COUNTED)
        ]
        # Only what this statement has deleted is added up: nobody else can have. It begins with its verb, as
        # Python's SQLite takes what begins with WITH for a question, and commits it at once.
        gone = delete(requests).where(requests.c.id.in_(old)).returning(*counted)
        async with self._store.begin() as connection:
            rows = (await connection.execute(gone)).mappings().all()
            if rows:
                await connection.execute(delete(texts).where(texts.c.id.in_([row["id"] for row in rows])))
                await connection.execute(_add_days(connection.dialect), _by_day(rows))
        return len(rows)


def day_of(moment_us: int) -> str:
    """The day of a moment: 2026-11-30."""
    return datetime.fromtimestamp(moment_us // 1_000_000, UTC).date().isoformat()


def start_us(day: date) -> int:
    """The moment at which a day begins."""
    return (day - date(1970, 1, 1)).days * DAY_US


# ---- requests -----------------------------------------------------------------------------------------


def _records(*also: ColumnElement[Any]) -> Select[Any]:
    named = {"account": func.coalesce(accounts.c.name, ""), "key": func.coalesce(keys.c.name, "")}
    columns = [
        named[name].label(name) if name in named else requests.c[name] for name in Record.__struct_fields__
    ]
    source = requests.outerjoin(accounts, accounts.c.id == requests.c.account_id)
    source = source.outerjoin(keys, keys.c.id == requests.c.key_id)
    if also:
        source = source.outerjoin(texts, texts.c.id == requests.c.id)
    return select(*columns, *also).select_from(source)


def _conditions(chosen: Filter) -> list[ColumnElement[bool]]:
    found = _common_conditions(chosen, requests)
    equal = ("outcome", "status")
    found += [requests.c[name] == value for name in equal if (value := getattr(chosen, name)) is not None]
    if chosen.since_us is not None:
        found.append(requests.c.began_us >= chosen.since_us)
    if chosen.until_us is not None:
        found.append(requests.c.began_us < chosen.until_us)
    return found


def _common_conditions(chosen: Filter, table: Table) -> list[ColumnElement[bool]]:
    """Those that hold for requests and for sums of them."""
    equal = ("account_id", "key_id")
    found = [table.c[name] == value for name in equal if (value := getattr(chosen, name)) is not None]
    return found if chosen.models is None else [*found, table.c.model.in_(chosen.models)]


# ---- sums ---------------------------------------------------------------------------------------------
#
# A request knows its moment, a row of `days` the day in letters. Neither database turns one into the other as
# the other one does: both stand side by side, and are brought together here.


def _used_lately(span: Span, chosen: Filter) -> Select[Any]:
    lately = Filter(
        account_id=chosen.account_id,
        key_id=chosen.key_id,
        models=chosen.models,
        since_us=start_us(span.since) if span.since else None,
        until_us=start_us(span.until) + DAY_US if span.until else None,
    )
    counted = [requests.c[name] for name in _COUNTED]
    return select(
        (requests.c.began_us // DAY_US).label("number"),
        cast(null(), String(10)).label("day"),
        requests.c.model,
        requests.c.key_id,
        cast(1, BigInteger).label("requests"),
        *counted,
    ).where(*_conditions(lately))


def _used_before(span: Span, chosen: Filter) -> Select[Any]:
    number = cast(null(), BigInteger).label("number")
    counted = [days.c[name] for name in ("requests", *_COUNTED)]
    query = select(number, days.c.day, days.c.model, days.c.key_id, *counted)
    query = query.where(*_common_conditions(chosen, days))
    if span.since:
        query = query.where(days.c.day >= span.since.isoformat())
    if span.until:
        query = query.where(days.c.day <= span.until.isoformat())
    return query


def _columns_of(by: tuple[By, ...]) -> list[str]:
    columns = {"day": ["number", "day"], "model": ["model"], "key": ["key_id"]}
    return [name for one, names in columns.items() if one in by for name in names]


def _merged(rows: Sequence[Any]) -> list[Sum]:
    sums: dict[tuple[Any, ...], Sum] = {}
    for row in rows:
        day = row.get("day") or (day_of(row["number"] * DAY_US) if "number" in row else None)
        apart = (day, row.get("model"), row.get("key_id"))
        one = sums.setdefault(apart, Sum(*apart, row.get("key")))
        for name in ("requests", *_COUNTED):
            # Without any request there is one sum, of nothing. PostgreSQL's are decimals.
            setattr(one, name, getattr(one, name) + int(row[name] or 0))
    return sorted(
        sums.values(), key=lambda one: (one.day or "", one.model or "", one.key or "", one.key_id or "")
    )


def _month(month: str) -> Span:
    first = date.fromisoformat(f"{month}-01")
    after = (first + timedelta(days=31)).replace(day=1)
    return Span(first, after - timedelta(days=1))


# ---- what is forgotten --------------------------------------------------------------------------------


def _by_day(rows: Iterable[Any]) -> list[dict[str, Any]]:
    """The rows of `days` that requests become, always in the same order: two routers that add to them at
    once then wait for each other in turn."""
    sums: dict[tuple[str, str, str, str], list[int]] = {}
    for row in rows:
        place = (day_of(row["began_us"]), row["account_id"], row["key_id"], row["model"])
        counted = (1, *(row[name] for name in _COUNTED))
        sums[place] = [a + b for a, b in zip(sums.get(place, [0] * len(counted)), counted, strict=True)]
    return [dict(zip(days.columns.keys(), (*place, *sums[place]), strict=True)) for place in sorted(sums)]


def _add_days(dialect: Dialect) -> Any:
    """The statement that adds such rows to those that are there."""
    insert = insert_into(dialect, days)
    return insert.on_conflict_do_update(
        index_elements=list(days.primary_key),
        set_={name: days.c[name] + insert.excluded[name] for name in ("requests", *_COUNTED)},
    )
