"""Keys: what clients send to say who they are. The store has no key, only its hash.

A key is 40 random characters, so that a plain hash of it cannot be turned back; its first characters are kept
and shown, for people to tell keys apart and for finding it.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import string
from collections.abc import Sequence
from contextlib import suppress
from enum import Enum
from hashlib import sha256
from typing import Any, Final, Literal

import msgspec
from sqlalchemy import Row, Select, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from router.accounts.limits import KeyLimits
from router.accounts.people import Role, changed, revision
from router.accounts.schema import accounts, keys
from router.accounts.store import Duplicate, Store, StoreDown, now_us
from router.errors import InvalidKey, InvalidRequest, NotFound
from router.ids import new_id

PREFIX: Final = 11
"""Characters of a key by which it is found, and which are shown of it."""

LEAST_KEY: Final = 32
LONGEST_KEY: Final = 200
"""Characters of a key that somebody has chosen."""

MOST_KEYS = 1000
"""Keys of one account that work: every router has them all in memory."""

LOOK_S = 1.0
"""Seconds that a key which is not known may be looked for."""

AT_ONCE = 100
"""Keys that are read in one turn of the loop."""

_ALPHABET = string.ascii_letters + string.digits


class Unset(Enum):
    """Says of an argument that it was not given, where None says something."""

    UNSET = 0


UNSET: Final = Unset.UNSET


class Key(msgspec.Struct, frozen=True):
    """A key as it is kept. Of the console, which has none, it stands for what an account does there."""

    id: str
    account_id: str
    account: str
    """The account's name."""
    role: Role
    name: str
    kind: Literal["api", "console"]
    prefix: str
    digest: bytes
    models: frozenset[str] | None
    """Names in the catalog's case; None: all."""
    limits: KeyLimits
    created_us: int
    revoked_us: int | None
    disabled: bool
    """Whether its account is."""
    account_limits: KeyLimits
    """Of all the account's keys together. A ring's keys of one account have the same object, until its limits
    change."""

    @property
    def works(self) -> bool:
        """Whether requests may be made with it."""
        return self.revoked_us is None and not self.disabled


def make() -> str:
    """A key that nobody has had before."""
    return "tk-" + "".join(secrets.choice(_ALPHABET) for _ in range(40))


def digest(key: str) -> bytes:
    """What is kept of a key."""
    return sha256(key.encode()).digest()


def key_fault(key: str) -> str | None:
    """What is wrong with a key that somebody has chosen, as it goes on after its name."""
    if not (key.isascii() and key.isprintable()) or " " in key:
        return "must be printable ASCII without spaces"
    if not LEAST_KEY <= len(key) <= LONGEST_KEY:
        return f"must have {LEAST_KEY} to {LONGEST_KEY} characters, not {len(key)}"
    return None


class Keys:
    """The keys in the store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def create(
        self,
        account_id: str,
        name: str,
        models: Sequence[str] | None = None,
        limits: KeyLimits | None = None,
        *,
        secret: str | None = None,
    ) -> tuple[Key, str]:
        """A new key, and what its holder sends: to be shown once, here it is forgotten. `secret` is one that
        somebody has chosen. Raises InvalidRequest where the account has as many as it may."""
        secret = secret or make()
        key = await self._insert(new_id(), account_id, name, "api", models, limits or KeyLimits(), secret)
        return key, secret

    async def console(self, account_id: str) -> Key:
        """What an account's requests from the console are counted under; made when it is first needed."""
        identifier = sha256(f"console:{account_id}".encode()).hexdigest()[:32]
        with suppress(NotFound):
            return await self.get(identifier)
        with suppress(Duplicate):
            # Nobody can send it: an empty key is never looked for.
            await self._insert(identifier, account_id, "Console", "console", None, KeyLimits(), "")
        return await self.get(identifier)

    async def list(self, account_id: str | None = None) -> list[Key]:
        """The newest first; of every account where none is given."""
        query = _all().order_by(keys.c.created_us.desc(), keys.c.id)
        if account_id is not None:
            query = query.where(keys.c.account_id == account_id)
        async with self._store.begin() as connection:
            return [_key(row) for row in await connection.execute(query)]

    async def get(self, key_id: str) -> Key:
        """Raises NotFound."""
        async with self._store.begin() as connection:
            found = (await connection.execute(_all().where(keys.c.id == key_id))).first()
        if found is None:
            raise NotFound("key", key_id)
        return _key(found)

    async def change(
        self,
        key_id: str,
        *,
        name: str | Unset = UNSET,
        models: Sequence[str] | Unset | None = UNSET,
        limits: KeyLimits | Unset = UNSET,
    ) -> Key:
        """The key as it is then. Raises NotFound."""
        values: dict[str, Any] = {}
        if not isinstance(name, Unset):
            values["name"] = name
        if not isinstance(models, Unset):
            values["models"] = None if models is None else list(models)
        if not isinstance(limits, Unset):
            values["limits"] = limits.kept()
        if values:
            async with self._store.begin() as connection:
                await connection.execute(update(keys).where(keys.c.id == key_id).values(**values))
                await changed(connection)
        return await self.get(key_id)

    async def revoke(self, key_id: str) -> Key:
        """The key as it is then, which works no more. Idempotent. Raises NotFound."""
        async with self._store.begin() as connection:
            await connection.execute(
                update(keys)
                .where(keys.c.id == key_id, keys.c.revoked_us.is_(None))
                .values(revoked_us=now_us())
            )
            await changed(connection)
        return await self.get(key_id)

    async def _insert(
        self,
        identifier: str,
        account_id: str,
        name: str,
        kind: str,
        models: Sequence[str] | None,
        limits: KeyLimits,
        secret: str,
    ) -> Key:
        async with self._store.begin() as connection:
            # First: whoever makes a key at the same time waits here, and then counts this one.
            await changed(connection)
            if kind == "api":
                await _refuse_more(connection, account_id)
            await connection.execute(
                insert(keys).values(
                    id=identifier,
                    account_id=account_id,
                    name=name,
                    kind=kind,
                    prefix=secret[:PREFIX],
                    digest=digest(secret),
                    models=None if models is None else list(models),
                    limits=limits.kept(),
                    created_us=now_us(),
                    revoked_us=None,
                )
            )
        return await self.get(identifier)


class _Found:
    """The keys that work, as they were read together."""

    def __init__(self) -> None:
        self.all: dict[str, Key] = {}
        """By id. One that has not changed stays the same object."""
        self.by_prefix: dict[str, tuple[Key, ...]] = {}
        """Two keys with one prefix are as good as impossible, unless somebody has chosen them."""
        self.consoles: dict[str, Key] = {}
        """What stands for the console, by account."""
        self.limits: dict[str, KeyLimits] = {}
        """Of accounts, by their ids."""

    def add(self, key: Key, before: _Found) -> None:
        """One more, if it works. What has not changed is what it was before."""
        limits = before.limits.get(key.account_id)
        limits = self.limits.setdefault(
            key.account_id, limits if limits == key.account_limits else key.account_limits
        )
        if not key.works:
            return
        known = before.all.get(key.id)
        key = known if known == key else msgspec.structs.replace(key, account_limits=limits)
        self.all[key.id] = key
        if key.kind == "console":
            self.consoles[key.account_id] = key
        else:
            self.by_prefix[key.prefix] = (*self.by_prefix.get(key.prefix, ()), key)


class KeyRing:
    """The keys that work, in this router's memory: a request waits for no store.

    All of them: a hundred thousand are some 60 MB. `refresh` is to be called again and again; it asks the
    store whether anything has changed, and only then for the keys.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._revision = -1
        self._reading = asyncio.Lock()
        """Held by whoever reads: what was read first must not be put in the place of what was read later."""
        self._looking = asyncio.Lock()
        self._next_look: asyncio.Future[None] | None = None
        """What begins when the look that is under way has ended."""
        self._found = _Found()

    @property
    def loaded(self) -> bool:
        """Whether the keys have been read."""
        return self._revision >= 0

    def find(self, secret: str) -> Key:
        """The key that a client has sent. Raises InvalidKey.

        It takes as long for a wrong key with a right beginning as for any other.
        """
        given = digest(secret)
        match = None
        for key in self._found.by_prefix.get(secret[:PREFIX], _NOBODY):
            if hmac.compare_digest(key.digest, given):
                match = key
        if match is None or not secret:
            raise InvalidKey
        return match

    async def seek(self, secret: str) -> Key:
        """The same. One that is not known here may have been made at another router just now: it is looked
        for in the store. Raises InvalidKey."""
        try:
            return self.find(secret)
        except InvalidKey:
            await self._look()
            return self.find(secret)

    def console(self, account_id: str) -> Key | None:
        """What stands for an account's doings in the console, where that has been read."""
        return self._found.consoles.get(account_id)

    def __contains__(self, key: Key) -> bool:
        """Whether the key is as it was read last."""
        return self._found.all.get(key.id) is key

    def knows(self, key_id: str) -> bool:
        """Whether the key of that id works."""
        return key_id in self._found.all

    async def refresh(self) -> None:
        """Learn of every change. Raises StoreDown."""
        async with self._reading, self._store.begin() as connection:
            current = await revision(connection)
            if current == self._revision:
                return
            found = _Found()
            for number, row in enumerate(await connection.execute(_all())):
                found.add(_key(row), self._found)
                if number % AT_ONCE == AT_ONCE - 1:
                    await asyncio.sleep(0)  # answers go on meanwhile
            self._found, self._revision = found, current

    async def _look(self) -> None:
        """Learn of every change until now, if the store says so soon. Whoever comes while a look is under way
        shares the next one: many wrong keys make few looks."""
        if self._next_look is None:
            self._next_look = asyncio.ensure_future(self._look_next())
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK_S):
                await asyncio.shield(self._next_look)

    async def _look_next(self) -> None:
        async with self._looking:
            self._next_look = None
            with suppress(StoreDown):
                await self.refresh()


def _all() -> Select[Any]:
    of_account = [
        accounts.c.name.label("account"),
        accounts.c.role,
        accounts.c.disabled,
        accounts.c.limits.label("account_limits"),
    ]
    return select(keys, *of_account).join(accounts, accounts.c.id == keys.c.account_id)


async def _refuse_more(connection: AsyncConnection, account_id: str) -> None:
    """Raises InvalidRequest where an account has as many keys as it may."""
    own = (keys.c.account_id == account_id, keys.c.kind == "api", keys.c.revoked_us.is_(None))
    found = await connection.execute(select(func.count()).select_from(keys).where(*own))
    if found.scalar_one() >= MOST_KEYS:
        raise InvalidRequest(f"an account has at most {MOST_KEYS} keys that work: revoke one of them first")


def _key(row: Row[Any]) -> Key:
    fields = dict(row._mapping)  # noqa: SLF001 - SQLAlchemy's public name for it
    fields["models"] = None if fields["models"] is None else frozenset(fields["models"])
    for name in ("limits", "account_limits"):
        fields[name] = KeyLimits.model_validate(fields[name]) if fields[name] else _NO_LIMITS
    return Key(**fields)


_NO_LIMITS = KeyLimits()


_NOBODY = (
    Key(
        id="",
        account_id="",
        account="",
        role="member",
        name="",
        kind="api",
        prefix="",
        digest=sha256(secrets.token_bytes(32)).digest(),
        models=None,
        limits=KeyLimits(),
        created_us=0,
        revoked_us=0,
        disabled=True,
        account_limits=KeyLimits(),
    ),
)
"""Whom a key with an unknown prefix is compared with."""
