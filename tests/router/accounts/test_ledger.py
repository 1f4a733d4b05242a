from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest
from sqlalchemy import event

from router.accounts import living
from router.accounts.row import Row
from router.accounts.schema import INTERRUPTED, OPEN
from router.accounts.settings import Price
from tests.harness import Deployment, HandEngine, deployed, echo_engine, request, served
from tests.router.accounts.gated import (
    KEY,
    accounts_on,
    as_admin,
    die,
    prepare,
    router_accounts,
    row_of,
    rows,
)
from tests.stores import PostgresCluster, postgres_cluster
from tests.waiting import soon, until
from tests.wire import Wire

PRICE = Price(prompt=Decimal("1.5"), completion=Decimal("2.001"))


@pytest.fixture(scope="module")
def own_postgres() -> Iterator[PostgresCluster]:
    """A server that may be stopped."""
    with postgres_cluster() as cluster:
        yield cluster


async def open_stream(deployment: Deployment, text: str, name: str) -> Wire:
    """A stream of the first admin's, under that x-request-id, still to be read."""
    wire = await deployment.dial()
    wire.post(request(text, stream=True), x_request_id=name, authorization=f"Bearer {KEY}")
    return wire


async def test_a_whole_answer_is_in_the_ledger_before_its_client_has_it(
    store_url: str, tmp_path: Path
) -> None:
    """Whoever has an answer finds its row in the store, with the usage that the answer tells and a price."""
    async with (
        accounts_on(store_url, tmp_path) as accounts,
        deployed(served(echo_engine(), price=PRICE), accounts=accounts) as deployment,
    ):
        headers = as_admin(x_request_id="mine", user_agent="tests/1")
        answer = await deployment.post(request("one two three", max_tokens=2), **headers)
        row = (await rows(store_url))["mine"]
    usage = answer.json()["usage"]
    assert (row.prompt_tokens, row.completion_tokens) == (usage["prompt_tokens"], 2)
    assert (row.outcome, row.status, row.error, row.stream) == ("completed", 200, "", False)
    assert row.price_nano == usage["prompt_tokens"] * 1500 + 2 * 2001
    assert (row.model, row.user_agent, row.path) == ("echo", "tests/1", "/v1/chat/completions")
    assert row.first_us is not None
    assert row.duration_us is not None
    assert 0 < row.first_us <= row.duration_us


async def test_a_stream_is_open_while_it_runs_and_settled_before_it_ends(
    store_url: str, tmp_path: Path
) -> None:
    """From a stream's first bytes on its row is there, open; with its last bytes it is settled."""
    engine = HandEngine()
    async with (
        accounts_on(store_url, tmp_path) as accounts,
        deployed(served(engine), accounts=accounts) as deployment,
    ):
        wire = await open_stream(deployment, "a b", "mine")
        await until(lambda: engine.requests)
        engine.say("x")
        await wire.head()
        row = (await rows(store_url))["mine"]
        assert (row.outcome, row.stream, row.completion_tokens) == (OPEN, True, 0)
        engine.say("y", "stop")
        await wire.answer()
        row = (await rows(store_url))["mine"]
        assert (row.outcome, row.prompt_tokens, row.completion_tokens) == ("completed", 2, 2)


async def test_every_end_of_a_request_has_its_row(store_url: str, tmp_path: Path) -> None:
    """A client that leaves is charged what it was handed; what is refused, and what fails, stand there with
    status and code; who has no key is in no ledger."""
    engine = HandEngine()
    async with (
        accounts_on(store_url, tmp_path) as accounts,
        deployed(served(engine, price=PRICE), accounts=accounts) as deployment,
    ):
        leaving = await open_stream(deployment, "a b c", "leaves")
        failing = await open_stream(deployment, "a b", "fails")
        await until(lambda: len(engine.requests) == 2)
        engine.say("x")
        await leaving.event()
        await failing.head()
        leaving.leave()
        row = await row_of(store_url, "leaves")
        assert (row.outcome, row.status, row.prompt_tokens, row.completion_tokens) == ("cancelled", 499, 3, 1)
        assert row.price_nano == 3 * 1500 + 2001

        await deployment.replicas["echo"][0].kill()
        assert (await failing.answer()).error is not None
        row = (await rows(store_url))["fails"]
        assert (row.outcome, row.error, row.completion_tokens) == ("failed", "replica_lost", 1)
        deployment.replicas["echo"].clear()

        refused = await deployment.post(request("a", n=0), **as_admin(x_request_id="refused"))
        assert refused.status_code == 400
        row = (await rows(store_url))["refused"]
        assert (row.outcome, row.status, row.error, row.price_nano) == ("refused", 400, "invalid_value", 0)

        strange = await deployment.post(
            request("a"), **{"authorization": "Bearer tk-no", "x-request-id": "strange"}
        )
        assert (strange.status_code, strange.json()["error"]["code"]) == (401, "invalid_api_key")
        nobody = await deployment.post(request("a"), **{"x-request-id": "nobody"})
        assert (nobody.status_code, nobody.json()["error"]["code"]) == (401, "missing_api_key")
        assert {"strange", "nobody"} & (await rows(store_url)).keys() == set()


async def test_what_a_dead_router_had_open_is_interrupted_and_only_that(
    store_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a router has died its open rows are closed as interrupted, by another one; those of a living
    router stay open."""
    monkeypatch.setattr(living, "BEAT_S", 0.1)
    monkeypatch.setattr(living, "LEASE_S", 1.0)
    engines = HandEngine(), HandEngine()
    await prepare(store_url)
    async with (
        router_accounts(store_url, tmp_path) as living_one,
        router_accounts(store_url, tmp_path) as dead_one,
        deployed(served(engines[0]), accounts=living_one) as alive,
        deployed(served(engines[1]), accounts=dead_one) as dying,
    ):
        wires = [await open_stream(alive, "a", "lives"), await open_stream(dying, "a", "dies")]
        await until(lambda: engines[0].requests and engines[1].requests)
        for engine in engines:
            engine.say("x")
        for wire in wires:
            await wire.head()
        die(dead_one)
        row = await row_of(store_url, "dies")
        assert (row.outcome, row.completion_tokens, row.price_nano) == (INTERRUPTED, 0, 0)
        assert (await rows(store_url))["lives"].outcome == OPEN
        engines[0].say("y", "stop")
        engines[1].say("y", "stop")
        assert (await wires[0].answer()).done
        assert (await rows(store_url))["lives"].outcome == "completed"


@pytest.mark.parametrize("setting", ["refuse", "serve"])
async def test_nothing_is_lost_while_the_store_is_away(
    own_postgres: PostgresCluster, tmp_path: Path, setting: str
) -> None:
    """While the store is stopped running answers end as ever; new requests are refused, or served by the keys
    that are known, as the setting says. When it is back it has every row, once."""
    url = own_postgres.url(own_postgres.create_database())
    engine = HandEngine()
    async with (
        accounts_on(url, tmp_path, when_store_is_down=setting) as accounts,
        deployed(served(engine), accounts=accounts) as deployment,
    ):
        running = await open_stream(deployment, "a b", "before")
        await until(lambda: engine.requests)
        engine.say("x")
        await running.head()
        await asyncio.to_thread(own_postgres.stop)
        engine.say("y", "stop")
        assert (await running.answer()).done
        assert accounts.ledger.down

        asked = asyncio.create_task(deployment.post(request("c"), **as_admin(x_request_id="during")))
        if setting == "serve":
            await until(lambda: engine.requests)
            engine.say("z", "stop")
        answer = await soon(asked)
        assert answer.status_code == (200 if setting == "serve" else 503)

        own_postgres.start()  # in this thread: the server ends with the one that started it
        await until(lambda: not accounts.ledger.down)
        found = await rows(url)
        assert found["before"].completion_tokens == 2
        assert found["during"].status == answer.status_code
        assert len(found) == 2
        assert not list((tmp_path / "spools").iterdir())


async def test_rows_of_a_router_that_died_while_the_store_was_away_are_kept(tmp_path: Path) -> None:
    """What a router had put into its spool when it died is brought to the store by another one, once; what
    was open there is interrupted."""
    url = f"sqlite:///{tmp_path}/store.db"
    await prepare(url)
    async with router_accounts(url, tmp_path, when_store_is_down="serve") as dying:
        blocker = sqlite3.connect(tmp_path / "store.db", isolation_level=None)
        blocker.execute("BEGIN EXCLUSIVE")
        row = Row("1" * 32, "r" * 32, "a" * 32, "k" * 32, "settled", "/v1/completions", outcome="completed")
        await soon(dying.ledger.put(row))
        assert dying.ledger.down
        dying.ledger.put(Row("2" * 32, "r" * 32, "a" * 32, "k" * 32, "open", "/v1/completions"))
        die(dying)
        blocker.execute("COMMIT")
        blocker.close()
    async with router_accounts(url, tmp_path):
        assert (await row_of(url, "settled")).outcome == "completed"
        assert (await row_of(url, "open", settled=False)).outcome in {OPEN, INTERRUPTED}
    assert not list((tmp_path / "spools").iterdir())


async def test_a_burst_is_committed_in_groups(tmp_path: Path) -> None:
    """Rows that come together are committed together, and a row that is settled before it was written is
    written once."""
    url = f"sqlite:///{tmp_path}/store.db"
    await prepare(url)
    commits = 0

    def count(_: object) -> None:
        nonlocal commits
        commits += 1

    async with router_accounts(url, tmp_path) as accounts:
        event.listen(accounts.store.ledger_engine, "commit", count)
        burst = [
            Row(f"{i:032}", "r" * 32, "a" * 32, "k" * 32, f"row-{i}", "/v1/completions") for i in range(500)
        ]
        for row in burst:
            accounts.ledger.put(row)
        for row in burst:
            row.outcome = "completed"
            last = accounts.ledger.put(row)
        await soon(last)
        assert {row.outcome for row in (await rows(url)).values()} == {"completed"}
        assert commits <= 3
