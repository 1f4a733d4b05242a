"""`trunkline keys` and `trunkline accounts`: on the store itself, so that no server has to run and no key is
needed. Running routers learn of every change within two seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import structlog
from pydantic import ValidationError

from cluster import config as configuration
from cluster import environment
from cluster.faults import fault, shown
from cluster.table import table
from router.accounts import answers, upgrade
from router.accounts.bodies import NewKey, read
from router.accounts.keys import PREFIX, UNSET, Key, Keys, Unset
from router.accounts.limits import KeyLimits
from router.accounts.passwords import make_password
from router.accounts.people import Account, People
from router.accounts.settings import AccountsSettings, Limits
from router.accounts.store import BadStore, Store, StoreDown
from router.errors import ApiError

Json = dict[str, Any]

TITLES = ("id", "key", "account", "begins with", "state", "models", "limits")
"""Of a table of keys."""

PEOPLE = ("account", "role", "state", "since", "id", "limits")
"""Of a table of accounts."""

LEAST_GIVEN = 6
"""Characters by which a key is told from others."""

NONE = "none"
"""The value of a limit that does not bound."""


class CommandFailed(Exception):
    """What was asked for cannot be done, and why."""


class Said(NamedTuple):
    """What a command says: to people, and to programs."""

    text: str
    data: Any


class Place(NamedTuple):
    """What commands work on."""

    people: People
    keys: Keys
    models: Mapping[str, str] | None
    """The models of the configuration: by each of their names in small letters, their own. None without a
    configuration."""


def run(options: argparse.Namespace) -> str:
    """Run a command that the command line names as `options.action`; what it prints.

    Raises CommandFailed, and ConfigError where there is a configuration that cannot be used.
    """
    config = configuration.load(options.config) if options.config is not None else None
    settings = environment.placed(config.accounts if config is not None else AccountsSettings())
    models = None if config is None else dict(_names(config))
    with _told_apart():
        said = asyncio.run(_on_store(settings, models, options))
    return json.dumps(said.data, indent=2) if options.json else said.text


async def _on_store(
    settings: AccountsSettings, models: Mapping[str, str] | None, options: argparse.Namespace
) -> Said:
    try:
        store = Store(settings.url)
    except BadStore as error:
        raise CommandFailed(f"accounts.store cannot be used: {error}") from None
    where = store.path or "the PostgreSQL server of the store"
    try:
        await asyncio.to_thread(_look_at, store)
        action = ACTIONS[options.action]
        return await action(Place(People(store), Keys(store), models), options)
    except StoreDown:
        raise CommandFailed(f"{where} cannot be reached, or is not a store") from None
    except upgrade.StoreTooNew as error:
        raise CommandFailed(str(error)) from None
    except ApiError as error:
        raise CommandFailed(error.message) from None
    finally:
        await store.close()


def _look_at(store: Store) -> None:
    """Raises CommandFailed where there is no store yet, and StoreDown where it does not answer."""
    if store.path is not None and not store.path.exists():
        raise CommandFailed(f"there is no store at {store.path} yet: `trunkline serve` makes it")
    store.connect_ledger().close()
    try:
        upgrade.check(store)
    except StoreDown:
        raise CommandFailed(
            "the store has not this version's tables yet: `trunkline serve` makes them"
        ) from None


@contextmanager
def _told_apart() -> Iterator[None]:
    """In the block the log goes where errors go: what is printed is for programs too."""
    before = structlog.get_config()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    try:
        yield
    finally:
        structlog.configure(**before)


def _names(config: configuration.Config) -> Iterator[tuple[str, str]]:
    for model in config.models:
        for name in (model.name, *model.aliases):
            yield name.lower(), model.name


# ---- accounts -----------------------------------------------------------------------------------------


async def _list_accounts(place: Place, _: argparse.Namespace) -> Said:
    everyone = await place.people.everyone()
    return Said(table([PEOPLE, *map(_person, everyone)]), [answers.account(one) for one in everyone])


async def _create_account(place: Place, options: argparse.Namespace) -> Said:
    limits = _limits(place, KeyLimits(), options)
    password, shown = _password(options)
    created = await place.people.create(options.name, options.role, password, limits)
    return _with_password(f"the {created.role} {created.name} has an account", created, shown)


async def _change_account(place: Place, options: argparse.Namespace) -> Said:
    account = await _account(place, options.name)
    limits = _limits(place, KeyLimits() if options.no_limits else account.limits, options)
    changed = await place.people.set_limits(account.id, limits)
    return Said(table([PEOPLE, _person(changed)]), answers.account(changed))


async def _disable(place: Place, options: argparse.Namespace) -> Said:
    account = await place.people.set_disabled((await _account(place, options.name)).id, disabled=True)
    return Said(
        f"{account.name} is disabled: its keys do not work, its log-ins end", answers.account(account)
    )


async def _enable(place: Place, options: argparse.Namespace) -> Said:
    account = await place.people.set_disabled((await _account(place, options.name)).id, disabled=False)
    return Said(f"{account.name} is enabled", answers.account(account))


async def _set_password(place: Place, options: argparse.Namespace) -> Said:
    account = await _account(place, options.name)
    password, shown = _password(options)
    await place.people.set_password(account.id, password)
    return _with_password(f"{account.name} has a new password, and its log-ins end", account, shown)


async def _account(place: Place, name: str) -> Account:
    """The account of that name, in any case."""
    for account in await place.people.everyone():
        if account.name == name.lower():
            return account
    raise CommandFailed(f"there is no account {name!r}; `trunkline accounts list` lists those that there are")


def _password(options: argparse.Namespace) -> tuple[str, str | None]:
    """A password, and the same where it has to be shown, as nobody has chosen it."""
    if options.stdin:
        return sys.stdin.readline().rstrip("\r\n"), None
    made_up = make_password()
    return made_up, made_up


def _with_password(text: str, account: Account, shown: str | None) -> Said:
    data: Json = answers.account(account)
    if shown is None:
        return Said(text, data)
    return Said(
        f"{text}; this is its password, shown this once:\n\n    {shown}\n", data | {"password": shown}
    )


def _person(account: Account) -> tuple[str, ...]:
    state = "disabled" if account.disabled else "enabled"
    since = answers.moment(account.created_us)[:10]
    return account.name, account.role, state, since, account.id, _shown(account.limits)


# ---- keys ---------------------------------------------------------------------------------------------


async def _list_keys(place: Place, options: argparse.Namespace) -> Said:
    account = None if options.account is None else (await _account(place, options.account)).id
    found = await place.keys.list(account)
    return Said(table([TITLES, *map(_row, found)]), [answers.key(key) for key in found])


async def _create_key(place: Place, options: argparse.Namespace) -> Said:
    account = await _account(place, options.account)
    models = None if options.models is None else _models(place, options.models)
    limits = _limits(place, KeyLimits(), options)
    name = read(NewKey, {"name": options.name}).name
    key, secret = await place.keys.create(account.id, name, models, limits)
    text = f"{account.name} has a key more, {key.name!r}; this is it, shown this once:\n\n    {secret}\n"
    return Said(text, answers.key(key) | {"key": secret})


async def _change_key(place: Place, options: argparse.Namespace) -> Said:
    key = await _key(place, options.key)
    name = UNSET if options.name is None else read(NewKey, {"name": options.name}).name
    models: Sequence[str] | Unset | None = UNSET
    if options.all_models or options.models is not None:
        models = None if options.all_models else _models(place, options.models)
    limits = _limits(place, KeyLimits() if options.no_limits else key.limits, options)
    changed = await place.keys.change(key.id, name=name, models=models, limits=limits)
    return Said(table([TITLES, _row(changed)]), answers.key(changed))


async def _revoke_key(place: Place, options: argparse.Namespace) -> Said:
    key = await _key(place, options.key)
    if key.kind == "console":
        raise CommandFailed("this key is the console's own: its account can be disabled, and the key bounded")
    revoked = await place.keys.revoke(key.id)
    return Said(f"{revoked.name!r} of {revoked.account} is revoked", answers.key(revoked))


async def _key(place: Place, given: str) -> Key:
    """The one key whose id, or which itself, begins like this."""
    shown = given[:PREFIX]  # of a key, no more is kept either
    if len(given) < LEAST_GIVEN:
        raise CommandFailed(
            f"{shown!r} is too little of a key or its id: give {LEAST_GIVEN} characters of it"
        )
    everything = await place.keys.list()
    found = [key for key in everything if key.id.startswith(given) or key.prefix.startswith(shown)]
    if not found:
        raise CommandFailed(f"there is no key {shown!r}; `trunkline keys list` lists those that there are")
    if len(found) > 1:
        raise CommandFailed(f"{len(found)} keys begin with {shown!r}: give more of one's id")
    return found[0]


def _row(key: Key) -> tuple[str, ...]:
    state = "works" if key.works else "revoked" if key.revoked_us is not None else "disabled"
    models = "all" if key.models is None else ", ".join(sorted(key.models))
    return key.id, key.name, key.account, key.prefix or "-", state, models, _shown(key.limits)


def _shown(limits: KeyLimits) -> str:
    """Limits as the command line takes them."""
    said = answers.key_limits(limits)
    places = {"": said["overall"], **{f"{name}:": one for name, one in said["models"].items()}}
    shown = [
        f"{where}{what}={value}"
        for where, one in places.items()
        for what, value in one.items()
        if value is not None
    ]
    return " ".join(shown) or NONE


# ---- what the command line says of models and limits --------------------------------------------------


def _models(place: Place, names: str) -> list[str]:
    return list(dict.fromkeys(_model(place, name.strip()) for name in names.split(",")))


def _model(place: Place, name: str) -> str:
    """A model's own name."""
    if place.models is None:
        raise CommandFailed("which models there are says the configuration: give --config with a model")
    found = place.models.get(name.lower())
    if found is None:
        known = ", ".join(dict.fromkeys(place.models.values()))
        raise CommandFailed(f"there is no model {name!r}; there are {known}")
    return found


def _limits(place: Place, before: KeyLimits, options: argparse.Namespace) -> KeyLimits:
    """The limits, changed as the command line says."""
    overall, models = before.overall, dict(before.models)
    for given in options.limit:
        what, _, value = given.rpartition("=")
        model, _, field = what.rpartition(":")
        if model:
            name = _model(place, model)
            models[name] = _limit(models.get(name, Limits()), field, value, given)
        else:
            overall = _limit(overall, field, value, given)
    return KeyLimits(overall=overall, models=models)


def _limit(before: Limits, field: str, value: str, given: str) -> Limits:
    if field not in Limits.model_fields:
        raise CommandFailed(
            f"--limit {given}: expected [MODEL:]WHAT=VALUE, WHAT one of {', '.join(Limits.model_fields)}"
        )
    parsed: Any = None
    if value != NONE:
        parsed = int(value) if value.isascii() and value.isdecimal() and len(value) < 20 else value
    try:
        return Limits.model_validate({**before.model_dump(), field: parsed})
    except ValidationError as error:
        (found,) = error.errors()
        wrong = fault(f"--limit {given}", found["type"], value=shown(parsed), **found.get("ctx", {}))
        raise CommandFailed(f"{wrong.field}: {wrong.text}; {NONE} lifts the limit") from None


Action = Callable[[Place, argparse.Namespace], Awaitable[Said]]

ACTIONS: dict[str, Action] = {
    "accounts list": _list_accounts,
    "accounts create": _create_account,
    "accounts change": _change_account,
    "accounts disable": _disable,
    "accounts enable": _enable,
    "accounts password": _set_password,
    "keys list": _list_keys,
    "keys create": _create_key,
    "keys change": _change_key,
    "keys revoke": _revoke_key,
}
"""By what the command line names."""
