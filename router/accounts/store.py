"""The store: one database, in a file or in PostgreSQL. Every error of it is translated here.

It has two doors. People's doings come in through SQLAlchemy's asyncio. The ledger writes from a thread of its
own, on one connection: a group of rows is one hand-over there, where asyncio needs one for each statement.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import URL, Connection, Dialect, Engine, Table, create_engine, event, make_url
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, SQLAlchemyError, StatementError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import NullPool

log = structlog.get_logger(__name__)

CONNECT_S = 2
"""Seconds that a connection to the database may take to be made."""

STATEMENT_S = 10
"""Seconds that a statement may take, waiting for other writers included."""

LEDGER_S = 2
"""The same for the ledger: answers wait for its rows."""

ANSWER_S = STATEMENT_S + 2
"""Seconds that people's transactions may take, whatever the server does: one that hangs ends no statement."""

CONNECTIONS = 8
"""Of one router, beside the ledger's. What waits for one waits CONNECT_S at most."""

DRIVERS = {"sqlite": ("sqlite+aiosqlite", "sqlite"), "postgresql": ("postgresql+psycopg",) * 2}
"""For each kind of store the drivers behind its two doors."""


class StoreDown(Exception):
    """The store cannot be reached, or does not answer."""


class StoreBusy(StoreDown):
    """Somebody else is writing to the file just now."""


class BadStore(Exception):
    """No store can be at that URL, and why."""


class Duplicate(Exception):
    """The store has a row with these values already."""


def now_us() -> int:
    """Microseconds since 1970."""
    return time.time_ns() // 1000


def parse(url: str) -> URL:
    """The parts of a store's URL. Raises BadStore, which tells nothing of a password."""
    try:
        parts = make_url(url)
    except (SQLAlchemyError, ValueError):
        raise BadStore("it is not a URL") from None
    if parts.drivername not in DRIVERS:
        raise BadStore(f"it begins with {parts.drivername}:, and sqlite: or postgresql: is expected")
    if not parts.database or parts.database == ":memory:":
        raise BadStore("it names no database")
    return parts


def insert_into(dialect: Dialect, table: Table) -> Any:
    """An INSERT that can say what becomes of a row which is there already."""
    return (postgresql if dialect.name == "postgresql" else sqlite).insert(table)


class Store:
    """The database at a URL: sqlite:///path or postgresql://user:password@host/database."""

    def __init__(self, url: str) -> None:
        """Connects to nothing yet. Raises BadStore."""
        parts = parse(url)
        self.is_file = parts.drivername == "sqlite"
        self.path = Path(parts.database or "") if self.is_file else None
        """Where a store in a file is."""
        self.is_away: Callable[[], bool] = lambda: False
        """Whether it is known not to answer: then nobody has to wait to be told."""
        for_people, for_ledger = DRIVERS[parts.drivername]
        # It would write down every statement with its values.
        logging.getLogger("aiosqlite").setLevel(logging.INFO)
        self._people = create_async_engine(
            parts.set(drivername=for_people),
            connect_args=self._connect_arguments(STATEMENT_S),
            hide_parameters=True,
            **self._pool(),
        )
        self._ledger = create_engine(
            parts.set(drivername=for_ledger),
            # Whatever thread has the group of rows has the connection, one at a time.
            connect_args={
                **self._connect_arguments(LEDGER_S),
                **({"check_same_thread": False} if self.is_file else {}),
            },
            hide_parameters=True,
            poolclass=NullPool,
        )
        if self.is_file:
            event.listen(self._people.sync_engine, "connect", _prepare_file)
            event.listen(self._ledger, "connect", _prepare_file)

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[AsyncConnection]:
        """A transaction, committed where the block ends well. Raises StoreDown or Duplicate."""
        if self.is_away():
            raise StoreDown
        with translated():
            async with (
                asyncio.timeout(None if self.is_file else ANSWER_S),
                self._people.begin() as connection,
            ):
                yield connection

    def connect_ledger(self) -> Connection:
        """A connection for the ledger's thread, to be closed by it. Raises StoreDown."""
        with translated():
            return self._ledger.connect()

    def connect_at_once(self) -> Connection:
        """A connection to a file that waits neither for another writer, which is a StoreBusy, nor for the
        disk, which others bring up to date. Raises StoreDown."""
        with translated():
            connection = self._ledger.connect()
            connection.exec_driver_sql("PRAGMA busy_timeout = 0")
            connection.exec_driver_sql("PRAGMA wal_autocheckpoint = 0")
            connection.commit()
            return connection

    def tidy(self) -> None:
        """Bring a file up to date with what was committed beside it, which waits for the disk, and hinders
        nobody else. Raises StoreDown."""
        if self.is_file:
            with translated(), self._ledger.connect() as connection:
                connection.exec_driver_sql("PRAGMA wal_checkpoint(PASSIVE)")

    @property
    def dialect(self) -> Dialect:
        """What statements are written in."""
        return self._ledger.dialect

    @property
    def ledger_engine(self) -> Engine:
        """What makes those connections; migrations use it too."""
        return self._ledger

    async def close(self) -> None:
        """Close the connections."""
        await self._people.dispose()
        self._ledger.dispose()

    def _connect_arguments(self, statement_s: int) -> dict[str, Any]:
        if self.is_file:
            return {"timeout": statement_s}
        milliseconds = statement_s * 1000
        return {
            "connect_timeout": CONNECT_S,
            "options": f"-c statement_timeout={milliseconds} -c lock_timeout={milliseconds}",
            # A host that is gone without a word is noticed, whether we have something to say to it or wait.
            "tcp_user_timeout": milliseconds,
            "keepalives_idle": 2,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "application_name": "trunkline",
        }

    def _pool(self) -> dict[str, Any]:
        if self.is_file:
            return {"pool_size": 2, "max_overflow": 0, "pool_timeout": STATEMENT_S}
        return {
            "pool_size": 2,
            "max_overflow": CONNECTIONS - 2,
            "pool_timeout": STATEMENT_S,
            "pool_pre_ping": True,
        }


def _errors(error: type[Exception], name: str) -> tuple[type[Exception], ...]:
    """One of SQLAlchemy's, and the drivers' of that name.

    PostgreSQL's driver is 9 MB, and loaded only where it is used.
    """
    drivers = (sqlite3, sys.modules.get("psycopg"))
    return error, *(getattr(driver, name) for driver in drivers if driver is not None)


@contextmanager
def translated() -> Iterator[None]:
    """Errors of SQLAlchemy, and of the drivers themselves, as ours."""
    try:
        yield
    except _errors(IntegrityError, "IntegrityError"):
        raise Duplicate from None
    except _errors(DataError, "DataError"):
        raise  # a value that fits nowhere is our mistake, and no reason to wait for the store
    except _errors(DBAPIError, "Error") as error:
        # The text of the database, without the statement and its values.
        cause = error.orig if isinstance(error, DBAPIError) else error
        if getattr(cause, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
            raise StoreBusy from None
        log.warning("store failed", error=type(cause).__name__, reason=str(cause)[:200])
        raise StoreDown from None
    except StatementError:
        raise  # as above
    except (SQLAlchemyError, OSError, TimeoutError) as error:
        log.warning("store failed", error=type(error).__name__)
        raise StoreDown from None


def _prepare_file(connection: Any, _: object) -> None:
    """SQLite as a store: readers and the writer do not wait for each other, and what is committed outlives
    every process (of the machine's own death it may lose the last moments)."""
    try:
        cursor = connection.cursor()
        for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()
    except BaseException:
        connection.close()  # nobody else knows of it, and it has a thread
        raise
