from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from sqlalchemy import func, select

from router.accounts import people as people_module
from router.accounts.keys import KeyRing, Keys
from router.accounts.passwords import make_password
from router.accounts.people import (
    FORGIVEN_S,
    FREE_FAILURES,
    LONGEST_WAIT_S,
    Account,
    People,
    password_fault,
)
from router.accounts.schema import accounts, failures
from router.accounts.sessions import Sessions
from router.accounts.store import Store, now_us
from router.errors import InvalidKey, InvalidRequest, NotFound, Taken, TooManyFailures, WrongPassword
from tests.router.accounts.gated import PASSWORD

pytestmark = pytest.mark.usefixtures("quick_hashes")

OWN = "a password of Ada's"
HOME = "192.0.2.1"
ELSEWHERE = "192.0.2.2"


class Clock:
    """The time of day, as the test has it."""

    def __init__(self) -> None:
        self.us = now_us()

    def __call__(self) -> int:
        return self.us

    def forward(self, seconds: float) -> None:
        """Let time pass."""
        self.us += int(seconds * 1_000_000)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What log-ins go by."""
    clock = Clock()
    monkeypatch.setattr(people_module, "now_us", clock)
    return clock


@pytest.fixture
def people(store: Store) -> People:
    """The accounts of a store."""
    return People(store)


@pytest_asyncio.fixture
async def ada(people: People) -> AsyncIterator[Account]:
    """A member."""
    yield await people.create("Ada", "member", OWN)


async def fail(people: People, times: int, name: str = "ada", client: str = HOME) -> None:
    """So many wrong passwords, none of which has to wait."""
    for _ in range(times):
        with pytest.raises(WrongPassword):
            await people.check(name, "wrong", client)


async def wait_of(people: People, name: str = "ada", client: str = HOME) -> int:
    """Seconds that an attempt has to wait, be its password right or wrong."""
    waits = []
    for password in (OWN, "wrong"):
        with pytest.raises(TooManyFailures) as refusal:
            await people.check(name, password, client)
        waits.append(int(refusal.value.headers["retry-after"]))
    assert waits[0] == waits[1]
    return waits[0]


# ---- accounts -----------------------------------------------------------------------------------------


async def test_an_account_is_as_it_was_made(people: People, ada: Account) -> None:
    """An account has its name in small letters and its role, and is found by its id and among all."""
    assert (ada.name, ada.role, ada.disabled) == ("ada", "member", False)
    assert await people.get(ada.id) == ada
    assert [one.name for one in await people.everyone()] == ["ada", "admin"]
    assert abs(ada.created_us - now_us()) < 60_000_000


async def test_a_name_is_one_accounts_in_any_case(people: People, ada: Account) -> None:
    """A second account of the same name is refused, also where both are made at once."""
    with pytest.raises(Taken, match="ada"):
        await people.create("ADA", "admin", OWN)
    made = await asyncio.gather(
        *(people.create("grace", "member", OWN) for _ in range(3)), return_exceptions=True
    )
    assert sorted(type(one).__name__ for one in made) == ["Account", "Taken", "Taken"]
    assert len(await people.everyone()) == 3


@pytest.mark.parametrize(
    "name", ["", " ", "a b", "-a", ".a", "ä", "a\0", "a\n", "a" * 65, "a/b", "\N{LATIN SMALL LETTER LONG S}"]
)
async def test_a_name_is_short_and_plain(people: People, name: str) -> None:
    """What could be mistaken for another name, or for more than a name, is none; to log in with it is to have
    a wrong password."""
    with pytest.raises(InvalidRequest, match="name must be 1 to 64") as refusal:
        await people.create(name, "member", OWN)
    assert refusal.value.param == "name"
    with pytest.raises(WrongPassword):
        await people.check(name, OWN, HOME)


async def test_what_is_not_there_is_not_found(people: People) -> None:
    """An id that no account has is refused by everything that takes one."""
    for work in (
        people.get("0" * 32),
        people.set_password("0" * 32, OWN),
        people.set_disabled("0" * 32, disabled=True),
        people.set_role("0" * 32, "admin"),
    ):
        with pytest.raises(NotFound):
            await work


async def test_a_role_can_be_changed(people: People, ada: Account) -> None:
    """A member may become an admin, and an admin a member."""
    assert (await people.set_role(ada.id, "admin")).role == "admin"
    assert (await people.set_role(ada.id, "member")) == ada


# ---- passwords ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 11, 201, 100_000])
async def test_a_password_is_neither_short_nor_endless(people: People, ada: Account, length: int) -> None:
    """A password that can be guessed, or that would keep us busy, is refused in words that do not repeat
    it."""
    password = "x" * length
    for work in (people.create("new", "member", password), people.set_password(ada.id, password)):
        with pytest.raises(InvalidRequest, match=f"12 to 200 characters, not {length}") as refusal:
            await work
        assert not length or password not in str(refusal.value)
        assert refusal.value.param == "password"
    with pytest.raises(WrongPassword):
        await people.check("ada", password, HOME)


def test_what_we_make_up_is_a_password() -> None:
    """A password that nobody has chosen is one that may be chosen, and never the same."""
    made = {make_password() for _ in range(100)}
    assert len(made) == 100
    assert [password_fault(password) for password in made] == [None] * 100


async def test_the_store_has_no_password(store: Store, people: People, ada: Account, said: list[str]) -> None:
    """What is kept of a password is argon2's hash, another one for each account, and no log has any of it."""
    said.append(OWN)
    await people.create("grace", "member", OWN)
    await people.check("grace", OWN, HOME)
    await people.change_password(ada, OWN, "a new password", HOME)
    await people.set_password(ada.id, OWN)
    async with store.begin() as connection:
        query = select(accounts.c.password).where(accounts.c.name.in_(["ada", "grace"]))
        kept = list((await connection.execute(query)).scalars())
    assert len(set(kept)) == 2
    for one in kept:
        assert one.startswith("$argon2id$")
        assert OWN not in one


async def test_the_right_password_tells_who_it_is(people: People, ada: Account) -> None:
    """Whoever has an account's name, in any case, and its password is the account; nobody else is."""
    assert await people.check("ADA", OWN, HOME) == ada
    for name, password in (("ada", PASSWORD), ("admin", OWN), ("nobody", OWN), ("ada", ""), ("", OWN)):
        with pytest.raises(WrongPassword):
            await people.check(name, password, HOME)


async def test_a_name_that_there_is_not_takes_as_long(
    people: People, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How long a refusal takes does not tell whether there is an account of that name."""
    monkeypatch.undo()  # hashes cost what they cost
    await people.create("ada", "member", OWN)

    async def seconds(name: str) -> float:
        began = time.perf_counter()
        with pytest.raises(WrongPassword):
            await people.check(name, "wrong", name)
        return time.perf_counter() - began

    known, unknown = [min([await seconds(name) for _ in range(FREE_FAILURES)]) for name in ("ada", "nobody")]
    assert 0.4 < known / unknown < 2.5


async def test_a_changed_password_is_the_only_one(people: People, store: Store, ada: Account) -> None:
    """To change a password takes the old one, and ends every session of the account, and no other's."""
    sessions = Sessions(store, b"secret", 1)
    admin = await people.check("admin", PASSWORD, HOME)
    own = [await sessions.open(ada) for _ in range(2)]
    others = await sessions.open(admin)
    with pytest.raises(WrongPassword):
        await people.change_password(ada, "wrong", "a new password", HOME)
    assert await sessions.find(own[0])
    with pytest.raises(InvalidRequest):
        await people.change_password(ada, OWN, "short", HOME)
    await people.change_password(ada, OWN, "a new password", HOME)
    assert [await sessions.find(cookie) for cookie in own] == [None, None]
    assert await sessions.find(others)
    assert await people.check("ada", "a new password", HOME) == ada
    with pytest.raises(WrongPassword):
        await people.check("ada", OWN, HOME)


async def test_a_disabled_account_can_do_nothing(people: People, store: Store, ada: Account) -> None:
    """Its password is wrong, its sessions end and its keys do not work, until it is enabled again: then it
    logs in anew, and its keys work as before."""
    sessions, keys, ring = Sessions(store, b"secret", 1), Keys(store), KeyRing(store)
    cookie = await sessions.open(ada)
    _, secret = await keys.create(ada.id, "mine")
    await ring.refresh()
    assert ring.find(secret).account == "ada"
    assert (await people.set_disabled(ada.id, disabled=True)).disabled
    await ring.refresh()
    with pytest.raises(InvalidKey):
        ring.find(secret)
    with pytest.raises(WrongPassword):
        await people.check("ada", OWN, HOME)
    assert await sessions.find(cookie) is None
    # One that was opened in the same moment does not count either.
    late = await sessions.open(ada)
    assert await sessions.find(late) is None
    await people.set_disabled(ada.id, disabled=False)
    await ring.refresh()
    assert ring.find(secret).works
    assert await people.check("ada", OWN, HOME) == ada
    assert await sessions.find(cookie) is None


# ---- guessing -----------------------------------------------------------------------------------------


async def test_whoever_guesses_waits_longer_each_time(people: People, ada: Account, clock: Clock) -> None:
    """After some wrong passwords each attempt has to wait, twice as long as the one before and a few minutes
    at most. An attempt that does not wait counts for nothing, and after the wait the right one is right."""
    await fail(people, FREE_FAILURES)
    waits = []
    for _ in range(11):
        waits.append(await wait_of(people))
        clock.forward(waits[-1] + 0.1)
        await fail(people, 1)
    assert waits == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]
    clock.forward(LONGEST_WAIT_S - 1)
    assert await wait_of(people) == 1
    clock.forward(1.1)
    assert await people.check("ada", OWN, HOME) == ada


async def test_failures_are_forgotten(people: People, store: Store, ada: Account, clock: Clock) -> None:
    """An hour after the last of them nothing is left of failures, in the store either."""
    await fail(people, FREE_FAILURES)
    await wait_of(people)
    clock.forward(FORGIVEN_S + 1)
    assert await people.check("ada", OWN, ELSEWHERE) == ada
    async with store.begin() as connection:
        assert (await connection.execute(select(func.count()).select_from(failures))).scalar_one() == 0
    await fail(people, FREE_FAILURES)


async def test_the_right_password_forgives_the_account(people: People, ada: Account, clock: Clock) -> None:
    """Who logs in begins anew with this account."""
    for _ in range(3):
        await fail(people, FREE_FAILURES - 1, client=HOME)
        assert await people.check("ada", OWN, ELSEWHERE) == ada
        clock.forward(FORGIVEN_S + 1)


async def test_an_account_of_ones_own_is_no_way_to_guess_others(
    people: People, ada: Account, clock: Clock
) -> None:
    """Whoever logs in between is still the client that has failed: its guesses at other accounts count on."""
    for _ in range(FREE_FAILURES):
        assert await people.check("ada", OWN, HOME) == ada
        await fail(people, 1, name="admin")
    assert await wait_of(people, name="admin") == 1
    clock.forward(1.1)
    # That it logs in makes neither its own way nor that to others any longer.
    assert await people.check("ada", OWN, HOME) == ada
    assert await people.check("ada", OWN, HOME) == ada


async def test_guesses_at_once_do_not_pass_together(store_url: str, people: People, ada: Account) -> None:
    """However many guesses come in the same moment, at however many routers: as many are looked at as would
    be one after the other."""
    stores = [Store(store_url) for _ in range(2)]
    routers = [People(each) for each in stores]
    found = await asyncio.gather(
        *(routers[n % 2].check("ada", f"wrong {n}", HOME) for n in range(20)), return_exceptions=True
    )
    assert {type(one) for one in found} == {WrongPassword, TooManyFailures}
    looked_at = [one for one in found if isinstance(one, WrongPassword)]
    # One more for each second that this has taken.
    assert FREE_FAILURES <= len(looked_at) <= FREE_FAILURES + 2
    for each in stores:
        await each.close()


async def test_nobody_can_lock_others_out(people: People, ada: Account, clock: Clock) -> None:
    """However often somebody fails at an account, its owner logs in from elsewhere; who has failed there as
    well waits for what others have tried, though not for ever."""
    await fail(people, FREE_FAILURES)
    for _ in range(12):
        clock.forward(LONGEST_WAIT_S + 1)
        await fail(people, 1)
    assert await people.check("ada", OWN, ELSEWHERE) == ada

    await fail(people, FREE_FAILURES - 1, client="192.0.2.3")
    await fail(people, 1, client=ELSEWHERE)
    assert await wait_of(people, client=ELSEWHERE) == 1
    clock.forward(1.1)
    assert await people.check("ada", OWN, ELSEWHERE) == ada


async def test_many_clients_that_guess_at_one_account_wait_together(
    people: People, ada: Account, clock: Clock
) -> None:
    """Guesses at one account are slowed down also where each comes from somewhere else: whoever has tried
    once waits."""
    clients = [f"198.51.100.{n}" for n in range(20)]
    for client in clients:
        await fail(people, 1, client=client)
    for client in clients:
        assert await wait_of(people, client=client) == LONGEST_WAIT_S


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", True),
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("192.0.2.1", "192.0.2.2", False),
        ("unknown", "unknown", True),
    ],
)
async def test_a_client_has_a_network_of_ipv6(
    people: People, clock: Clock, one: str, other: str, same: bool
) -> None:
    """Where everybody has addresses without number they do not help to guess; neighbours are others."""
    for number in range(FREE_FAILURES):
        await fail(people, 1, name=f"guess-{number}", client=one)
    if same:
        assert await wait_of(people, name="guess", client=other) == 1
    else:
        await fail(people, 1, name="guess", client=other)


async def test_the_old_password_cannot_be_guessed_either(people: People, ada: Account, clock: Clock) -> None:
    """Somebody who found an open console guesses the old password no faster than at the door."""
    for _ in range(FREE_FAILURES):
        with pytest.raises(WrongPassword):
            await people.change_password(ada, "wrong", "a new password", HOME)
    with pytest.raises(TooManyFailures):
        await people.change_password(ada, OWN, "a new password", HOME)


async def test_hashing_leaves_room_for_the_rest(people: People, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many log in at once, few passwords are hashed at the same time: each takes a core and much
    memory."""
    at_once, most = 0, 0
    hasher = people_module._hasher

    class Watched:
        """The hasher, and how many use it."""

        def verify(self, hashed: str, password: str) -> bool:
            nonlocal at_once, most
            at_once += 1
            most = max(most, at_once)
            try:
                return hasher.verify(hashed, password)
            finally:
                at_once -= 1

    monkeypatch.setattr(people_module, "_hasher", Watched())
    found = await asyncio.gather(
        *(people.check("nobody", "wrong", f"192.0.2.{n}") for n in range(12)), return_exceptions=True
    )
    assert {type(one) for one in found} == {WrongPassword}
    assert most <= people_module.HASHES
