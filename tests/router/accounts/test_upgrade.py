from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, inspect, text

from router.accounts import upgrade
from router.accounts.revision import REVISION, is_current
from router.accounts.schema import metadata, requests
from router.accounts.store import Store, StoreDown
from router.accounts.upgrade import StoreTooNew


def looked_at(url: str, look: Any) -> Any:
    """What a function finds on a connection of its own."""
    engine = create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    try:
        with engine.begin() as connection:
            return look(connection)
    finally:
        engine.dispose()


def revisions(url: str) -> list[str]:
    """The revisions that the store says it has."""
    found: list[str] = looked_at(
        url, lambda connection: list(connection.scalars(text("SELECT version_num FROM alembic_version")))
    )
    return found


async def test_the_migrations_make_the_schema(store_url: str) -> None:
    """What all migrations together make of an empty database is what the code works with: tables, columns,
    their types, keys and indices."""
    store = Store(store_url)
    upgrade.upgrade(store)

    def differences(connection: Connection) -> Any:
        options = {"compare_type": True, "compare_server_default": True}
        return compare_metadata(MigrationContext.configure(connection, opts=options), metadata)

    assert looked_at(store_url, differences) == []

    def conditions(connection: Connection) -> list[str]:
        """Of an index, of which Alembic says nothing."""
        (found,) = [
            index
            for index in inspect(connection).get_indexes(requests.name)
            if index["name"] == "ix_requests_open"
        ]
        options = found["dialect_options"]
        return [str(value) for name, value in options.items() if name.endswith("_where")]

    (condition,) = looked_at(store_url, conditions)
    assert "outcome" in condition
    assert "'open'" in condition
    upgrade.check(store)
    await store.close()


async def test_to_upgrade_twice_is_to_upgrade_once(store_url: str) -> None:
    """A store of this version is left as it is."""
    store = Store(store_url)
    upgrade.upgrade(store)
    before = revisions(store_url)
    upgrade.upgrade(store)
    assert revisions(store_url) == before
    assert len(before) == 1
    await store.close()


async def test_several_may_upgrade_at_once(store_url: str) -> None:
    """Of those who start together one makes the tables, and the others wait for it."""
    stores = [Store(store_url) for _ in range(4)]
    await asyncio.gather(*(asyncio.to_thread(upgrade.upgrade, store) for store in stores))
    for store in stores:
        upgrade.check(store)
        await store.close()
    assert len(revisions(store_url)) == 1


async def test_whoever_comes_second_waits_longer_than_the_ledger_would(sqlite_url: str) -> None:
    """A migration may take longer than anything else in the store: who waits for it does not take it for a
    store that is away."""
    first, second = Store(sqlite_url), Store(sqlite_url)
    upgrade.upgrade(first)
    with first.ledger_engine.connect() as holder:
        holder.exec_driver_sql("BEGIN IMMEDIATE")
        waits = asyncio.create_task(asyncio.to_thread(upgrade.upgrade, second))
        with pytest.raises(TimeoutError):
            # The ledger gives up after two.
            await asyncio.wait_for(asyncio.shield(waits), 3)
        holder.rollback()
    await waits
    await first.close()
    await second.close()


async def test_a_long_migration_is_not_cut_off(postgresql_url: str) -> None:
    """PostgreSQL would end any other statement of ours after two seconds, and any wait for a lock."""
    store = Store(postgresql_url)
    with store.ledger_engine.connect() as connection:
        upgrade._lock(connection)
        limits = [
            connection.exec_driver_sql(f"SHOW {name}").scalar_one()
            for name in ("statement_timeout", "lock_timeout")
        ]
        assert limits == ["0", "0"]
        connection.rollback()
        assert connection.exec_driver_sql("SHOW statement_timeout").scalar_one() == "2s"
    await store.close()


async def test_nothing_goes_back(store_url: str) -> None:
    """A store that a later version has upgraded is refused, by who starts and by routers, and left alone."""
    store = Store(store_url)
    upgrade.upgrade(store)
    looked_at(
        store_url,
        lambda connection: connection.execute(text("UPDATE alembic_version SET version_num='9999'")),
    )
    for refused in (upgrade.upgrade, upgrade.check):
        with pytest.raises(StoreTooNew, match=r"later version of Trunkline \(revision 9999\)"):
            refused(store)
    assert revisions(store_url) == ["9999"]
    await store.close()


async def test_a_router_does_not_work_on_tables_of_another_version(store_url: str, tmp_path: Path) -> None:
    """Where nobody has upgraded the store yet it counts as down."""
    (tmp_path / "store.sqlite").touch()
    store = Store(store_url)
    with pytest.raises(StoreDown):
        upgrade.check(store)
    await store.close()


async def test_a_migration_that_fails_leaves_nothing(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are made in one transaction: where it does not end, the next start finds an empty store."""
    store = Store(store_url)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Connection, "commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            upgrade.upgrade(store)
    assert looked_at(store_url, lambda connection: inspect(connection).get_table_names()) == []
    upgrade.upgrade(store)
    upgrade.check(store)
    await store.close()


async def test_a_file_that_cannot_be_made_is_a_store_that_is_down(tmp_path: Path) -> None:
    """Where no file can be, whoever starts is told that the store cannot be reached."""
    (tmp_path / "file").touch()
    store = Store(f"sqlite:///{tmp_path}/file/store.db")
    with pytest.raises(StoreDown):
        upgrade.upgrade(store)
    await store.close()


async def test_a_store_in_a_file_is_its_owners(tmp_path: Path) -> None:
    """Hashes of passwords and keys are in it: nobody else may read the file, nor what is made beside it."""
    store = Store(f"sqlite:///{tmp_path}/own/store.db")
    upgrade.upgrade(store)
    reader = sqlite3.connect(tmp_path / "own" / "store.db")
    reader.execute("SELECT * FROM accounts")
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "own").iterdir()}
    assert set(modes.values()) == {0o600}
    assert (tmp_path / "own").stat().st_mode & 0o777 == 0o700
    reader.close()
    await store.close()


def test_a_router_knows_the_newest_revision() -> None:
    """What a router looks for is what an upgrade leads to."""
    assert ScriptDirectory(str(upgrade.MIGRATIONS)).get_current_head() == REVISION


async def test_a_router_knows_a_store_that_it_can_work_with(store_url: str) -> None:
    """A store without tables is none, an upgraded one is."""
    store = Store(store_url)
    assert not await asyncio.to_thread(is_current, store)
    await asyncio.to_thread(upgrade.upgrade, store)
    assert await asyncio.to_thread(is_current, store)
    await store.close()


def test_a_router_beside_a_file_holds_no_other_library() -> None:
    """What upgrades a store, PostgreSQL's driver and Redis's client are loaded where they are used."""
    code = "import sys, router.accounts.accounts; print({'alembic', 'psycopg', 'redis'} & sys.modules.keys())"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
