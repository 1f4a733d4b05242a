from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from router.accounts.callers import Callers, _cookie
from router.accounts.keys import Key, KeyRing, Keys
from router.accounts.people import Account, People
from router.accounts.sessions import COOKIE, Session, Sessions
from router.accounts.store import Store
from router.errors import ApiError, BadCsrf, InvalidKey, MissingKey, StoreUnavailable
from router.headers import Header, bearer
from tests.router.accounts.gated import KEY, PASSWORD, prepare

pytestmark = pytest.mark.usefixtures("quick_hashes")

BEARER = (b"authorization", f"Bearer {KEY}".encode())


class Door:
    """Those who know callers, and somebody who is logged in."""

    def __init__(self, store: Store) -> None:
        self.people = People(store)
        self.keys = Keys(store)
        self.ring = KeyRing(store)
        self.sessions = Sessions(store, b"secret", 1)
        self.callers = Callers(self.people, self.keys, self.ring, self.sessions)
        self.cookie = ""
        self.csrf = ""
        self.ada: Account | None = None

    async def open(self) -> None:
        """Ada logs in."""
        await self.ring.refresh()
        self.ada = await self.people.create("ada", "member", PASSWORD)
        self.cookie = await self.sessions.open(self.ada)
        session = await self.sessions.find(self.cookie)
        assert session is not None
        self.csrf = session.csrf

    @property
    def logged_in(self) -> list[Header]:
        """What her browser sends with each request."""
        return [(b"cookie", f"{COOKIE}={self.cookie}".encode())]

    @property
    def from_our_page(self) -> list[Header]:
        """What our pages send."""
        return [*self.logged_in, (b"x-csrf-token", self.csrf.encode())]


@pytest_asyncio.fixture
async def door(store: Store) -> Door:
    """One on a store of each kind."""
    door = Door(store)
    await door.open()
    return door


async def refusals(door: Door, headers: Sequence[Header], method: str = "POST") -> list[type[ApiError]]:
    """How a request is refused: one for tokens, and any other."""
    refused = []
    for asked in (door.callers.key(headers), door.callers.caller(headers, method)):
        with pytest.raises(ApiError) as refusal:
            await asked
        refused.append(type(refusal.value))
    return refused


# ---- keys ---------------------------------------------------------------------------------------------


async def test_a_key_says_who_calls(door: Door) -> None:
    """Whoever sends a key is its account, and what it asks for is counted under the key; the name of the
    scheme may be written in any way."""
    for scheme in ("Bearer", "bearer", "BEARER"):
        headers = [(b"authorization", f"{scheme}  {KEY} ".encode())]
        key = await door.callers.key(headers)
        assert (key.account, key.name, key.kind) == ("admin", "First key", "api")
        for method in ("GET", "POST", "DELETE"):
            caller = await door.callers.caller(headers, method)
            assert (caller.account.name, caller.key, caller.csrf) == ("admin", key, None)


async def test_what_is_no_bearer_is_no_key(door: Door) -> None:
    """A header of another scheme, or without a key, is as good as none, also where a cookie came with it: who
    sends it means to be somebody by it."""
    for value in ("", "Bearer", "Bearer ", "Bearer   ", "Basic YWRtaW46cGFzcw==", KEY, f"Token {KEY}"):
        for others in ([], door.from_our_page):
            headers = [(b"authorization", value.encode()), *others]
            assert await refusals(door, headers) == [MissingKey] * 2


async def test_a_wrong_key_is_refused(door: Door) -> None:
    """What is almost a key is none."""
    for sent in (f"{KEY}x", KEY[:-1], "tk-\xff", "x" * 100_000, f"{KEY}, {KEY}"):
        headers = [(b"authorization", f"Bearer {sent}".encode("latin-1"))]
        assert await refusals(door, headers) == [InvalidKey] * 2


async def test_a_key_wins_over_a_cookie(door: Door) -> None:
    """A request that has both is the key's, and needs no token; where the key is wrong the cookie does not
    help."""
    caller = await door.callers.caller([*door.logged_in, BEARER], "POST")
    assert (caller.account.name, caller.csrf) == ("admin", None)
    assert (await door.callers.key([*door.logged_in, BEARER])).account == "admin"
    wrong = (b"authorization", b"Bearer wrong")
    assert await refusals(door, [*door.from_our_page, wrong]) == [InvalidKey] * 2


async def test_a_disabled_account_is_refused_before_routers_know(door: Door) -> None:
    """What is no request for tokens asks the store anyway: there a key ends at once with its account."""
    assert door.ada is not None
    _, secret = await door.keys.create(door.ada.id, "mine")
    await door.ring.refresh()
    await door.people.set_disabled(door.ada.id, disabled=True)
    with pytest.raises(InvalidKey):
        await door.callers.caller([(b"authorization", f"Bearer {secret}".encode())], "GET")


# ---- cookies ------------------------------------------------------------------------------------------


async def test_nobody_is_nobody(door: Door) -> None:
    """Without key and cookie, or with a cookie that is none, a request says nothing of who sends it."""
    for headers in (
        [],
        [(b"cookie", b"")],
        [(b"cookie", b"other=1")],
        [(b"cookie", f"{COOKIE}=".encode())],
        [(b"cookie", f"{COOKIE}=nonsense".encode())],
        [(b"cookie", f"x{COOKIE}={door.cookie}".encode())],
        [(b"cookie", door.cookie.encode())],
        [(b"x-csrf-token", door.csrf.encode())],
    ):
        assert await refusals(door, headers) == [MissingKey] * 2
        assert await refusals(door, headers, "GET") == [MissingKey] * 2
        assert await door.callers.session(headers) is None


async def test_who_is_logged_in_may_look(door: Door) -> None:
    """What changes nothing needs the cookie alone, and its answer may tell the token."""
    for method in ("GET", "HEAD", "OPTIONS"):
        assert await door.callers.caller(door.logged_in, method) == (door.ada, None, door.csrf)


async def test_what_changes_something_has_to_come_from_our_page(door: Door) -> None:
    """A browser sends its cookie along with whatever page made it ask: without the token of this very session
    nothing is changed, and no token of a model is made."""
    assert door.ada is not None
    other = await door.sessions.find(await door.sessions.open(door.ada))
    assert other is not None
    for method in ("POST", "PATCH", "DELETE", "PUT", "PROPFIND", "get", ""):
        assert await refusals(door, door.logged_in, method) == [BadCsrf] * 2
        for token in ("", "nonsense", "\xff", door.csrf[:-1], other.csrf):
            headers = [*door.logged_in, (b"x-csrf-token", token.encode("latin-1"))]
            assert await refusals(door, headers, method) == [BadCsrf] * 2
        assert await door.callers.caller(door.from_our_page, method) == (door.ada, None, door.csrf)


async def test_what_the_console_asks_for_is_counted(door: Door) -> None:
    """A request for tokens from the console is counted under one key of the account's, whether or not this
    router has read it."""
    assert door.ada is not None
    first = await door.callers.key(door.from_our_page)
    assert (first.account_id, first.kind) == (door.ada.id, "console")
    assert await door.callers.key(door.from_our_page) == first
    await door.ring.refresh()
    assert await door.callers.key(door.from_our_page) == first
    await door.keys.revoke(first.id)
    await door.ring.refresh()
    with pytest.raises(InvalidKey):
        await door.callers.key(door.from_our_page)


async def test_who_logged_out_is_nobody(door: Door) -> None:
    """After a log-out the cookie is none."""
    await door.sessions.close(door.cookie)
    assert await refusals(door, door.from_our_page) == [MissingKey] * 2


ODD = [
    json.dumps({"a": [1, "x"]}),
    '"quoted; not really',
    "a,b c",
    "(){}<>@",
    "\xe4\xff",
    "=",
    "",
    "$Version=1",
]
"""What other programs on the same host put into their cookies."""


async def test_other_cookies_hide_none_of_ours(door: Door) -> None:
    """Whatever stands before, behind and between, in one header or in several, the session is found."""
    ours = f"{COOKIE}={door.cookie}"
    for odd in ODD:
        for text in (f"odd={odd}; {ours}", f"{ours}; odd={odd}", f"{odd}; {ours}", f"a=1;{ours};b=2"):
            found = await door.callers.session([(b"cookie", text.encode("latin-1"))])
            assert isinstance(found, Session), text
        apart = [(b"cookie", f"odd={odd}".encode("latin-1")), *door.logged_in, (b"cookie", b"last=1")]
        assert await door.callers.session(apart), odd


headers = st.lists(
    st.tuples(st.sampled_from([b"cookie", b"authorization", b"x-csrf-token"]), st.binary(max_size=60))
    | st.binary(max_size=40).map(lambda value: (b"cookie", COOKIE.encode() + b"=" + value)),
    max_size=5,
)


@given(headers)
def test_any_header_is_read_or_refused(given_headers: list[Header]) -> None:
    """Whatever bytes come, they are a cookie or none, and a key or none."""
    assert isinstance(_cookie(given_headers), str | None)
    with suppress(MissingKey):
        assert bearer(given_headers)


# ---- without the store --------------------------------------------------------------------------------


def put_away(path: Path) -> None:
    """Leave nothing that could be a store."""
    path.unlink()
    path.mkdir()


async def test_without_its_store_a_router_knows_keys_alone(sqlite_url: str, tmp_path: Path) -> None:
    """Keys that have been read are known while the store is away; whoever needs it is told to come back."""
    await prepare(sqlite_url)
    store = Store(sqlite_url)
    door = Door(store)
    await door.open()
    await store.close()
    put_away(tmp_path / "store.sqlite")
    known: Key = await door.callers.key([BEARER])
    assert known.account == "admin"
    for work in (
        door.callers.caller([BEARER], "GET"),
        door.callers.caller(door.logged_in, "GET"),
        door.callers.key(door.from_our_page),
        door.callers.session(door.logged_in),
    ):
        with pytest.raises(StoreUnavailable) as refusal:
            await work
        assert refusal.value.status == 503
    assert await refusals(door, []) == [MissingKey] * 2
    await store.close()
