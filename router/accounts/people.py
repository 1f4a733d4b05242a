"""Accounts: people, or teams, who log in to the console and hold keys."""

from __future__ import annotations

import asyncio
import hashlib
import re
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Any, Literal, NamedTuple

import msgspec
from argon2 import PasswordHasher
from argon2.exceptions import VerificationError
from sqlalchemy import Row, delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from router.accounts.limits import KeyLimits
from router.accounts.schema import accounts, failures, revisions, sessions
from router.accounts.store import Duplicate, Store, insert_into, now_us
from router.errors import InvalidRequest, NotFound, Taken, TooManyFailures, WrongPassword, shown
from router.ids import new_id

Role = Literal["admin", "member"]

LEAST_PASSWORD = 12
LONGEST_PASSWORD = 200
"""Characters."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._@+-]{0,63}")

FREE_FAILURES = 5
"""Wrong passwords, from one client or for one account, before the next attempt has to wait: a second, then
twice as long with each. For what others have tried at an account only those wait who have failed themselves:
nobody can lock somebody else out."""

LONGEST_WAIT_S = 300

FORGIVEN_S = 3600
"""Seconds after which failures are forgotten."""

HASHES = 2
"""Passwords that one router hashes at once: each takes 64 MiB, and a core for some 50 ms."""

ACCESS = "access"
"""The row of `revisions` that grows with each change of accounts and keys."""

_hasher = PasswordHasher()
_NOBODYS = _hasher.hash("nobody has this password")


class Account(msgspec.Struct, frozen=True):
    """One account, as it is kept, without its password."""

    id: str
    name: str
    role: Role
    disabled: bool
    created_us: int
    limits: KeyLimits
    """Of all its keys together."""

    @classmethod
    def of(cls, row: Row[Any]) -> Account:
        """What a row of the table `accounts` says."""
        limits = KeyLimits.model_validate(row.limits)
        return cls(row.id, row.name, row.role, row.disabled, row.created_us, limits)


class Attempt(NamedTuple):
    """A log-in that counts as failed until it is known not to be."""

    account: str
    client: str
    """What failures are counted for."""
    at_us: int
    before_us: int
    """When the client's failure before this one was."""


class People:
    """The accounts in the store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._hashing = asyncio.Semaphore(HASHES)

    async def create(self, name: str, role: Role, password: str, limits: KeyLimits | None = None) -> Account:
        """A new account. Raises Taken, or InvalidRequest for a name or a password that cannot be one.

        Names are kept in small letters, and found in any.
        """
        name = name.lower()
        if not _NAME.fullmatch(name):
            raise InvalidRequest(
                "name must be 1 to 64 letters, digits and ._@+-, the first a letter or a digit,"
                f" not {shown(name)}",
                param="name",
            )
        account = Account(new_id(), name, role, False, now_us(), limits or KeyLimits())
        values = msgspec.structs.asdict(account) | {"limits": account.limits.kept()}
        hashed = await self._hash(password)
        try:
            async with self._store.begin() as connection:
                await connection.execute(insert(accounts).values(**values, password=hashed))
                await changed(connection)
        except Duplicate:
            raise Taken("account", name) from None
        return account

    async def everyone(self) -> list[Account]:
        """All accounts, by name."""
        async with self._store.begin() as connection:
            rows = await connection.execute(select(accounts).order_by(accounts.c.name))
            return [Account.of(row) for row in rows]

    async def get(self, account_id: str) -> Account:
        """Raises NotFound."""
        async with self._store.begin() as connection:
            found = (await connection.execute(select(accounts).where(accounts.c.id == account_id))).first()
        if found is None:
            raise NotFound("account", account_id)
        return Account.of(found)

    async def check(self, name: str, password: str, client: str) -> Account:
        """The account with that name and password. Raises WrongPassword, or TooManyFailures where too many
        wrong ones were tried for it, or by this client."""
        name = name.lower()
        if not _NAME.fullmatch(name):
            name = ""  # nobody's, and nothing that the store could trip over
        async with self._store.begin() as connection:
            attempt = await _begin_attempt(connection, name, client)
            found = (await connection.execute(select(accounts).where(accounts.c.name == name))).first()
        # As long for a name that there is not.
        right = await self._matches(found.password if found else _NOBODYS, password)
        if found is None or not right or found.disabled:
            raise WrongPassword
        async with self._store.begin() as connection:
            await _forgive(connection, attempt)
        return Account.of(found)

    async def change_password(self, account: Account, old: str, new: str, client: str) -> None:
        """Change it for someone who knows the old one; every session of the account ends."""
        await self.check(account.name, old, client)
        await self.set_password(account.id, new)

    async def set_password(self, account_id: str, password: str) -> None:
        """Give the account this password; every session of it ends. Raises InvalidRequest or NotFound."""
        await self._update(account_id, ends_sessions=True, password=await self._hash(password))

    async def set_disabled(self, account_id: str, *, disabled: bool) -> Account:
        """A disabled account can do nothing: its sessions end, and its keys do not work."""
        return await self._update(account_id, ends_sessions=disabled, disabled=disabled)

    async def set_role(self, account_id: str, role: Role) -> Account:
        """Raises NotFound."""
        return await self._update(account_id, ends_sessions=False, role=role)

    async def set_limits(self, account_id: str, limits: KeyLimits) -> Account:
        """What all keys of the account may do together. Raises NotFound."""
        return await self._update(account_id, ends_sessions=False, limits=limits.kept())

    async def _update(self, account_id: str, *, ends_sessions: bool, **values: Any) -> Account:
        async with self._store.begin() as connection:
            await connection.execute(update(accounts).where(accounts.c.id == account_id).values(**values))
            if ends_sessions:
                await connection.execute(delete(sessions).where(sessions.c.account_id == account_id))
            await changed(connection)
        return await self.get(account_id)

    async def _hash(self, password: str) -> str:
        if fault := password_fault(password):
            raise InvalidRequest(f"password {fault}", param="password")
        async with self._hashing:
            return await asyncio.to_thread(_hasher.hash, password)

    async def _matches(self, hashed: str, password: str) -> bool:
        async with self._hashing:
            try:
                return await asyncio.to_thread(_hasher.verify, hashed, password[: LONGEST_PASSWORD + 1])
            except VerificationError:
                return False


def password_fault(password: str) -> str | None:
    """What is wrong with a password, as it goes on after its field's name."""
    if LEAST_PASSWORD <= len(password) <= LONGEST_PASSWORD:
        return None
    return f"must have {LEAST_PASSWORD} to {LONGEST_PASSWORD} characters, not {len(password)}"


async def revision(connection: AsyncConnection) -> int:
    """How often accounts and keys have changed."""
    found = await connection.execute(select(revisions.c.value).where(revisions.c.name == ACCESS))
    return int(found.scalar_one_or_none() or 0)


async def changed(connection: AsyncConnection) -> None:
    """Let every router know that accounts or keys have."""
    await connection.execute(
        insert_into(connection.dialect, revisions)
        .values(name=ACCESS, value=1)
        .on_conflict_do_update(index_elements=[revisions.c.name], set_={"value": revisions.c.value + 1})
    )


async def _begin_attempt(connection: AsyncConnection, name: str, client: str) -> Attempt:
    """Count an attempt before its password is looked at: those that come at once shall not pass together.
    Raises TooManyFailures, and then it does not count."""
    now = now_us()
    await connection.execute(delete(failures).where(failures.c.last_us < now - FORGIVEN_S * 1_000_000))
    account, client = _subject("account", name), _subject("client", _network(client))
    # In this order for all, as each holds its row from here on.
    at_account = await _count(connection, account, now)
    by_client = await _count(connection, client, now)
    wait = max(by_client.wait_s(now), at_account.wait_s(now) if by_client.times else 0)
    if wait > 0:
        raise TooManyFailures(wait)
    await connection.execute(
        update(failures).where(failures.c.subject.in_((account, client))).values(last_us=now)
    )
    return Attempt(account, client, now, by_client.last_us)


class _Failures(NamedTuple):
    """Those of one subject before an attempt."""

    times: int
    last_us: int

    def wait_s(self, now: int) -> float:
        if self.times < FREE_FAILURES:
            return 0
        wait: int = min(LONGEST_WAIT_S, 2 ** min(20, self.times - FREE_FAILURES))
        return wait - (now - self.last_us) / 1_000_000


async def _count(connection: AsyncConnection, subject: str, now: int) -> _Failures:
    """Count one more failure; what there was before it."""
    counted = await connection.execute(
        insert_into(connection.dialect, failures)
        .values(subject=subject, times=1, last_us=now)
        .on_conflict_do_update(index_elements=[failures.c.subject], set_={"times": failures.c.times + 1})
        .returning(failures.c.times, failures.c.last_us)
    )
    times, last_us = counted.one()
    return _Failures(times - 1, last_us)


async def _forgive(connection: AsyncConnection, attempt: Attempt) -> None:
    """The attempt was none that failed. What others of this client have tried stays counted."""
    await connection.execute(delete(failures).where(failures.c.subject == attempt.account))
    own = failures.c.subject == attempt.client
    await connection.execute(
        update(failures).where(own, failures.c.last_us == attempt.at_us).values(last_us=attempt.before_us)
    )
    await connection.execute(update(failures).where(own).values(times=failures.c.times - 1))
    await connection.execute(delete(failures).where(own, failures.c.times <= 0))


def _network(client: str) -> str:
    """What stands for a client: of IPv6, where everybody has many addresses, the network."""
    try:
        address = ip_address(client)
    except ValueError:
        return client
    if isinstance(address, IPv6Address):
        return str(ip_network((int(address), 64), strict=False))
    return client


def _subject(kind: str, name: str) -> str:
    """What failures are counted for, in a bounded form."""
    return f"{kind}:{hashlib.sha256(name.encode()).hexdigest()}"
