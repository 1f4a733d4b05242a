"""Log-ins to the console. A browser has a random text, signed; the store has its hash, and so can end it."""

from __future__ import annotations

import hmac
import secrets
from hashlib import sha256

import msgspec
from itsdangerous import BadData, URLSafeSerializer
from sqlalchemy import delete, insert, select

from router.accounts.people import Account
from router.accounts.schema import accounts, sessions
from router.accounts.store import Store, now_us

COOKIE = "trunkline_session"
"""The cookie's name."""


COOKIES = "cookies"
"""What signs cookies stands in the store under this name."""


class Session(msgspec.Struct, frozen=True):
    """Who is logged in."""

    account: Account
    csrf: str
    """What its pages send along, to show that they are ours."""


class Sessions:
    """The sessions in the store."""

    def __init__(self, store: Store, secret: bytes, hours: int) -> None:
        """`secret` is the same for all routers. A session ends after so many hours."""
        self._store = store
        self._secret = secret
        self._hours = hours
        self._signer = URLSafeSerializer(secret, salt="session")

    async def open(self, account: Account) -> str:
        """Log an account in: the value of its cookie, a new one each time."""
        token = secrets.token_urlsafe(32)
        now = now_us()
        async with self._store.begin() as connection:
            await connection.execute(delete(sessions).where(sessions.c.expires_us < now))
            await connection.execute(
                insert(sessions).values(
                    id=_hash(token),
                    account_id=account.id,
                    created_us=now,
                    expires_us=now + self._hours * 3600 * 1_000_000,
                )
            )
        cookie: str = self._signer.dumps(token)
        return cookie

    async def find(self, cookie: str) -> Session | None:
        """Who is logged in with this cookie, if anyone is."""
        token = self._token(cookie)
        if token is None:
            return None
        query = (
            select(accounts)
            .join(sessions, sessions.c.account_id == accounts.c.id)
            .where(
                sessions.c.id == _hash(token),
                sessions.c.expires_us >= now_us(),
                accounts.c.disabled.is_(False),
            )
        )
        async with self._store.begin() as connection:
            row = (await connection.execute(query)).first()
        if row is None:
            return None
        return Session(Account.of(row), hmac.new(self._secret, b"csrf:" + token.encode(), sha256).hexdigest())

    async def close(self, cookie: str) -> None:
        """Log it out."""
        token = self._token(cookie)
        if token is not None:
            async with self._store.begin() as connection:
                await connection.execute(delete(sessions).where(sessions.c.id == _hash(token)))

    def _token(self, cookie: str) -> str | None:
        """What the cookie was made of; None where it was not made here, to the last character."""
        try:
            token = self._signer.loads(cookie)
        except BadData:
            return None
        # base64 passes over what it does not know, and what its last digit has too much.
        whole = isinstance(token, str) and hmac.compare_digest(
            str(self._signer.dumps(token)).encode(), cookie.encode()
        )
        return token if whole else None


def _hash(token: str) -> str:
    return sha256(token.encode()).hexdigest()
