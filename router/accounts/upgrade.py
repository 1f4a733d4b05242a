"""Bring a store's tables up to date: forwards, never back."""

from __future__ import annotations

import logging
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from router.accounts.store import Store, StoreDown, translated

MIGRATIONS = Path(__file__).parent / "migrations"

WAIT_S = 60
"""Seconds that whoever comes second waits for a store in a file."""

_ONE_AT_A_TIME = 0x7472756E6B  # any number, as long as it is always the same


class StoreTooNew(Exception):
    """A later version of Trunkline has upgraded the store."""


def upgrade(store: Store) -> None:
    """Make the tables, or bring them from any earlier version to this one's. Whoever comes second waits.

    Raises StoreDown or StoreTooNew.
    """
    logging.getLogger("alembic").setLevel(logging.WARNING)
    with translated():
        if store.path is not None:
            store.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            store.path.touch(mode=0o600, exist_ok=True)
        with store.ledger_engine.connect() as connection:
            _lock(connection)
            config = Config(attributes={"connection": connection})
            config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
            _refuse_newer(connection, ScriptDirectory.from_config(config))
            command.upgrade(config, "head")
            connection.commit()


def check(store: Store) -> None:
    """Raises StoreDown where the tables are not this version's."""
    with translated(), store.ledger_engine.connect() as connection:
        script = ScriptDirectory(str(MIGRATIONS))
        _refuse_newer(connection, script)
        if MigrationContext.configure(connection).get_current_revision() != script.get_current_head():
            raise StoreDown


def _lock(connection: Connection) -> None:
    """Until the transaction ends, which may take far longer than a row of the ledger. SQLite's one writer is
    the lock there."""
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
        connection.exec_driver_sql("SET LOCAL lock_timeout = 0")
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _ONE_AT_A_TIME})
    else:
        connection.exec_driver_sql(f"PRAGMA busy_timeout = {WAIT_S * 1000}")
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _refuse_newer(connection: Connection, script: ScriptDirectory) -> None:
    current = MigrationContext.configure(connection).get_current_revision()
    known = {revision.revision for revision in script.walk_revisions()}
    if current is not None and current not in known:
        raise StoreTooNew(
            f"the store's tables are of a later version of Trunkline (revision {current}): nothing goes back"
        )
