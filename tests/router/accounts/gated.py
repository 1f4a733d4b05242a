"""Routers that know their callers: accounts on a store that a test has, and what stands in its ledger."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from sqlalchemy import select

from router.accounts import bootstrap
from router.accounts.accounts import Accounts
from router.accounts.row import COLUMNS, Row
from router.accounts.schema import OPEN, requests
from router.accounts.settings import AccountsSettings
from router.accounts.store import Store
from tests.waiting import PATIENCE_S, soon

PASSWORD = "correct horse battery"  # noqa: S105 - nobody's
KEY = "tk-" + "Admin0Key0For0Tests0" * 2
"""The first admin's."""


async def prepare(url: str) -> None:
    """Make the tables and the first admin."""
    store = Store(url)
    try:
        assert await bootstrap.prepare(store, PASSWORD, KEY) == (bootstrap.ADMIN, PASSWORD, KEY)
    finally:
        await store.close()


@asynccontextmanager
async def router_accounts(url: str, folder: Path, **settings: Any) -> AsyncIterator[Accounts]:
    """The accounts of one router, on a store that is prepared."""
    placed = AccountsSettings(store=SecretStr(url), folder=folder, **settings)
    accounts = await Accounts.opened(placed, "router-0")
    try:
        yield accounts
    finally:
        await soon(accounts.close())


@asynccontextmanager
async def accounts_on(url: str, folder: Path, **settings: Any) -> AsyncIterator[Accounts]:
    """The accounts of one router, on a store that is prepared here."""
    await prepare(url)
    async with router_accounts(url, folder, **settings) as accounts:
        yield accounts


async def rows(url: str) -> dict[str, Row]:
    """The ledger, by the ids that our clients may read."""
    store = Store(url)
    try:
        async with store.begin() as connection:
            found = await connection.execute(select(*(requests.c[name] for name in COLUMNS)))
            return {row.request_id: Row(**row._mapping) for row in found}
    finally:
        await store.close()


def as_admin(**headers: str) -> dict[str, str]:
    """The headers of a request of the first admin's; `x_request_id` is x-request-id."""
    own = {name.replace("_", "-"): value for name, value in headers.items()}
    return {"authorization": f"Bearer {KEY}", **own}


def die(accounts: Accounts) -> None:
    """What is left of a router after SIGKILL: nothing is written any more, and nobody holds its spool."""
    ledger = accounts.ledger
    for task in ledger._tasks:
        task.cancel()
    ledger.down = True
    if ledger._spool._file is not None:
        os.close(ledger._spool._file)
        ledger._spool._file = None


async def row_of(url: str, name: str, *, settled: bool = True) -> Row:
    """The row of the request with that x-request-id, as soon as it is there, or is settled."""
    deadline = time.monotonic() + PATIENCE_S
    while (row := (await rows(url)).get(name)) is None or (settled and row.outcome == OPEN):
        assert time.monotonic() < deadline, f"no such row: {name}"
        await asyncio.sleep(0.02)
    return row
