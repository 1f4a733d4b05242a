"""What goes wrong around the ledger: rows that no store takes, clients that leave, routers that end, and a
store that is busy at the wrong moment."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import select
from structlog.testing import capture_logs

from router.accounts import accounts as accounts_module
from router.accounts import living
from router.accounts import store as store_module
from router.accounts.accounts import Accounts
from router.accounts.row import Row
from router.accounts.schema import INTERRUPTED, OPEN, routers
from router.accounts.settings import AccountsSettings
from router.accounts.spool import Spool, left_behind
from router.accounts.store import Store
from router.gate import Settlement
from router.settings import ModelLimits
from tests.harness import Deployment, HandEngine, Served, deployed, echo_engine, request, served
from tests.router.accounts.gated import (
    KEY,
    accounts_on,
    as_admin,
    prepare,
    router_accounts,
    row_of,
    rows,
)
from tests.waiting import PATIENCE_S, soon, until
from tests.wire import Wire

pytestmark = pytest.mark.usefixtures("quick_hashes")


def row(number: int, **fields: Any) -> Row:
    """A settled row that is told from all others."""
    common = {"router": "r" * 32, "path": "/v1/completions", "outcome": "completed"} | fields
    return Row(f"{number:032x}", account_id="a" * 32, key_id="k" * 32, request_id=f"row-{number}", **common)


def impossible(number: int) -> Row:
    """A row with a price that no store can hold, though a spool can."""
    return row(number, price_nano=2**63)


@contextmanager
def locked(url: str) -> Iterator[None]:
    """In the block nobody else writes into the file, nor reads it."""
    blocker = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
    blocker.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        blocker.execute("ROLLBACK")
        blocker.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is locked counts as a store that is down at once."""
    monkeypatch.setattr(store_module, "LEDGER_S", 0)


async def opened(url: str, folder: Path) -> Accounts:
    """The accounts of a router that the test ends itself."""
    return await Accounts.opened(AccountsSettings(store=SecretStr(url), folder=folder), "router-0")


async def living_routers(url: str) -> list[str]:
    """The routers that the store takes for living."""
    store = Store(url)
    async with store.begin() as connection:
        found = list((await connection.execute(select(routers.c.id))).scalars())
    await store.close()
    return found


async def last_seen(url: str) -> int:
    """When the only router last said that it lives."""
    store = Store(url)
    async with store.begin() as connection:
        moment: int = (await connection.execute(select(routers.c.seen_us))).scalar_one()
    await store.close()
    return moment


async def ask(deployment: Deployment, text: str, name: str, **parameters: Any) -> Wire:
    """A request of the first admin's, under that x-request-id, still to be read."""
    wire = await deployment.dial()
    wire.post(request(text, **parameters), x_request_id=name, authorization=f"Bearer {KEY}")
    return wire


# ---- rows that no store takes -------------------------------------------------------------------------


async def test_a_row_that_cannot_be_written_costs_no_other_its_place(store_url: str, tmp_path: Path) -> None:
    """Of a group in which one row cannot be written all others are, whoever waits for it goes on, the store
    does not count as down, and the row stands in the log."""
    async with accounts_on(store_url, tmp_path) as accounts:
        with capture_logs() as logged:
            for number in range(20):
                last = accounts.ledger.put(impossible(number) if number == 7 else row(number))
            await soon(last)
        assert not accounts.ledger.down
        assert (await rows(store_url)).keys() == {f"row-{n}" for n in range(20) if n != 7}
        (line,) = [each for each in logged if each["event"] == "a row was not written"]
        assert line["row"]["request_id"] == "row-7"
        await soon(accounts.ledger.put(row(20)))
        assert "row-20" in await rows(store_url)


@pytest.mark.usefixtures("impatient")
async def test_a_row_that_cannot_be_written_does_not_keep_the_store_down(
    sqlite_url: str, tmp_path: Path
) -> None:
    """Where such a row waits in the spool all others reach the store when it is back, and nothing is left."""
    async with accounts_on(sqlite_url, tmp_path) as accounts:
        with locked(sqlite_url):
            await soon(accounts.ledger.put(row(0)))
            assert accounts.ledger.down
            for number in range(1, 5):
                accounts.ledger.put(impossible(number) if number == 2 else row(number))
        await until(lambda: not accounts.ledger.down)
        assert (await rows(sqlite_url)).keys() == {"row-0", "row-1", "row-3", "row-4"}
        assert list((tmp_path / "spools").iterdir()) == []


async def test_what_a_dead_router_left_cannot_do_any_harm(
    store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dead router's rows are brought to the store but for those that it does not take; what looks like a
    spool and is none keeps nobody from living and from looking after the dead."""
    monkeypatch.setattr(living, "BEAT_S", 0.05)
    dead = Spool(tmp_path / "spools", "dead", 10**6)
    for number in range(5):
        dead.put(impossible(number) if number == 2 else row(number))
    dead.close()
    (tmp_path / "spools" / "nonsense.spool").write_bytes(b"\0\0\0\1\xc1no spool" * 10)
    (tmp_path / "spools" / "folder.spool").mkdir()
    async with accounts_on(store_url, tmp_path):
        for number in (0, 1, 3, 4):
            await row_of(store_url, f"row-{number}")
        await until(lambda: [path.name for path in (tmp_path / "spools").iterdir()] == ["folder.spool"])
        beats = {await last_seen(store_url)}
        deadline = asyncio.get_running_loop().time() + PATIENCE_S
        while len(beats) < 3:
            assert asyncio.get_running_loop().time() < deadline, "the router has stopped to say that it lives"
            beats.add(await last_seen(store_url))


async def test_what_is_too_long_is_cut(store_url: str, tmp_path: Path) -> None:
    """A provider may call its errors as it likes, and live anywhere: the row has the beginning."""
    async with accounts_on(store_url, tmp_path) as accounts:
        entry = await accounts.enter([(b"authorization", f"Bearer {KEY}".encode())], "1" * 32, "mine", "/v1")
        entry.settle(Settlement("failed", 502, "echo", "e" * 100, "h" * 300, 1, 2, None, 3))
        await soon(entry.written())
        found = (await rows(store_url))["mine"]
        assert (found.error, found.replica) == ("e" * 64, "h" * 200)


# ---- routers that end ---------------------------------------------------------------------------------


async def test_a_row_that_comes_after_the_end_is_kept(store_url: str, tmp_path: Path) -> None:
    """What is settled when its router has already left the store is brought there by the next one."""
    await prepare(store_url)
    async with router_accounts(store_url, tmp_path) as ended:
        pass
    await soon(ended.ledger.put(row(1)))
    await soon(ended.ledger.put(row(2)))
    assert await rows(store_url) == {}
    ended.ledger._spool.close()
    async with router_accounts(store_url, tmp_path):
        await row_of(store_url, "row-1")
        await row_of(store_url, "row-2")
        await until(lambda: not list((tmp_path / "spools").iterdir()))


async def test_a_router_says_goodbye_though_it_was_busy(sqlite_url: str, tmp_path: Path) -> None:
    """A router that ends while it waits for the store writes what it has, and interrupts at once what it will
    not settle any more: nobody has to find it dead first."""
    await prepare(sqlite_url)
    accounts = await opened(sqlite_url, tmp_path)
    own = {"router": accounts._identity, "outcome": OPEN}
    await soon(accounts.ledger.put(row(1, **own)))
    with locked(sqlite_url):
        accounts.ledger.put(row(2, **own))
        accounts.ledger.put(row(3))
        ending = asyncio.create_task(accounts.close())
        await asyncio.sleep(0)
    await soon(ending)
    assert {name: each.outcome for name, each in (await rows(sqlite_url)).items()} == {
        "row-1": INTERRUPTED,
        "row-2": INTERRUPTED,
        "row-3": "completed",
    }
    assert await living_routers(sqlite_url) == []
    assert list(left_behind(tmp_path / "spools")) == []


@pytest.mark.usefixtures("impatient")
async def test_a_store_that_is_lost_at_the_very_end_loses_nothing(sqlite_url: str, tmp_path: Path) -> None:
    """A router that ends while the store is away leaves its last rows to the next one."""
    await prepare(sqlite_url)
    accounts = await opened(sqlite_url, tmp_path)
    with locked(sqlite_url):
        accounts.ledger.put(row(1))
        await soon(accounts.close())
    assert len(list((tmp_path / "spools").iterdir())) == 1
    async with router_accounts(sqlite_url, tmp_path):
        await row_of(sqlite_url, "row-1")


async def test_the_loop_turns_while_a_long_spool_is_replayed(
    sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many rows a dead router has left, others have their turn between two commits of them."""
    monkeypatch.setattr("router.accounts.ledger.REPLAYED", 10)
    dead = Spool(tmp_path / "spools", "dead", 10**9)
    for number in range(300):
        dead.put(row(number))
    dead.close()
    await prepare(sqlite_url)
    seen = set()
    reader = sqlite3.connect(tmp_path / "store.sqlite")

    async def watch() -> None:
        while 300 not in seen:
            seen.add(reader.execute("SELECT count(*) FROM requests").fetchone()[0])
            await asyncio.sleep(0)

    watching = asyncio.create_task(watch())
    async with router_accounts(sqlite_url, tmp_path):
        await soon(watching)
    reader.close()
    assert len(seen) > 10


# ---- a store that is away -----------------------------------------------------------------------------


@pytest.mark.usefixtures("impatient")
async def test_refusals_do_not_fill_the_disk(sqlite_url: str, tmp_path: Path) -> None:
    """When the spool is full new requests are refused, and of these it takes no row: clients that come again
    and again take no more room. What was let in before is still kept."""
    engine = HandEngine()
    async with (
        accounts_on(sqlite_url, tmp_path, when_store_is_down="serve", spool_bytes=64 * 1024) as accounts,
        deployed(served(engine), accounts=accounts) as deployment,
    ):
        running = await ask(deployment, "a", "running")
        await until(lambda: engine.requests)
        with locked(sqlite_url):
            await soon(accounts.ledger.put(row(0)))
            assert accounts.ledger.down
            number = 0
            while not accounts.ledger.full:
                number += 1
                accounts.ledger.put(row(number))
            before = accounts.ledger.spooled_bytes
            for _ in range(20):
                refused = await deployment.post(request("a"), **as_admin(x_request_id="refused"))
                assert refused.status_code == 503
                assert refused.json()["error"]["code"] == "store_unavailable"
                assert "retry-after" in refused.headers
            assert accounts.ledger.spooled_bytes == before
            engine.say("b", "stop")
            assert await running.head() == 200
            await running.body()
        await until(lambda: not accounts.ledger.down)
        found = await rows(sqlite_url)
        assert "refused" not in found
        assert (found["running"].outcome, found["running"].completion_tokens) == ("completed", 1)
        assert len(found) == number + 2


# ---- what clients were told ---------------------------------------------------------------------------


async def test_a_client_that_leaves_while_its_end_is_written_was_told_no_end(
    sqlite_url: str, tmp_path: Path
) -> None:
    """Where a client leaves in the moment in which the row of its complete answer is on its way, the row says
    that it left, and has the tokens that it was handed."""
    engine = HandEngine()
    async with (
        accounts_on(sqlite_url, tmp_path) as accounts,
        deployed(served(engine), accounts=accounts) as deployment,
    ):
        wire = await ask(deployment, "a b c", "leaves", stream=True)
        await until(lambda: engine.requests)
        engine.say("x")
        await wire.event()
        await row_of(sqlite_url, "leaves", settled=False)
        with locked(sqlite_url):
            engine.say("y", "stop")
            await until(lambda: accounts.ledger._committing is not None)
            wire.leave()
            await until(lambda: not deployment.tasks)
        found = await row_of(sqlite_url, "leaves")
        await until(lambda: accounts.ledger._committing is None)
        found = (await rows(sqlite_url))["leaves"]
        assert (found.outcome, found.status, found.completion_tokens) == ("cancelled", 499, 1)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_row_has_the_tokens_of_all_choices(store_url: str, tmp_path: Path, stream: bool) -> None:
    """Of a request for several choices the row has the very usage that the client was told."""
    async with (
        accounts_on(store_url, tmp_path) as accounts,
        deployed(served(echo_engine()), accounts=accounts) as deployment,
    ):
        options = {"stream_options": {"include_usage": True}} if stream else {}
        wire = await ask(deployment, "one two", "mine", n=3, max_tokens=2, stream=stream, **options)
        told = (await wire.answer()).events[-1] if stream else json.loads(await wire.body())
        found = (await rows(store_url))["mine"]
    assert told["usage"]["completion_tokens"] == 6
    assert found.completion_tokens == 6
    assert found.prompt_tokens == told["usage"]["prompt_tokens"]
    assert found.stream is stream


async def test_only_the_replica_that_answered_counts(store_url: str, tmp_path: Path) -> None:
    """A request whose first replica was lost before it said anything is in the ledger once, with what the
    second has done."""
    engines = HandEngine(), HandEngine()
    async with (
        accounts_on(store_url, tmp_path) as accounts,
        deployed(served(*engines), accounts=accounts) as deployment,
    ):
        wire = await ask(deployment, "a b", "retried", stream=True)
        await until(lambda: any(engine.requests for engine in engines))
        (first,) = [at for at, engine in enumerate(engines) if engine.requests]
        replicas = deployment.replicas["echo"]
        await replicas[first].kill()
        second = engines[1 - first]
        await until(lambda: second.requests)
        del replicas[first]
        second.say("x")
        second.say("y", "stop")
        assert (await wire.answer()).done
        found = await rows(store_url)
        assert found.keys() == {"retried"}
        assert found["retried"].replica == f"replica-{1 - first}"
        assert (found["retried"].prompt_tokens, found["retried"].completion_tokens) == (2, 2)
        assert found["retried"].outcome == "completed"


async def test_who_is_refused_by_the_queue_is_in_the_ledger(store_url: str, tmp_path: Path) -> None:
    """A request that was let in by its limits and found no place is there as refused, and costs nothing."""
    engine = HandEngine()
    one: Served = served(engine, limits=ModelLimits(in_flight=1, queued=0))
    async with accounts_on(store_url, tmp_path) as accounts, deployed(one, accounts=accounts) as deployment:
        running = await ask(deployment, "a", "running")
        await until(lambda: engine.requests)
        refused = await deployment.post(request("a"), **as_admin(x_request_id="refused"))
        assert refused.status_code == 429
        found = await row_of(store_url, "refused")
        assert (found.outcome, found.status, found.error) == ("refused", 429, "overloaded")
        assert (found.prompt_tokens, found.completion_tokens, found.price_nano) == (0, 0, 0)
        engine.say("x", "stop")
        await running.body()


# ---- a store in a file --------------------------------------------------------------------------------


async def test_what_was_committed_does_not_pile_up_beside_the_file(
    sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows move from the log of the file into the file itself while the router runs, and the log begins
    anew."""
    monkeypatch.setattr(accounts_module, "TIDY_S", 0.02)
    file = tmp_path / "store.sqlite"
    async with accounts_on(sqlite_url, tmp_path) as accounts:
        before, numbers = file.stat().st_size, count()
        while file.stat().st_size < before + 500_000:
            for number in islice(numbers, 100):
                last = accounts.ledger.put(row(number))
            await soon(last)
        log = file.with_name("store.sqlite-wal").stat().st_size
        assert log < 10 * file.stat().st_size
