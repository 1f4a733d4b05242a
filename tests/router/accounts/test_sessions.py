from __future__ import annotations

import asyncio
import string
from hashlib import sha256
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st
from itsdangerous import URLSafeSerializer
from sqlalchemy import select

from router.accounts import sessions as sessions_module
from router.accounts.people import Account, People
from router.accounts.schema import sessions as table
from router.accounts.sessions import Sessions
from router.accounts.store import Store, now_us
from tests.router.accounts.gated import prepare

pytestmark = pytest.mark.usefixtures("quick_hashes")

SECRET = b"the secret of all routers"
HOUR_US = 3600 * 1_000_000


@pytest.fixture
def sessions(store: Store) -> Sessions:
    """Log-ins that end after two hours."""
    return Sessions(store, SECRET, 2)


@pytest_asyncio.fixture
async def ada(store: Store) -> Account:
    """A member."""
    return await People(store).create("ada", "member", "a password of Ada's")


async def kept(store: Store) -> list[str]:
    """What the store has of sessions: their ids."""
    async with store.begin() as connection:
        return list((await connection.execute(select(table.c.id))).scalars())


async def test_every_log_in_is_a_session_of_its_own(sessions: Sessions, ada: Account) -> None:
    """Nobody can know a session before it begins: each has a new cookie, and a new token for its pages."""
    cookies = [await sessions.open(ada) for _ in range(5)]
    found = [await sessions.find(cookie) for cookie in cookies]
    assert len(set(cookies)) == 5
    assert len({session.csrf for session in found if session}) == 5
    assert [session.account for session in found if session] == [ada] * 5


async def test_a_session_is_everywhere_the_same(store: Store, sessions: Sessions, ada: Account) -> None:
    """Every router that has the secret finds the session, with the same token; one that has another secret
    takes its cookie for nothing."""
    cookie = await sessions.open(ada)
    assert await Sessions(store, SECRET, 2).find(cookie) == await sessions.find(cookie)
    assert await Sessions(store, b"another secret", 2).find(cookie) is None


async def test_a_log_out_ends_one_session(sessions: Sessions, ada: Account) -> None:
    """Whoever logs out is logged out here and nowhere else; to do so twice, or with nothing, does nothing."""
    left, stays = await sessions.open(ada), await sessions.open(ada)
    for cookie in (left, left, "", "nonsense"):
        await sessions.close(cookie)
    assert await sessions.find(left) is None
    assert await sessions.find(stays)


async def test_a_session_ends_by_itself(
    store: Store, sessions: Sessions, ada: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its hours a session is none, whatever was done with it meanwhile, and the next log-in clears it
    away."""
    moment = now_us()
    monkeypatch.setattr(sessions_module, "now_us", lambda: moment)
    cookie = await sessions.open(ada)
    moment += 2 * HOUR_US
    assert await sessions.find(cookie)
    moment += 1
    assert await sessions.find(cookie) is None
    assert len(await kept(store)) == 1
    await sessions.open(ada)
    assert len(await kept(store)) == 1


async def test_what_the_store_has_opens_no_session(
    store: Store, sessions: Sessions, ada: Account, said: list[str]
) -> None:
    """Whoever reads the store or a log learns no cookie: there is its hash alone."""
    cookie = await sessions.open(ada)
    said.append(cookie)
    session = await sessions.find(cookie)
    assert session is not None
    said.append(session.csrf)
    (identifier,) = await kept(store)
    token = URLSafeSerializer(SECRET, salt="session").loads(cookie)
    assert identifier == sha256(token.encode()).hexdigest()
    assert identifier not in cookie
    for guess in (identifier, URLSafeSerializer(SECRET, salt="session").dumps(identifier)):
        assert await sessions.find(guess) is None


async def test_a_token_is_its_sessions_alone(sessions: Sessions, ada: Account) -> None:
    """The token of a page says nothing of the cookie, and is no other session's."""
    cookies = [await sessions.open(ada) for _ in range(2)]
    found = [await sessions.find(cookie) for cookie in cookies]
    tokens = [session.csrf for session in found if session]
    assert tokens[0] != tokens[1]
    for cookie, token in zip(cookies, tokens, strict=True):
        assert token not in cookie
        assert cookie not in token
        assert await sessions.find(token) is None


async def test_the_role_is_the_one_that_the_account_has_now(
    store: Store, sessions: Sessions, ada: Account
) -> None:
    """A session says of its account what holds now, not what held when it began."""
    cookie = await sessions.open(ada)
    await People(store).set_role(ada.id, "admin")
    session = await sessions.find(cookie)
    assert session is not None
    assert session.account.role == "admin"


NONSENSE: list[Any] = [None, 1, [], {"a": 1}, "", "x" * 10_000]


async def test_what_is_signed_and_no_session_is_none(sessions: Sessions) -> None:
    """Even with our own signature only what a log-in has made is a session."""
    for nonsense in NONSENSE:
        cookie = URLSafeSerializer(SECRET, salt="session").dumps(nonsense)
        assert await sessions.find(cookie) is None
        await sessions.close(cookie)


async def test_another_signature_of_ours_is_no_session(sessions: Sessions, ada: Account) -> None:
    """What the same secret has signed for another purpose does not pass as a session."""
    token = URLSafeSerializer(SECRET, salt="session").loads(await sessions.open(ada))
    assert await sessions.find(URLSafeSerializer(SECRET, salt="other").dumps(token)) is None
    assert await sessions.find(token) is None


def damaged(cookie: str) -> st.SearchStrategy[str]:
    """Cookies that are almost this one, or nothing like it."""
    places = st.integers(0, len(cookie) - 1)
    letters = st.sampled_from(string.ascii_letters + string.digits + "-_.= \0ä")
    return st.one_of(
        st.tuples(places, letters).map(lambda cut: cookie[: cut[0]] + cut[1] + cookie[cut[0] + 1 :]),
        places.map(lambda at: cookie[:at]),
        st.tuples(places, letters).map(lambda cut: cookie[: cut[0]] + cut[1] + cookie[cut[0] :]),
        places.map(lambda at: cookie[at:]),
        st.text(max_size=100),
    ).filter(lambda one: one != cookie)


def test_a_cookie_is_whole_or_nothing(sqlite_url: str) -> None:
    """Whatever is changed in a cookie, it is no session, and no error."""

    async def prepared() -> tuple[Store, Sessions, str]:
        await prepare(sqlite_url)
        store = Store(sqlite_url)
        account = await People(store).create("ada", "member", "a password of Ada's")
        sessions = Sessions(store, SECRET, 2)
        return store, sessions, await sessions.open(account)

    with asyncio.Runner() as runner:
        store, sessions, cookie = runner.run(prepared())

        @settings(max_examples=300)
        @given(damaged(cookie))
        def finds_nothing(one: str) -> None:
            session = runner.run(sessions.find(one))
            # The last letter of base64 has bits that say nothing.
            assert session is None or one[:-1] == cookie[:-1]

        finds_nothing()
        runner.run(store.close())
