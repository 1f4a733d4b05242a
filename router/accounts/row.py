"""One request in the ledger. Written whole each time, so that to write it twice is to write it once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from time import thread_time
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Connection, Dialect, literal_column

from router.accounts.schema import OPEN, requests, texts
from router.accounts.store import insert_into


class Row(msgspec.Struct, array_like=True):
    """A row of the table `requests`, which says what each field means."""

    id: str
    router: str
    account_id: str
    key_id: str
    request_id: str
    path: str
    model: str = ""
    replica: str = ""
    stream: bool = False
    status: int = 0
    """0 until it is known."""
    outcome: str = OPEN
    error: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    price_nano: int = 0
    began_us: int = 0
    first_us: int | None = None
    duration_us: int | None = None
    user_agent: str = ""
    asked: str | None = None
    """Where texts are kept."""
    answered: str | None = None


COLUMNS = tuple(requests.columns.keys())
"""The first fields of a Row, in their order."""

LATER = (
    "model",
    "replica",
    "stream",
    "status",
    "outcome",
    "error",
    "prompt_tokens",
    "completion_tokens",
    "price_nano",
    "first_us",
    "duration_us",
)
"""Columns that are known, or change, after a row was first written. The others stay as they are: an index is
not touched for nothing."""

_astuple = msgspec.structs.astuple


class Statements:
    """What writes rows, as text for the database's own driver: to go through SQLAlchemy for each group would
    take longer than the database does."""

    def __init__(self, dialect: Dialect) -> None:
        # The drivers take the values of a row by their places.
        kind: Any = type(dialect)
        by_place = kind(paramstyle="format" if dialect.name == "postgresql" else "qmark")
        self.rows = str(_upsert_rows(dialect).compile(dialect=by_place))
        self.texts = str(_upsert_texts(dialect).compile(dialect=by_place))


def write(statements: Statements, rows: Sequence[Row], connection: Connection) -> float:
    """Write rows, in a transaction of the driver's own; the seconds of CPU time that it took."""
    began = thread_time()
    driver = connection.connection
    # A cursor that is left open would hold a file's lock for as long as anybody remembers the error.
    with closing(driver.cursor()) as cursor:
        cursor.executemany(statements.rows, [_astuple(row)[: len(COLUMNS)] for row in rows])
        texts_of_rows = [(row.id, row.asked, row.answered or "") for row in rows if row.asked is not None]
        if texts_of_rows:
            cursor.executemany(statements.texts, texts_of_rows)
    driver.commit()
    return thread_time() - began


def values(row: Row) -> dict[str, Any]:
    """The row by its columns."""
    return dict(zip(COLUMNS, _astuple(row), strict=False))


def _upsert_rows(dialect: Dialect) -> Any:
    """A row that has been settled, or given up, is never open again, whatever comes late."""
    insert = insert_into(dialect, requests)
    fresh = insert.excluded
    is_open: ColumnElement[str] = literal_column(f"'{OPEN}'")
    return insert.on_conflict_do_update(
        index_elements=[requests.c.id],
        set_={name: fresh[name] for name in LATER},
        where=(requests.c.outcome == is_open) | (fresh.outcome != is_open),
    )


def _upsert_texts(dialect: Dialect) -> Any:
    insert = insert_into(dialect, texts)
    return insert.on_conflict_do_update(
        index_elements=[texts.c.id],
        set_={"asked": insert.excluded.asked, "answered": insert.excluded.answered},
    )
