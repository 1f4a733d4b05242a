from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from router.accounts.schema import INTERRUPTED
from tests.end_to_end.accounts import ECHO, PACED
from tests.end_to_end.accounts.conftest import ENVIRONMENT, two_routers
from tests.end_to_end.accounts.office import Issued, Office, bearer, is_settled, ledger
from tests.end_to_end.accounts.told import STREAM, Body, Told, assert_kept, hear
from tests.end_to_end.client import chat
from tests.end_to_end.conftest import Report
from tests.end_to_end.server import Server, free_port, serving, until
from tests.redis_server import RedisServer
from tests.stores import PostgresCluster

CLIENTS = 24

GIVEN_UP_S = 10.0
"""Seconds within which an answer ends whatever the store does."""

SOME = 60
"""Answers after which a change has been seen by all."""


class Deployment(NamedTuple):
    """A server and its store."""

    server: Server
    store: str
    setting: str


@pytest.fixture(params=["refuse", "serve"], scope="module")
def deployment(
    request: pytest.FixtureRequest,
    postgres_server: PostgresCluster,
    redis_server: RedisServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Deployment]:
    """The folder's server, which refuses while its store is away; and one that does not."""
    if request.param == "refuse":
        url = request.getfixturevalue("store")
        yield Deployment(request.getfixturevalue("server"), url, "refuse")
        return
    url = postgres_server.url(postgres_server.create_database())
    port = free_port()
    config = two_routers(url, redis_server.url, "serve", port)
    with serving(config, tmp_path_factory.mktemp("serve"), ENVIRONMENT, port) as server:
        yield Deployment(server, url, "serve")


class Crowd:
    """Clients that ask all the time, whatever they are told, and remember it."""

    def __init__(self, server: Server, key: Issued) -> None:
        self.told: list[Told] = []
        self.longest_s = 0.0
        """The longest time that an answer took."""
        self._server = server
        self._key = key
        self._numbers = itertools.count()
        self._going_home = False

    async def client(self, number: int) -> None:
        """One of them."""
        chance = random.Random(number)  # noqa: S311 - the same every time on purpose
        while not self._going_home:
            headers = bearer(self._key.secret, x_request_id=f"crowd-{next(self._numbers)}")
            began = time.perf_counter()
            told = await hear(self._server, body(chance), headers)
            self.longest_s = max(self.longest_s, time.perf_counter() - began)
            self.told.append(told)
            if not told.begun:
                await asyncio.sleep(0.2)  # less than it was told to wait

    async def answers(self, *statuses: int) -> None:
        """Returns when some more answers of these statuses have come."""
        begin = len(self.told)

        def have_come() -> bool:
            return sum(told.status in statuses for told in self.told[begin:]) >= SOME

        await asyncio.to_thread(until, have_come, 120, f"answers of {statuses}")

    def go_home(self) -> None:
        """Ask nothing more."""
        self._going_home = True


def body(chance: random.Random) -> Body:
    """Something at once, or a stream that takes up to a second."""
    some = chat(ECHO, "a b c", max_tokens=chance.randint(1, 20), n=chance.choice([1, 2]))
    paced = chat(PACED, "a b c", max_tokens=chance.randint(10, 90)) | STREAM
    return chance.choice([some, some | STREAM, paced, paced])


@pytest.mark.parametrize("away", ["is stopped", "has crashed", "answers nothing"])
async def test_nothing_is_lost_and_nothing_doubled_while_the_store(
    deployment: Deployment, postgres_server: PostgresCluster, report: Report, away: str
) -> None:
    """While the store is away running answers end, and soon; new requests are refused or served, as the
    setting says; whatever only the store knows is refused. When it is back it has each request once, as its
    client was told."""
    server, store, setting = deployment
    lost, found = server.log("the store is down"), server.log("the store is back")
    key = Office(server).key(away)
    of_money = Office(server).key("of money", limits={"overall": {"dollars_per_month": "1"}})
    crowd = Crowd(server, key)
    async with asyncio.TaskGroup() as tasks:
        for number in range(CLIENTS):
            tasks.create_task(crowd.client(number))
        await crowd.answers(200)
        try:
            await asyncio.to_thread(take_away, postgres_server, away)
            await asyncio.to_thread(
                until, lambda: len(server.log("the store is down")) == len(lost) + 2, 30, "both routers"
            )
            await crowd.answers(503 if setting == "refuse" else 200)
            asked = await asyncio.to_thread(Office(server).ask, "GET", "/api/keys")
            spent = await hear(server, chat(ECHO, "a"), bearer(of_money.secret, x_request_id="money"))
        finally:
            bring_back(postgres_server, away)
        back_at = time.perf_counter()
        await asyncio.to_thread(
            until, lambda: len(server.log("the store is back")) == len(found) + 2, 30, "both routers"
        )
        back_s = time.perf_counter() - back_at
        await crowd.answers(200)
        crowd.go_home()
    await asyncio.to_thread(until, lambda: is_settled(store), 30, "the end of every request")

    rows = ledger(store, [key.id])
    told = {one.name: one for one in crowd.told}
    assert len(rows) == len(told)
    assert {row.request_id for row in rows} == told.keys()
    for row in rows:
        assert_kept(row, told[row.request_id])
    outcomes = Counter((one.status, one.code) for one in crowd.told)
    expected = {(200, ""), (503, "store_unavailable")} if setting == "refuse" else {(200, "")}
    assert outcomes.keys() == expected
    # Nobody knows what has been spent before.
    assert (asked.status_code, asked.json()["error"]["code"]) == (503, "store_unavailable")
    assert (spent.status, spent.code) == (503, "store_unavailable")
    assert crowd.longest_s < GIVEN_UP_S
    report(
        f"the store {away} ({setting})",
        f"{len(rows)} requests, {dict(outcomes)}; the longest answer took {crowd.longest_s:.1f} s, the store"
        f" was in use {back_s:.1f} s after it was back",
    )


@pytest.mark.slow
@pytest.mark.parametrize("deployment", ["serve"], indirect=True)
async def test_what_waits_for_the_store_outlives_its_router(
    deployment: Deployment, postgres_server: PostgresCluster, report: Report
) -> None:
    """Where all routers are killed while the store is away, the ones that come after bring it what the dead
    ones had kept: every answer that a client saw whole, once."""
    server, store, _ = deployment
    lost = server.log("the store is down")
    key = Office(server).key("waits")
    crowd = Crowd(server, key)
    async with asyncio.TaskGroup() as tasks:
        for number in range(CLIENTS):
            tasks.create_task(crowd.client(number))
        await crowd.answers(200)
        try:
            await asyncio.to_thread(postgres_server.stop)
            await asyncio.to_thread(
                until, lambda: len(server.log("the store is down")) == len(lost) + 2, 30, "both routers"
            )
            await crowd.answers(200)
            for router in server.routers().values():
                router.kill()
            await crowd.answers(0)
        finally:
            postgres_server.start()
        back_at = time.perf_counter()
        await crowd.answers(200)
        back_s = time.perf_counter() - back_at
        crowd.go_home()
    await asyncio.to_thread(until, lambda: len(server.routers()) == 2, 60, "both routers")
    await asyncio.to_thread(until, lambda: is_settled(store), 60, "the end of every request")

    rows = {row.request_id: row for row in ledger(store, [key.id])}
    assert len(rows) == len(ledger(store, [key.id]))
    for told in crowd.told:
        if told.complete:
            assert_kept(rows[told.name], told)
        elif told.begun:
            assert rows[told.name].outcome in {INTERRUPTED, "completed"}
    outcomes = dict(Counter(row.outcome for row in rows.values()))
    report("all routers killed while the store was away", f"{outcomes}; {back_s:.0f} s until they served")


def take_away(server: PostgresCluster, away: str) -> None:
    """As it happens."""
    if away == "answers nothing":
        server.pause()
    else:
        server.stop("immediate" if away == "has crashed" else "fast")


def bring_back(server: PostgresCluster, away: str) -> None:
    """In the thread that lives as long as the server has to."""
    if away == "answers nothing":
        server.go_on()
    else:
        server.start()
