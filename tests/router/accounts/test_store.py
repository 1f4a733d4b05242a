from __future__ import annotations

import asyncio
import logging
import socket
import sqlite3
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import insert, select

from router.accounts import store as module
from router.accounts.bootstrap import prepare
from router.accounts.schema import accounts
from router.accounts.store import BadStore, Duplicate, Store, StoreDown, parse, translated
from tests.stores import PostgresCluster, postgres_cluster
from tests.waiting import soon, until

SECRET = "s3cret-of-the-store"  # noqa: S105 - nobody's


def account(name: str) -> dict[str, object]:
    """A row of `accounts`."""
    return {
        "id": name,
        "name": name,
        "role": "member",
        "password": SECRET,
        "disabled": False,
        "limits": {},
        "created_us": 0,
    }


def unused_port() -> int:
    """A port at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Everything is logged, and the secret is in none of it."""
    caplog.set_level(logging.DEBUG)
    yield
    records = map(logging.Formatter().format, caplog.get_records("call"))
    assert SECRET not in "".join([*records, *capsys.readouterr()])


async def write(store: Store, *names: str, then: Exception | None = None, created_us: int = 0) -> None:
    """Make accounts with these names in one transaction, which ends as it says."""
    async with store.begin() as connection:
        for name in names:
            await connection.execute(insert(accounts).values(account(name) | {"created_us": created_us}))
        if then is not None:
            raise then


async def test_a_transaction_is_kept_whole_or_not_at_all(store_url: str) -> None:
    """What a block has written is there when it ends well, and gone when it does not."""
    store = Store(store_url)
    await prepare(store, None, None)
    await write(store, "kept", "too")
    with pytest.raises(KeyError):
        await write(store, "lost", then=KeyError())
    async with store.begin() as connection:
        names = set((await connection.execute(select(accounts.c.name))).scalars())
    assert names == {"admin", "kept", "too"}
    await store.close()


async def test_a_row_that_is_there_is_a_duplicate(store_url: str, said: None) -> None:
    """A second row with the same name is refused as such; no error and no log shows what was in it."""
    store = Store(store_url)
    await prepare(store, None, None)
    with pytest.raises(Duplicate) as refusal:
        await write(store, "one", "one")
    assert SECRET not in "".join(traceback.format_exception(refusal.value))
    await store.close()


async def test_what_fits_nowhere_is_our_mistake_and_shows_no_value(store_url: str, said: None) -> None:
    """A value that the database cannot hold does not pass for its being away, and is shown nowhere, and
    neither is what stood beside it."""
    store = Store(store_url)
    await prepare(store, None, None)
    with pytest.raises(Exception, match=r"too large|out of range") as refusal:
        await write(store, SECRET, created_us=2**70)
    assert not isinstance(refusal.value, StoreDown)
    assert SECRET not in "".join(traceback.format_exception(refusal.value))
    await store.close()


@pytest.mark.parametrize("failure", [sqlite3.OperationalError, psycopg.OperationalError])
def test_what_the_drivers_raise_is_translated_too(failure: type[Exception]) -> None:
    """The ledger speaks to the drivers themselves: their errors are the same as SQLAlchemy's."""
    with pytest.raises(StoreDown), translated():
        raise failure
    duplicate = sqlite3.IntegrityError if failure is sqlite3.OperationalError else psycopg.IntegrityError
    with pytest.raises(Duplicate), translated():
        raise duplicate


@pytest.mark.parametrize(
    "url",
    [
        pytest.param(f"postgresql://u:{SECRET}@127.0.0.1:{{port}}/db", id="nobody listens"),
        pytest.param("sqlite:///{folder}/no/such/folder/db", id="no folder"),
        pytest.param("sqlite:///{folder}/text", id="no database"),
        pytest.param("sqlite:///{folder}", id="a folder"),
    ],
)
async def test_a_store_that_is_not_there_is_down(url: str, tmp_path: Path, said: None) -> None:
    """Both doors of a store that cannot be reached say so, in one way, and tell nothing of its password."""
    (tmp_path / "text").write_text(f"no database, {SECRET}" * 100)
    store = Store(url.format(port=unused_port(), folder=tmp_path))
    with pytest.raises(StoreDown) as refusal:
        async with store.begin() as connection:
            await connection.execute(select(1))
    assert SECRET not in f"{refusal.value!r}{refusal.value.__cause__!r}"
    with pytest.raises(StoreDown), translated(), store.connect_ledger() as ledger:
        ledger.execute(select(accounts))
    await store.close()
    # Each connection to a file has a thread, and ends it.
    await until(lambda: not [each for each in threading.enumerate() if "connection_worker" in each.name])


@pytest.fixture(scope="module")
def own_postgres() -> Iterator[PostgresCluster]:
    """A server that may be stopped."""
    with postgres_cluster() as cluster:
        yield cluster


async def test_a_store_that_comes_back_is_used_again(own_postgres: PostgresCluster, said: None) -> None:
    """While PostgreSQL is stopped the store is down, in the middle of a transaction too; once it runs again
    nothing has to be done for it."""
    store = Store(own_postgres.url(own_postgres.create_database()))
    await prepare(store, None, None)

    async def stop_within() -> None:
        async with store.begin() as connection:
            await asyncio.to_thread(own_postgres.stop, "immediate")
            await connection.execute(select(1))

    with pytest.raises(StoreDown):
        await stop_within()
    with pytest.raises(StoreDown):
        async with store.begin():
            pass
    own_postgres.start()
    async with store.begin() as connection:
        assert (await connection.execute(select(accounts.c.name))).scalar_one() == "admin"
    await store.close()


async def test_a_store_that_hangs_is_down(
    own_postgres: PostgresCluster, monkeypatch: pytest.MonkeyPatch, said: None
) -> None:
    """Where PostgreSQL's processes answer nothing, a transaction that needs them fails after a while, and one
    at once as soon as that is known; when they go on it is used again."""
    monkeypatch.setattr(module, "ANSWER_S", 0.5)
    store = Store(own_postgres.url(own_postgres.create_database()))
    async with store.begin() as connection:
        await connection.execute(select(1))
    own_postgres.pause()
    try:
        with pytest.raises(StoreDown):
            async with store.begin() as connection:
                await soon(connection.execute(select(1)))
        store.is_away = lambda: True
        began = time.monotonic()
        with pytest.raises(StoreDown):
            async with store.begin():
                pass
        assert time.monotonic() - began < 0.1
    finally:
        own_postgres.go_on()
    store.is_away = lambda: False
    async with store.begin() as connection:
        assert (await connection.execute(select(1))).scalar_one() == 1
    await store.close()


async def test_a_wrong_password_is_a_store_that_is_down(postgresql_url: str, said: None) -> None:
    """Where PostgreSQL refuses us the password that it refused is in no error and no log."""
    user, _, rest = postgresql_url.partition("@")
    store = Store(f"{user.rpartition(':')[0]}:{SECRET}@{rest}")
    with pytest.raises(StoreDown) as refusal:
        async with store.begin():
            pass
    assert SECRET not in repr(refusal.value)
    await store.close()


async def test_readers_do_not_wait_for_a_writer_in_a_file(sqlite_url: str, tmp_path: Path) -> None:
    """In a file one transaction writes while others read what was there before."""
    store = Store(sqlite_url)
    await prepare(store, None, None)
    writer = sqlite3.connect(tmp_path / "store.sqlite", isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    writer.execute("DELETE FROM keys")
    async with store.begin() as connection:
        assert (await connection.execute(select(accounts.c.name))).scalar_one() == "admin"
    writer.close()
    await store.close()


@pytest.mark.parametrize(
    ("url", "why"),
    [
        (f"mysql://u:{SECRET}@h/db", "mysql:"),
        (f"postgresql+asyncpg://u:{SECRET}@h/db", r"postgresql\+asyncpg:"),
        (f"postgresql://u@h:{SECRET}/db", "not a URL"),
        (f"postgresql://u:{SECRET}@[::1/db", "not a URL"),
        (SECRET, "not a URL"),
        ("", "not a URL"),
        (f"postgresql://u:{SECRET}@h", "names no database"),
        ("sqlite://", "names no database"),
        ("sqlite:///:memory:", "names no database"),
    ],
)
def test_a_url_that_is_none_is_refused_without_its_password(url: str, why: str) -> None:
    """What no store can be at is refused with a reason that tells nothing of a password."""
    with pytest.raises(BadStore, match=why) as refusal:
        parse(url)
    assert SECRET not in "".join(traceback.format_exception(refusal.value))
