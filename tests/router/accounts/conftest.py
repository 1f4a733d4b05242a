from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from argon2 import PasswordHasher

from router.accounts import people
from router.accounts.store import Store
from tests.router.accounts.gated import KEY, PASSWORD, prepare


@pytest.fixture
def quick_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passwords are hashed as ever, with next to no work. To be asked for before `store`."""
    hasher = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
    monkeypatch.setattr(people, "_hasher", hasher)
    monkeypatch.setattr(people, "_NOBODYS", hasher.hash("nobody has this password"))


@pytest_asyncio.fixture
async def store(store_url: str) -> AsyncIterator[Store]:
    """A store of each kind, with its tables and the first admin."""
    await prepare(store_url)
    store = Store(store_url)
    yield store
    await store.close()


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> Iterator[list[str]]:
    """Everything is logged. What is put in here must not have been, nor any longer part of it; the first
    admin's key and password neither."""
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.WARNING, "httpcore")  # our own client, which tells all that it is answered
    secrets = [KEY, PASSWORD]
    yield secrets
    records = map(logging.Formatter().format, caplog.get_records("call"))
    logged = "".join([*records, *capsys.readouterr()])
    assert [secret for secret in secrets if secret in logged or secret[len(secret) // 3 :] in logged] == []
