from __future__ import annotations

import asyncio
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, func, select

from router.accounts import keys as module
from router.accounts.keys import (
    LEAST_KEY,
    LONGEST_KEY,
    PREFIX,
    Key,
    KeyRing,
    Keys,
    digest,
    key_fault,
    make,
)
from router.accounts.limits import KeyLimits
from router.accounts.people import Account, People
from router.accounts.schema import keys as table
from router.accounts.settings import Limits
from router.accounts.store import Store
from router.errors import InvalidKey, InvalidRequest, NotFound
from tests.router.accounts.gated import KEY, prepare, router_accounts
from tests.waiting import until

pytestmark = pytest.mark.usefixtures("quick_hashes")

IN_FORCE_S = 2.0
"""Seconds after which every router knows of a change."""

LIMITS = KeyLimits(overall=Limits(requests_per_minute=3), models={"echo": Limits(tokens_per_minute=1000)})


async def ring_of(store: Store) -> KeyRing:
    """A ring that has read all keys."""
    ring = KeyRing(store)
    await ring.refresh()
    return ring


async def admin_of(store: Store) -> Account:
    """The first admin."""
    (admin,) = [one for one in await People(store).everyone() if one.role == "admin"]
    return admin


async def rows_of(store: Store) -> list[Any]:
    """Keys as the store has them."""
    async with store.begin() as connection:
        return list(await connection.execute(select(table)))


# ---- making and finding -------------------------------------------------------------------------------


async def test_a_key_is_found_by_what_its_holder_sends(store: Store) -> None:
    """What was shown when a key was made finds it, with all that was said of it; nothing else does."""
    keys, admin = Keys(store), await admin_of(store)
    key, secret = await keys.create(admin.id, "mine", ["echo", "other"], LIMITS)
    other, others = await keys.create(admin.id, "another")
    ring = await ring_of(store)
    assert ring.find(secret) == key
    assert ring.find(others) == other
    assert (key.name, key.models, key.limits) == ("mine", frozenset({"echo", "other"}), LIMITS)
    assert (other.models, other.limits, other.role, other.account) == (None, KeyLimits(), "admin", "admin")
    for wrong in ("", " ", secret[:-1], secret + "x", secret[:PREFIX], secret.upper(), "tk-", "\xff" * 43):
        with pytest.raises(InvalidKey):
            ring.find(wrong)


async def test_the_store_has_no_key(store: Store, said: list[str]) -> None:
    """Of a key the store has its hash and its beginning alone, and no log has any of it."""
    _, secret = await Keys(store).create((await admin_of(store)).id, "mine")
    said.append(secret)
    (await ring_of(store)).find(secret)
    for row in await rows_of(store):
        assert secret[PREFIX:] not in repr(row)
        assert len(row.digest) == 32
    assert len(secret) > PREFIX + 24


def test_no_key_is_made_twice() -> None:
    """Each key is a new one, and could be sent as it is."""
    made = {make() for _ in range(1000)}
    assert len(made) == 1000
    assert [key_fault(key) for key in made] == [None] * 1000
    assert len({key[:PREFIX] for key in made}) == 1000


async def test_keys_with_one_beginning_are_told_apart(store: Store) -> None:
    """Where somebody has chosen keys that begin alike each finds its own, and a third finds none."""
    keys, admin = Keys(store), await admin_of(store)
    beginning = "chosen-by-a-team-"
    chosen = [f"{beginning}{n}" * 2 for n in range(3)]
    made = [(await keys.create(admin.id, secret, secret=secret))[0] for secret in chosen[:2]]
    assert {key.prefix for key in made} == {beginning[:PREFIX]}
    ring = await ring_of(store)
    assert [ring.find(secret) for secret in chosen[:2]] == made
    with pytest.raises(InvalidKey):
        ring.find(chosen[2])


@pytest.mark.parametrize(
    ("key", "fault"),
    [
        ("x" * (LEAST_KEY - 1), "must have 32 to 200 characters, not 31"),
        ("x" * (LONGEST_KEY + 1), "must have 32 to 200 characters, not 201"),
        ("", "must have 32 to 200 characters, not 0"),
        ("x " * 20, "must be printable ASCII without spaces"),
        ("ä" * 40, "must be printable ASCII without spaces"),
        ("x" * 40 + "\n", "must be printable ASCII without spaces"),
        ("x" * LEAST_KEY, None),
        (KEY, None),
    ],
)
def test_a_chosen_key_must_be_hard_to_guess_and_fit_a_header(key: str, fault: str | None) -> None:
    """A key that is short, or that no client could send as it is, is refused in words that do not repeat
    it."""
    assert key_fault(key) == fault


async def test_a_wrong_key_takes_as_long_whatever_its_beginning(store: Store) -> None:
    """How long a refusal takes does not tell whether there is a key that begins like that, nor how much of
    the rest is right."""
    _, secret = await Keys(store).create((await admin_of(store)).id, "mine")
    ring = await ring_of(store)
    near = secret[:-1] + ("a" if secret[-1] != "a" else "b")
    guesses = {"right beginning": secret[:PREFIX] + "0" * 32, "all but the last": near, "none": "0" * 43}

    def nanoseconds(guess: str) -> int:
        """Of this thread alone: others run meanwhile."""
        began = time.thread_time_ns()
        for _ in range(500):
            with suppress(InvalidKey):
                ring.find(guess)
        return time.thread_time_ns() - began

    taken = dict.fromkeys(guesses, sys.maxsize)
    for _ in range(40):
        for name, guess in guesses.items():
            taken[name] = min(taken[name], nanoseconds(guess))
    assert max(taken.values()) < 1.3 * min(taken.values()), taken


# ---- lists and changes --------------------------------------------------------------------------------


async def test_keys_are_listed_newest_first(store: Store) -> None:
    """An account's keys, or everybody's, the newest first, those that were revoked with them."""
    keys, admin = Keys(store), await admin_of(store)
    ada = await People(store).create("ada", "member", "a password of Ada's")
    made = [(await keys.create(ada.id, f"key {n}"))[0] for n in range(3)]
    await keys.revoke(made[1].id)
    assert [key.name for key in await keys.list(ada.id)] == ["key 2", "key 1", "key 0"]
    assert [key.account for key in await keys.list()] == ["ada", "ada", "ada", "admin"]
    assert [key.name for key in await keys.list(admin.id)] == ["First key"]
    assert await keys.list("0" * 32) == []


async def test_only_what_is_named_changes(store: Store) -> None:
    """A change is of what it names: to take away a key's models is to name them as none."""
    keys = Keys(store)
    key, secret = await keys.create((await admin_of(store)).id, "mine", ["echo"], LIMITS)
    assert await keys.change(key.id) == key
    renamed = await keys.change(key.id, name="yours")
    assert (renamed.name, renamed.models, renamed.limits) == ("yours", frozenset({"echo"}), LIMITS)
    freed = await keys.change(key.id, models=None)
    assert (freed.name, freed.models, freed.limits) == ("yours", None, LIMITS)
    none = await keys.change(key.id, models=[], limits=KeyLimits())
    assert (none.models, none.limits) == (frozenset(), KeyLimits())
    assert (await ring_of(store)).find(secret) == none == await keys.get(key.id)


async def test_what_is_not_there_is_not_found(store: Store) -> None:
    """An id that no key has is refused by everything that takes one."""
    keys = Keys(store)
    for work in (keys.get("0" * 32), keys.change("0" * 32, name="x"), keys.revoke("0" * 32)):
        with pytest.raises(NotFound):
            await work


async def test_to_revoke_twice_is_to_revoke_once(store: Store) -> None:
    """A revoked key stays so, since when it was first revoked."""
    keys = Keys(store)
    key, secret = await keys.create((await admin_of(store)).id, "mine")
    first = await keys.revoke(key.id)
    assert first.revoked_us is not None
    assert not first.works
    assert await keys.revoke(key.id) == first
    with pytest.raises(InvalidKey):
        (await ring_of(store)).find(secret)


# ---- what routers know --------------------------------------------------------------------------------


async def test_a_ring_learns_of_every_change(store: Store) -> None:
    """What was made, changed and revoked, of keys and of accounts, is known after the next look; what has not
    changed stays the very same."""
    keys, people, ring = Keys(store), People(store), await ring_of(store)
    admin = await admin_of(store)
    first = ring.find(KEY)
    key, secret = await keys.create(admin.id, "mine")
    with pytest.raises(InvalidKey):
        ring.find(secret)
    await ring.refresh()
    assert ring.find(secret) == key
    await keys.change(key.id, models=["echo"])
    await ring.refresh()
    changed = ring.find(secret)
    assert changed.models == frozenset({"echo"})
    assert changed in ring
    assert key not in ring
    assert ring.find(KEY) is first
    await people.set_role(admin.id, "member")
    await ring.refresh()
    assert {ring.find(each).role for each in (secret, KEY)} == {"member"}
    await keys.revoke(key.id)
    await ring.refresh()
    with pytest.raises(InvalidKey):
        ring.find(secret)
    assert changed not in ring


async def test_a_ring_learns_of_an_accounts_limits(store: Store) -> None:
    """With each key of the account, as the very same limits; what else changes leaves them as they are."""
    keys, people, ring = Keys(store), People(store), await ring_of(store)
    ada = await people.create("ada", "member", "a password of Ada's", LIMITS)
    (_, one), (changing, other) = [await keys.create(ada.id, f"key {n}") for n in range(2)]
    await ring.refresh()
    limits = ring.find(one).account_limits
    assert limits == LIMITS
    admins = ring.find(KEY)
    await keys.change(changing.id, name="another name")
    await keys.create(ada.id, "a third")
    await people.set_role(ada.id, "admin")
    await ring.refresh()
    assert ring.find(one).account_limits is ring.find(other).account_limits is limits

    fewer = KeyLimits(overall=Limits(requests_per_minute=1))
    assert (await people.set_limits(ada.id, fewer)).limits == fewer
    await ring.refresh()
    assert ring.find(one).account_limits is ring.find(other).account_limits
    assert ring.find(one).account_limits == fewer
    assert ring.find(one).limits == KeyLimits()
    assert ring.find(KEY) is admins
    assert await people.get(ada.id) == await people.check("ada", "a password of Ada's", "here")


async def test_looks_at_once_end_with_the_newest(store: Store) -> None:
    """Whoever has changed something and looked finds it, however many others look at the same time."""
    keys, ring, admin = Keys(store), await ring_of(store), await admin_of(store)
    over = False

    async def others() -> None:
        while not over:
            await ring.refresh()

    looking = [asyncio.create_task(others()) for _ in range(2)]
    for n in range(15):
        key, secret = await keys.create(admin.id, f"key {n}")
        await ring.refresh()
        assert ring.find(secret) == key
        await keys.revoke(key.id)
        await ring.refresh()
        with pytest.raises(InvalidKey):
            ring.find(secret)
    over = True
    await asyncio.gather(*looking)


async def test_a_key_that_is_not_known_is_looked_for(store: Store) -> None:
    """A key that another router has made just now works at once. Wrong ones, however many come together, make
    one look or two."""
    keys, ring, admin = Keys(store), await ring_of(store), await admin_of(store)
    key, secret = await keys.create(admin.id, "mine")
    assert await ring.seek(secret) == key
    looks = 0

    def count(_: object) -> None:
        nonlocal looks
        looks += 1

    event.listen(store._people.sync_engine, "begin", count)
    wrong = await asyncio.gather(*(ring.seek(make()) for _ in range(200)), return_exceptions=True)
    assert {type(error) for error in wrong} == {InvalidKey}
    assert 1 <= looks <= 2
    assert await ring.seek(secret) == key
    assert looks <= 2


async def test_a_key_is_not_looked_for_in_a_store_that_is_away(store: Store) -> None:
    """What is known works, and what is not is refused, at once."""
    ring = await ring_of(store)
    store.is_away = lambda: True
    assert (await ring.seek(KEY)).account == "admin"
    with pytest.raises(InvalidKey):
        await ring.seek(make())


async def test_a_revocation_is_in_force_everywhere_within_two_seconds(store_url: str, tmp_path: Path) -> None:
    """Routers learn by themselves, soon, of a key that was revoked, of one that was made, and of an account
    that was given limits or disabled."""
    await prepare(store_url)
    async with (
        router_accounts(store_url, tmp_path) as one,
        router_accounts(store_url, tmp_path) as other,
    ):
        ada = await one.people.create("ada", "member", "a password of Ada's")
        key, secret = await one.keys.create(ada.id, "mine")
        _, second = await one.keys.create(ada.id, "second")

        def known(sent: str) -> Key | None:
            try:
                return other.ring.find(sent)
            except InvalidKey:
                return None

        await until(lambda: known(secret) and known(second), IN_FORCE_S)
        await one.people.set_limits(ada.id, LIMITS)
        await until(lambda: (key := known(secret)) and key.account_limits == LIMITS, IN_FORCE_S)
        await one.keys.revoke(key.id)
        await until(lambda: not known(secret), IN_FORCE_S)
        assert known(second)
        await one.people.set_disabled(ada.id, disabled=True)
        await until(lambda: not known(second), IN_FORCE_S)
        assert known(KEY)


# ---- the console --------------------------------------------------------------------------------------


async def test_an_account_has_one_key_for_the_console(store: Store) -> None:
    """What stands for the console is made when it is first needed, once, though several need it at once; it
    is nobody's to send."""
    keys, admin = Keys(store), await admin_of(store)
    ring = await ring_of(store)
    assert ring.console(admin.id) is None
    made = await asyncio.gather(*(keys.console(admin.id) for _ in range(4)))
    assert len({key.id for key in made}) == 1
    assert await keys.console(admin.id) == made[0]
    await ring.refresh()
    assert ring.console(admin.id) == made[0]
    assert (made[0].kind, made[0].prefix, made[0].account_id) == ("console", "", admin.id)
    async with store.begin() as connection:
        count = select(func.count()).select_from(table).where(table.c.kind == "console")
        assert (await connection.execute(count)).scalar_one() == 1
    assert made[0].digest == digest("")
    for guess in ("", made[0].id):
        with pytest.raises(InvalidKey):
            ring.find(guess)


async def test_an_account_has_so_many_keys(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that work there are never more, also where several are made at once; what was revoked and the
    console's do not count, nor do other accounts'."""
    monkeypatch.setattr(module, "MOST_KEYS", 5)
    keys, admin = Keys(store), await admin_of(store)
    ada = await People(store).create("ada", "member", "a password of Ada's")
    await keys.console(ada.id)
    for left in (5, 2):
        made = await asyncio.gather(*(keys.create(ada.id, "one") for _ in range(8)), return_exceptions=True)
        refused = [one for one in made if isinstance(one, InvalidRequest)]
        assert len(made) - len(refused) == left
        assert {one.message for one in refused} == {
            "an account has at most 5 keys that work: revoke one of them first"
        }
        for working in (await keys.list(ada.id))[:2]:
            await keys.revoke(working.id)
    await keys.create(admin.id, "another's")


async def test_keys_are_made_at_once(store: Store) -> None:
    """Many may be made in one moment, also the first of all: each is there, and everybody learns of it."""
    keys, ring, admin = Keys(store), await ring_of(store), await admin_of(store)
    made = await asyncio.gather(*(keys.create(admin.id, f"key {n}") for n in range(20)))
    await ring.refresh()
    assert [ring.find(secret) for _, secret in made] == [key for key, _ in made]
