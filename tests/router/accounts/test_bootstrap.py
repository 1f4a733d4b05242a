from __future__ import annotations

import asyncio
import re

import pytest
from sqlalchemy import select

from router.accounts.bootstrap import ADMIN, FirstStart, prepare
from router.accounts.keys import KeyRing, Keys, make
from router.accounts.people import People
from router.accounts.schema import accounts, secrets
from router.accounts.sessions import COOKIES, Sessions
from router.accounts.store import Store
from router.errors import InvalidRequest
from tests.router.accounts.gated import KEY, PASSWORD

pytestmark = pytest.mark.usefixtures("quick_hashes")


async def cookie_secret(store: Store) -> bytes:
    """What signs cookies."""
    async with store.begin() as connection:
        found = await connection.execute(select(secrets.c.value).where(secrets.c.name == COOKIES))
        return bytes(found.scalar_one())


async def is_first(store: Store, first: FirstStart) -> None:
    """Fails unless account and key are an admin's, and the only ones."""
    people, keys, ring = People(store), Keys(store), KeyRing(store)
    (admin,) = await people.everyone()
    (key,) = await keys.list()
    await ring.refresh()
    assert (admin.name, admin.role, admin.disabled) == (first.name, "admin", False)
    assert await people.check(first.name, first.password, "192.0.2.1") == admin
    assert ring.find(first.key) == key
    assert (key.account, key.role, key.models) == (ADMIN, "admin", None)


async def test_an_empty_store_gets_its_first_admin(store_url: str, said: list[str]) -> None:
    """The first start makes an admin, with a password and a key that nobody has had before; they are told
    once, and no log has them."""
    store = Store(store_url)
    first = await prepare(store, None, None)
    assert first is not None
    said += [first.password, first.key]
    assert first.name == ADMIN
    assert re.fullmatch(r"[A-Za-z0-9]{20}", first.password)
    assert re.fullmatch(r"tk-[A-Za-z0-9]{40}", first.key)
    await is_first(store, first)
    assert len(await cookie_secret(store)) == 32
    await store.close()


async def test_what_is_given_is_used(store_url: str, said: list[str]) -> None:
    """Where password and key are given they are the first admin's; where one of them is, the other is made
    up."""
    store = Store(store_url)
    assert await prepare(store, PASSWORD, KEY) == (ADMIN, PASSWORD, KEY)
    await is_first(store, FirstStart(ADMIN, PASSWORD, KEY))
    await store.close()


async def test_every_later_start_changes_nothing(store_url: str) -> None:
    """A store that has an account keeps what it has, whatever is given: no password is reset, no key made,
    and those who are logged in stay so."""
    store = Store(store_url)
    await prepare(store, PASSWORD, KEY)
    secret = await cookie_secret(store)
    (admin,) = await People(store).everyone()
    cookie = await Sessions(store, secret, 1).open(admin)
    for given in ((None, None), ("another password", make()), (PASSWORD, KEY)):
        assert await prepare(store, *given) is None
    await is_first(store, FirstStart(ADMIN, PASSWORD, KEY))
    assert await Sessions(store, await cookie_secret(store), 1).find(cookie)
    await store.close()


async def test_a_store_without_an_admin_gets_none_by_itself(store_url: str) -> None:
    """First is a start where there is no account at all: a disabled admin does not come back as another."""
    store = Store(store_url)
    await prepare(store, PASSWORD, KEY)
    people = People(store)
    (admin,) = await people.everyone()
    await people.set_disabled(admin.id, disabled=True)
    assert await prepare(store, PASSWORD, KEY) is None
    assert len(await people.everyone()) == 1
    await store.close()


@pytest.mark.parametrize(
    ("password", "key", "words"),
    [
        ("short", None, "password must have 12 to 200 characters, not 5"),
        ("x" * 201, None, "password must have 12 to 200 characters, not 201"),
        (None, "tk-short", "key must have 32 to 200 characters, not 8"),
        (PASSWORD, "key with spaces " * 3, "key must be printable ASCII without spaces"),
        (PASSWORD, "schlüssel" * 5, "key must be printable ASCII without spaces"),
    ],
)
async def test_what_is_given_must_be_fit(
    store_url: str, said: list[str], password: str | None, key: str | None, words: str
) -> None:
    """A given password or key that could be guessed, or never be sent, is refused in words that do not repeat
    it; no account is made, so that the next start with a better one is the first."""
    store = Store(store_url)
    with pytest.raises(InvalidRequest, match=words) as refusal:
        await prepare(store, password, key)
    for given in (password, key):
        assert given is None or given not in str(refusal.value)
    assert refusal.value.param == words.partition(" ")[0]
    assert await prepare(store, PASSWORD, KEY) == (ADMIN, PASSWORD, KEY)
    await store.close()


async def test_of_several_first_starts_one_is_the_first(store_url: str) -> None:
    """Where routers of two deployments find an empty store together one of them makes the admin, and all have
    one secret for cookies."""
    stores = [Store(store_url) for _ in range(3)]
    found = await asyncio.gather(
        *(asyncio.to_thread(asyncio.run, prepare(store, None, None)) for store in stores)
    )
    (first,) = [one for one in found if one is not None]
    store = Store(store_url)
    await is_first(store, first)
    async with store.begin() as connection:
        assert len(list(await connection.execute(select(accounts)))) == 1
        assert len(list(await connection.execute(select(secrets)))) == 1
    for each in (*stores, store):
        await each.close()
