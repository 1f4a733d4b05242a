from __future__ import annotations

import asyncio
import csv
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from io import StringIO
from typing import Any

import pytest

from router.accounts.row import Row
from tests.end_to_end.accounts import CLOSED, ECHO, FAR, FAR_PACED, PACED
from tests.end_to_end.accounts.office import Issued, Office, bearer, is_settled, ledger, price
from tests.end_to_end.accounts.told import STREAM, Body, Told, assert_kept, hear, words
from tests.end_to_end.client import Exchange, chat
from tests.end_to_end.conftest import Report
from tests.end_to_end.server import Server, until

CLIENTS = 16

LIMITS = {"models": {ECHO: {"tokens_per_minute": 500_000}}}
"""What some of the requests can never fit into."""

AGENT = "exact/1"

Enough = Callable[[Exchange], bool] | None
"""When a client leaves."""


@pytest.mark.parametrize("requests", [2_000, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.timeout(900)
async def test_the_ledger_is_the_sum_of_what_clients_were_told(
    server: Server, office: Office, store: str, report: Report, requests: int
) -> None:
    """Thousands of requests of 16 clients through two routers, of every kind and with every end: the ledger
    has each of them, and nothing else, with the tokens, the status and the outcome that its client was told;
    what the API sums up and exports is that to the last digit."""
    account = office.account(f"crowd-{requests}")
    keys = [
        office.key(f"client {at}", account=account, models=[ECHO, PACED, FAR, FAR_PACED], limits=LIMITS)
        for at in range(CLIENTS)
    ]
    began = time.perf_counter()
    stories = [client(server, key, f"{requests}-{at}", requests // CLIENTS) for at, key in enumerate(keys)]
    told = {one.name: one for story in await asyncio.gather(*stories) for one in story}
    took = time.perf_counter() - began
    await asyncio.to_thread(until, lambda: is_settled(store), 30, "the end of every request")

    found = ledger(store, [key.id for key in keys])
    rows = {row.request_id: row for row in found}
    assert len(rows) == len(found) == len(told) == requests
    assert rows.keys() == told.keys()
    for name, row in rows.items():
        assert_row(row, told[name])
    assert_provided(rows.values(), ledger(store, [admins_key(office)]))
    assert_summed(found, office, account)
    assert_exported(found, office, account)

    routers = Counter(row.router for row in found)
    assert len(routers) == 2
    assert min(routers.values()) > requests / 20
    outcomes = Counter(row.outcome if row.outcome != "refused" else str(row.status) for row in found)
    assert outcomes.keys() == {"completed", "cancelled", "400", "403", "404", "429"}
    report(
        f"{requests} requests of {CLIENTS} clients",
        f"{took:.1f} s, {dict(outcomes)}, by router {sorted(routers.values())}",
    )


async def client(server: Server, key: Issued, name: str, requests: int) -> list[Told]:
    """One after the other, each on a connection of its own: either router may get it."""
    chance = random.Random(name)  # noqa: S311 - the same every time on purpose
    told = []
    for number in range(requests):
        body, enough = request(chance)
        headers = bearer(key.secret, x_request_id=f"{name}-{number}", user_agent=AGENT)
        told.append(await hear(server, body, headers, enough))
    return told


def request(chance: random.Random) -> tuple[Body | str, Enough]:
    """Some request, and when its client leaves."""
    kinds = {whole: 20, streamed: 30, far: 15, leaving: 12, refused: 23}
    (kind,) = chance.choices([*kinds], [*kinds.values()])
    return kind(chance)


def whole(chance: random.Random) -> tuple[Body, Enough]:
    """An answer in one piece."""
    return asked(chance, ECHO), None


def streamed(chance: random.Random) -> tuple[Body, Enough]:
    """With its usage at the end, or not."""
    return asked(chance, ECHO) | chance.choice([STREAM, {"stream": True}]), None


def far(chance: random.Random) -> tuple[Body, Enough]:
    """A provider's, in either form."""
    return asked(chance, FAR) | chance.choice([STREAM, {"stream": True}, {}]), None


def leaving(chance: random.Random) -> tuple[Body, Enough]:
    """A client that has enough after a few tokens of hundreds."""
    body = asked(chance, chance.choice([PACED, FAR_PACED])) | {"stream": True, "max_tokens": 500}
    few = chance.randint(1, 8)
    return body, lambda exchange: words(exchange) >= few


def refused(chance: random.Random) -> tuple[Body | str, Enough]:
    """What the router refuses, a replica, a provider; or a limit."""
    many = {"n": 100, "max_tokens": 8000}
    wrong: list[Body | str] = [
        asked(chance, ECHO) | {"n": 0},
        '{"model": ',
        asked(chance, "nobody"),
        asked(chance, CLOSED),
        chat(ECHO, "a b c", **many),
        chat(ECHO, "a b c", **many) | STREAM,
        chat(ECHO, "word " * 9000, max_tokens=5),
        chat(FAR, "word " * 9000, max_tokens=5) | chance.choice([STREAM, {}]),
    ]
    return chance.choice(wrong), None


def asked(chance: random.Random, model: str) -> Body:
    """A chat or a text completion, of one answer or several."""
    some = {"max_tokens": chance.randint(1, 30), "n": chance.choice([1, 1, 1, 2, 3])}
    texts = [" ".join(["word"] * chance.randint(1, 40)) for _ in range(chance.randint(1, 3))]
    if chance.random() < 0.3:
        return {"model": model, "prompt": chance.choice([texts, texts[0]]), **some}
    return chat(model, texts[0], **some)


# ---- what the ledger has to say ------------------------------------------------------------------------


def assert_row(row: Row, told: Told) -> None:
    """The ledger says of a request what its client knows."""
    assert row.user_agent == AGENT
    if not told.left:
        assert_kept(row, told)
        return
    # What the client saw, and perhaps more, on its way to it: never more than was generated.
    assert (row.outcome, row.status, row.error, row.stream) == ("cancelled", 499, "", True)
    assert told.completion_tokens <= row.completion_tokens <= told.most
    # A provider tells at an answer's end what its prompt was.
    assert row.prompt_tokens == (told.prompt_tokens if row.model == PACED else 0)
    assert row.price_nano == price(row.model, row.prompt_tokens, row.completion_tokens)


def assert_provided(rows: Iterable[Row], provided: Iterable[Row]) -> None:
    """Our provider, which is this very server, has counted the same: its id of a request is ours."""
    theirs = {row.request_id: row for row in provided}
    ours = [row for row in rows if row.model == FAR and row.outcome == "completed"]
    assert ours
    for row in ours:
        there = theirs[row.id]
        assert (there.model, there.outcome, there.stream) == (ECHO, "completed", row.stream)
        assert (there.prompt_tokens, there.completion_tokens) == (row.prompt_tokens, row.completion_tokens)


def admins_key(office: Office) -> str:
    """The id of the key that was there first."""
    (found,) = [key for key in office.get("/api/keys")["data"] if key["name"] == "First key"]
    return str(found["id"])


def assert_summed(rows: Iterable[Row], office: Office, account: str) -> None:
    """GET /api/usage has the sums, by whatever they are told apart."""
    for by in ("day,model,key", "key", "model", "day"):
        sums: defaultdict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
        for row in rows:
            apart = {"day": moment(row)[:10], "model": row.model, "key": row.key_id}
            counted = (1, row.prompt_tokens, row.completion_tokens, row.price_nano)
            one = sums[tuple(apart[name] for name in by.split(","))]
            one[:] = [a + b for a, b in zip(one, counted, strict=True)]
        told = office.get("/api/usage", by=by, account_id=account)["data"]
        columns = ["key_id" if name == "key" else name for name in by.split(",")]
        assert {tuple(one[name] for name in columns): used(one) for one in told} == sums


def used(told: Any) -> list[int]:
    """A sum as the API tells it, with its price in nano-dollars."""
    nano = Decimal(told["price"]) * 10**9
    assert nano == int(nano)
    return [told["requests"], told["prompt_tokens"], told["completion_tokens"], int(nano)]


def assert_exported(rows: Iterable[Row], office: Office, account: str) -> None:
    """GET /api/export has every row, in both forms."""
    expected = {row.id: exported(row) for row in rows}
    as_json = office.get("/api/export", format="json", account_id=account)["data"]
    assert {row["id"]: {name: row[name] for name in expected[row["id"]]} for row in as_json} == expected
    text = office.ask("GET", "/api/export", format="csv", account_id=account).text
    as_csv = list(csv.DictReader(StringIO(text, newline="")))
    assert len(as_csv) == len(as_json) == len(expected)
    for row in as_csv:
        assert {name: row[name] for name in expected[row["id"]]} == {
            name: in_a_cell(value) for name, value in expected[row["id"]].items()
        }
    total = sum((Decimal(row["price"]) for row in as_csv), Decimal(0))
    assert total * 10**9 == sum(row.price_nano for row in rows)


def exported(row: Row) -> dict[str, Any]:
    """A row as the API tells it."""
    same = ("request_id", "key_id", "path", "model", "replica", "stream", "status", "outcome", "error")
    counted = ("prompt_tokens", "completion_tokens", "user_agent", "router")
    return {
        **{name: getattr(row, name) for name in (*same, *counted)},
        "began": moment(row),
        "price": f"{Decimal(row.price_nano).scaleb(-9).normalize():f}",
        "first_ms": None if row.first_us is None else row.first_us / 1000,
        "duration_ms": None if row.duration_us is None else row.duration_us / 1000,
    }


def in_a_cell(value: Any) -> str:
    """A value as CSV has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)


def moment(row: Row) -> str:
    """When it began, by UTC."""
    began = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=row.began_us)
    return began.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
