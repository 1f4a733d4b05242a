"""Accounts as a configuration has them: what is wrong with them, and what is made of them at a start."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address

from cluster import environment
from cluster.faults import Fault, fault, shown
from router.accounts import bootstrap
from router.accounts.bootstrap import FirstStart
from router.accounts.settings import AccountsSettings, is_redis
from router.accounts.store import BadStore, Store, StoreDown, parse
from router.accounts.upgrade import StoreTooNew
from router.errors import InvalidRequest
from router.settings import Listen


class AccountsUnusable(Exception):
    """The accounts cannot be used, and why, in words for the person who starts them."""


def account_faults(settings: AccountsSettings, listen: Listen, routers: int) -> Iterator[Fault]:
    """What is wrong with the accounts of a configuration."""
    if not settings.enabled:
        if not _is_loopback(listen.host):
            yield fault("accounts.enabled", "open_to_all", host=shown(listen.host))
        return
    placed = environment.placed(settings)
    try:
        in_file = parse(placed.url).drivername == "sqlite"
    except BadStore as error:
        yield fault("accounts.store", "bad_store", reason=error)
        return
    if placed.redis is not None and not is_redis(placed.redis):
        yield fault("accounts.redis", "redis_url")
    if routers > 1 and in_file:
        yield fault("accounts.store", "store_of_one", routers=routers)
    if routers > 1 and placed.redis is None:
        yield fault("accounts.redis", "no_redis", routers=routers)


@contextmanager
def prepared(settings: AccountsSettings) -> Iterator[FirstStart | None]:
    """The store is ready for routers in the block, and where it is a file, nobody else's; what was made in an
    empty one. Raises AccountsUnusable."""
    if not settings.enabled:
        yield None
        return
    store = Store(settings.url)
    try:
        with _alone(store):
            yield asyncio.run(_prepare(store))
    except StoreDown:
        raise AccountsUnusable(
            f"accounts.store: {_where(store)} cannot be reached, or is not a store"
        ) from None
    except StoreTooNew as error:
        raise AccountsUnusable(f"accounts.store: {error}") from None
    except InvalidRequest as error:
        variable = environment.ADMIN_KEY if error.param == "key" else environment.ADMIN_PASSWORD
        raise AccountsUnusable(f"{variable}: {error}") from None


async def _prepare(store: Store) -> FirstStart | None:
    try:
        return await bootstrap.prepare(store, environment.admin_password(), environment.admin_key())
    finally:
        await store.close()


@contextmanager
def _alone(store: Store) -> Iterator[None]:
    """A store in a file is one deployment's at a time: its router keeps limits in memory."""
    if store.path is None:
        yield
        return
    path = store.path.resolve()
    path = path.with_name(f"{path.name}.lock")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise AccountsUnusable(f"accounts.store: {path} cannot be made: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise AccountsUnusable(
            f"accounts.store: another deployment runs on {store.path}; give this one a store of its own"
            " (accounts.store, or TRUNKLINE_DATA)"
        ) from None
    try:
        yield
    finally:
        os.close(file)


def _where(store: Store) -> str:
    return str(store.path) if store.path is not None else "the PostgreSQL server"


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
