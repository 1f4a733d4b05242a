"""Who sends a request: the holder of a key, or somebody who is logged in to the console."""

from __future__ import annotations

import hmac
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from starlette.requests import cookie_parser

from router.accounts.keys import Key, KeyRing, Keys
from router.accounts.people import Account, People
from router.accounts.sessions import COOKIE, Session, Sessions
from router.accounts.store import StoreDown
from router.errors import BadCsrf, InvalidKey, MissingKey, StoreUnavailable
from router.headers import Header, bearer, header

CSRF = b"x-csrf-token"
"""The header in which our pages show that they are ours."""

HARMLESS = {"GET", "HEAD", "OPTIONS"}
"""Methods that change nothing."""


class Caller(NamedTuple):
    """Who sends a request that is not for tokens."""

    account: Account
    key: Key | None
    """None where the console's cookie came."""
    csrf: str | None
    """What the console's pages have to send; None where a key came."""


class Callers:
    """Tells who sends a request. A key wins over a cookie."""

    def __init__(self, people: People, keys: Keys, ring: KeyRing, sessions: Sessions) -> None:
        self._people = people
        self._keys = keys
        self._ring = ring
        self._sessions = sessions

    async def key(self, headers: Sequence[Header]) -> Key:
        """What a request for tokens is counted under. Raises MissingKey, InvalidKey, BadCsrf or
        StoreUnavailable."""
        if header(headers, b"authorization") is not None:
            return await self._ring.seek(bearer(headers))
        session = await self._logged_in(headers, harmless=False)
        with store_needed():
            key = self._ring.console(session.account.id) or await self._keys.console(session.account.id)
        if not key.works:
            raise InvalidKey
        return key

    async def holder(self, headers: Sequence[Header], method: str) -> Key | None:
        """The key of whoever asks about models, which needs no store; None where somebody is logged in.

        Raises the same.
        """
        if header(headers, b"authorization") is not None:
            return await self._ring.seek(bearer(headers))
        await self._logged_in(headers, harmless=method in HARMLESS)
        return None

    async def caller(self, headers: Sequence[Header], method: str) -> Caller:
        """Who sends any other request. Raises the same."""
        if header(headers, b"authorization") is not None:
            key = await self._ring.seek(bearer(headers))
            with store_needed():
                account = await self._people.get(key.account_id)
            if account.disabled:
                raise InvalidKey
            return Caller(account, key, None)
        session = await self._logged_in(headers, harmless=method in HARMLESS)
        return Caller(session.account, None, session.csrf)

    async def session(self, headers: Sequence[Header]) -> Session | None:
        """Who is logged in, if anyone is. Raises StoreUnavailable."""
        cookie = _cookie(headers)
        if cookie is None:
            return None
        with store_needed():
            return await self._sessions.find(cookie)

    async def _logged_in(self, headers: Sequence[Header], *, harmless: bool) -> Session:
        session = await self.session(headers)
        if session is None:
            raise MissingKey
        given = header(headers, CSRF) or b""
        if not harmless and not hmac.compare_digest(given, session.csrf.encode()):
            raise BadCsrf
        return session


@contextmanager
def store_needed() -> Iterator[None]:
    """In the block a store that is down is what the client is told."""
    try:
        yield
    except StoreDown:
        raise StoreUnavailable from None


def _cookie(headers: Sequence[Header]) -> str | None:
    # A proxy may take the header apart; and whatever other cookies a browser has, they hide none of ours.
    given = b"; ".join(value for name, value in headers if name == b"cookie")
    return cookie_parser(given.decode("latin-1")).get(COOKIE)
