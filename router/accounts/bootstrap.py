"""What has to be done to a store before the first router starts, by whoever starts them."""

from __future__ import annotations

import secrets as random
from typing import NamedTuple

from sqlalchemy import func, select

from router.accounts import keys, upgrade
from router.accounts.keys import Keys
from router.accounts.passwords import make_password
from router.accounts.people import People
from router.accounts.schema import accounts, secrets
from router.accounts.sessions import COOKIES
from router.accounts.store import Store, insert_into
from router.errors import InvalidRequest, Taken

ADMIN = "admin"
"""The name of the first account."""


class FirstStart(NamedTuple):
    """What was made in an empty store, to be shown once."""

    name: str
    password: str
    key: str


async def prepare(store: Store, password: str | None, key: str | None) -> FirstStart | None:
    """Bring the store's tables up to date; in an empty one make the first admin, with a key. What is not
    given is made up. None where there are accounts already.

    Raises StoreDown, upgrade.StoreTooNew, InvalidRequest for a password or a key that cannot be one.
    """
    if key is not None and (fault := keys.key_fault(key)):
        raise InvalidRequest(f"key {fault}", param="key")
    upgrade.upgrade(store)
    await _make_cookie_secret(store)
    async with store.begin() as connection:
        if (await connection.execute(select(func.count()).select_from(accounts))).scalar_one():
            return None
    first = FirstStart(ADMIN, password or make_password(), key or keys.make())
    try:
        account = await People(store).create(first.name, "admin", first.password)
    except Taken:
        return None  # somebody else has just done the same
    await Keys(store).create(account.id, "First key", secret=first.key)
    return first


async def _make_cookie_secret(store: Store) -> None:
    async with store.begin() as connection:
        await connection.execute(
            insert_into(store.dialect, secrets)
            .values(name=COOKIES, value=random.token_bytes(32))
            .on_conflict_do_nothing(index_elements=[secrets.c.name])
        )
