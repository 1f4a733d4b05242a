"""Accounts in one router: who calls, what they may, what they use. Everything else asks here."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from time import monotonic

import structlog
from sqlalchemy import select
from starlette.requests import Request as HttpRequest

from router.accounts.callers import Callers, store_needed
from router.accounts.entry import Entry
from router.accounts.keys import Key, KeyRing, Keys
from router.accounts.ledger import Ledger
from router.accounts.limits import UNLIMITED, Claim, bound, scope_of
from router.accounts.living import Router
from router.accounts.memory_meter import MemoryMeter
from router.accounts.meter import Grant, Meter
from router.accounts.people import People
from router.accounts.proxies import client_address
from router.accounts.revision import is_current
from router.accounts.row import Row
from router.accounts.schema import secrets
from router.accounts.sessions import COOKIES, Sessions
from router.accounts.settings import AccountsSettings
from router.accounts.spool import Spool
from router.accounts.store import Store, StoreDown, now_us
from router.accounts.usage import Usage
from router.errors import ModelForbidden, StoreUnavailable
from router.headers import Header, user_agent
from router.ids import new_id
from router.settings import ModelSettings
from serving.messages import Request

log = structlog.get_logger(__name__)

REFRESH_S = 0.5
"""Seconds between two looks whether keys have changed: so long a revoked key may go on elsewhere."""

FORGET_S = 3600.0
"""Seconds between two looks for requests that need not be kept any longer."""

TIDY_S = 1.0
"""Seconds for which what is committed may gather beside a store in a file."""

DAY_US = 86_400_000_000


class Accounts:
    """All of it in one process. `opened` makes it."""

    def __init__(self, settings: AccountsSettings, store: Store, cookies: bytes, name: str) -> None:
        """To be made on a running event loop. `cookies`: what signs them; `name` says for people which router
        it is."""
        identity = new_id()
        self.settings = settings
        self.store = store
        self.people = People(store)
        self.keys = Keys(store)
        self.ring = KeyRing(store)
        self.sessions = Sessions(store, cookies, settings.session_hours)
        self.callers = Callers(self.people, self.keys, self.ring, self.sessions)
        self.usage = Usage(store)
        spool = Spool(settings.spools, identity, settings.spool_bytes)
        self.ledger = Ledger(store, Router(identity, name), spool)
        store.is_away = lambda: self.ledger.down
        self.meter = self._make_meter()
        self._identity = identity
        self._claims: dict[tuple[str, str], tuple[Key, tuple[Claim, ...]]] = {}
        self._says: dict[str, object] = {}
        """What said the limits of each scope, when it was last asked: another object says them once they have
        changed."""
        self._money_since: dict[str, float] = {}
        """When each limit of money was first seen, by `monotonic`."""
        self._stale: set[str] = set()
        """Scopes of which the ledger knows more than the meter."""
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def opened(cls, settings: AccountsSettings, name: str) -> Accounts:
        """Accounts that know every key. Raises StoreDown: nobody could be let in."""
        store = Store(settings.url)
        try:
            if not await asyncio.to_thread(is_current, store):
                # Says what is wrong. A router that starts as it should need not hold 10 MB of library for it.
                from router.accounts import upgrade  # noqa: PLC0415

                await asyncio.to_thread(upgrade.check, store)
            accounts = cls(settings, store, await _cookies(store), name)
            await accounts.ring.refresh()
        except BaseException:
            await store.close()
            raise
        await accounts.ledger.start()
        accounts._tasks = [
            asyncio.create_task(_every(REFRESH_S, accounts.ring.refresh)),
            asyncio.create_task(_every(FORGET_S, accounts.forget)),
            asyncio.create_task(_every(TIDY_S, accounts.tidy)),
        ]
        return accounts

    async def close(self) -> None:
        """Write what is still to be written, and leave the store."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.ledger.close()
        await self.meter.close()
        await self.store.close()

    async def enter(self, headers: Sequence[Header], key: str, request_id: str, path: str) -> Entry:
        caller = await self.callers.key(headers)
        row = Row(
            id=key,
            router=self._identity,
            account_id=caller.account_id,
            key_id=caller.id,
            request_id=request_id,
            path=path,
            began_us=now_us(),
            user_agent=user_agent(headers),
        )
        return Entry(
            self.ledger, self._reserve, self._ended, caller, row, keeps_text=self.settings.record_text
        )

    async def _reserve(
        self,
        key: Key,
        identifier: str,
        model: ModelSettings,
        request: Request,
        body_bytes: int,
        context: int | None,
    ) -> Grant | None:
        """Hold of what limits a key what its request can use at most. Raises ModelForbidden, StoreUnavailable
        or what the meter says."""
        if key.models is not None and model.name not in key.models:
            raise ModelForbidden(request.model)
        if self.ledger.full or (self.ledger.down and self.settings.when_store_is_down == "refuse"):
            raise StoreUnavailable
        claims = await self._claims_of(key, model)
        if not claims:
            return None
        for claim in claims:
            if claim.scope in self._stale:
                self._stale.discard(claim.scope)
                await self.meter.recount(claim.scope)
        with store_needed():  # it may have to be asked what has been spent
            return await self.meter.reserve(
                identifier, claims, bound(request, body_bytes, context, model.price)
            )

    def _ended(self, key: Key, model: str, since: float) -> None:
        """A request has been charged. Under limits of money that are younger than it is it held nothing, and
        what it cost is not counted: the ledger has to be asked again."""
        for scope in _scopes(key, model) if self._money_since else ():
            if self._money_since.get(scope, since) > since:
                self._stale.add(scope)

    def client(self, request: HttpRequest) -> str:
        """The address that a request comes from."""
        peer = request.client.host if request.client is not None else None
        return client_address(peer, request.headers.raw, self.settings.trusted_proxies)

    async def forget(self) -> None:
        """Keep of requests that are older than is asked for only their sums, and nothing of keys that work no
        more."""
        self._claims = {place: known for place, known in self._claims.items() if known[0] in self.ring}
        self._says = {scope: says for scope, says in self._says.items() if not self._is_gone(scope)}
        days = self.settings.keep_days
        if days is not None:
            await self.usage.forget(now_us() - days * DAY_US)

    async def tidy(self) -> None:
        """Leave no more beside a store in a file than has just come."""
        await asyncio.to_thread(self.store.tidy)

    def _make_meter(self) -> Meter:
        redis = self.settings.redis
        spent = self.usage.spent
        if redis is None:
            return MemoryMeter(spent)
        from router.accounts.redis_meter import RedisMeter  # noqa: PLC0415 - 7 MB that others need not hold

        return RedisMeter(redis.get_secret_value(), spent)

    async def _claims_of(self, key: Key, model: ModelSettings) -> tuple[Claim, ...]:
        """What bounds a key's requests for a model. Remembered until the key changes."""
        known = self._claims.get((key.id, model.name))
        if known is not None and known[0] is key:
            return known[1]
        bounds = tuple(_bounds(key, model))
        for claim, says in bounds:
            if self._says.get(claim.scope) is not says:
                await self._learn_limits(claim)
                self._says[claim.scope] = says
        claims = tuple(claim for claim, _ in bounds if claim.limits != UNLIMITED)
        self._claims[key.id, model.name] = (key, claims)
        return claims

    async def _learn_limits(self, claim: Claim) -> None:
        """The limits of a scope are new here, or have changed."""
        if claim.limits.dollars_per_month is None:
            self._money_since.pop(claim.scope, None)
        else:
            self._money_since[claim.scope] = monotonic()
            # What was spent while there was no limit, by whichever key, was not counted.
            await self.meter.recount(claim.scope)

    def _is_gone(self, scope: str) -> bool:
        """Whether nobody can ask for anything under it any more."""
        kind, holder, _ = scope_of(scope)
        return kind == "key" and not self.ring.knows(holder)


def _bounds(key: Key, model: ModelSettings) -> Iterator[tuple[Claim, object]]:
    """What a key's requests for a model fall under, limited or not, each with what says its limits."""
    for scope, says in ((f"key:{key.id}", key.limits), (f"account:{key.account_id}", key.account_limits)):
        yield Claim(scope, says.overall), says
        yield Claim(f"{scope}/{model.name}", says.models.get(model.name, UNLIMITED)), says
    yield Claim(f"model:{model.name}", model.shared_limits), model.shared_limits


def _scopes(key: Key, model: str) -> Iterator[str]:
    """What a key's requests for a model count for."""
    for holder in (f"key:{key.id}", f"account:{key.account_id}"):
        yield holder
        yield f"{holder}/{model}"
    yield f"model:{model}"


async def _cookies(store: Store) -> bytes:
    """What signs cookies, the same for all routers. Raises StoreDown."""
    async with store.begin() as connection:
        found = await connection.execute(select(secrets.c.value).where(secrets.c.name == COOKIES))
        value = found.scalar_one_or_none()
    if value is None:
        raise StoreDown  # it is made before any router starts
    return bytes(value)


async def _every(seconds: float, work: Callable[[], Awaitable[None]]) -> None:
    """Do the work again and again, whatever becomes of it."""
    while True:
        await asyncio.sleep(seconds)
        try:
            await work()
        except StoreDown:
            pass
        except Exception:
            log.exception("work failed", work=work.__qualname__)
