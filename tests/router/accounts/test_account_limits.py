"""The limits of accounts, which no key of theirs evades: at a router that counts in memory, and at one that
counts in Redis."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from pydantic import SecretStr

from router.accounts.accounts import Accounts
from router.accounts.keys import Key
from router.accounts.limits import KeyLimits
from router.accounts.people import Account
from router.accounts.sessions import COOKIE
from router.accounts.settings import Price
from router.accounts.usage import Filter, Span
from tests.harness import Deployment, deployed, echo_engine, request, served
from tests.router.accounts.gated import PASSWORD, accounts_on

DOLLAR_FOR_A_THOUSAND = Price(completion=Decimal(1000))
"""Each generated token costs a thousandth of a dollar."""

Headers = dict[str, str]

pytestmark = pytest.mark.usefixtures("quick_hashes")


class Office:
    """A router, and those who hold its keys."""

    def __init__(self, accounts: Accounts, deployment: Deployment) -> None:
        self.accounts = accounts
        self._deployment = deployment
        self._names = (f"ada-{number}" for number in itertools.count())

    async def account(self, **limits: Any) -> Account:
        """A new one with these limits, over all models or as `models`."""
        return await self.accounts.people.create(next(self._names), "member", PASSWORD, said(limits))

    async def bound(self, account: Account, **limits: Any) -> None:
        """Give it other limits, which this router knows."""
        await self.accounts.people.set_limits(account.id, said(limits))
        await self.accounts.ring.refresh()

    async def key(self, account: Account, **limits: Any) -> Headers:
        """What the holder of a new key sends."""
        return (await self.known_key(account, **limits))[1]

    async def known_key(self, account: Account, **limits: Any) -> tuple[Key, Headers]:
        """The same, and the key."""
        key, secret = await self.accounts.keys.create(account.id, "a key", None, said(limits))
        await self.accounts.ring.refresh()
        return key, {"authorization": f"Bearer {secret}"}

    async def console(self, account: Account) -> Headers:
        """What the console's pages send."""
        cookie = await self.accounts.sessions.open(account)
        session = await self.accounts.sessions.find(cookie)
        assert session is not None
        return {"cookie": f"{COOKIE}={cookie}", "x-csrf-token": session.csrf}

    async def ask(self, who: Headers, model: str = "paid", max_tokens: int = 3) -> httpx.Response:
        """The answer to a request that may generate so many tokens."""
        return await self._deployment.post(request("a b c d e", model=model, max_tokens=max_tokens), **who)

    async def served(self, who: Headers, model: str = "paid", max_tokens: int = 3) -> None:
        """The request has to be let in."""
        response = await self.ask(who, model, max_tokens)
        assert response.status_code == 200, response.text

    async def refused(self, who: Headers, model: str = "paid", max_tokens: int = 3) -> str:
        """Why it is not."""
        response = await self.ask(who, model, max_tokens)
        assert response.status_code == 429, response.text
        return str(response.json()["error"]["message"])

    async def spent(self, account: Account) -> Decimal:
        """Dollars, by the ledger."""
        (total,) = await self.accounts.usage.sums((), Span(), Filter(account_id=account.id))
        return Decimal(total.price_nano).scaleb(-9)


def said(limits: dict[str, Any]) -> KeyLimits:
    """Limits as people say them."""
    models = limits.pop("models", {})
    return KeyLimits.model_validate({"overall": limits, "models": models})


@pytest_asyncio.fixture(params=["memory", "redis"])
async def office(request: pytest.FixtureRequest, sqlite_url: str, tmp_path: Path) -> AsyncIterator[Office]:
    """One with a model that costs something and one that does not."""
    redis = {"redis": SecretStr(request.getfixturevalue("redis_url"))} if request.param == "redis" else {}
    paid = served(echo_engine(), name="paid", price=DOLLAR_FOR_A_THOUSAND)
    async with (
        accounts_on(sqlite_url, tmp_path, **redis) as accounts,
        deployed(paid, served(echo_engine(), name="free"), accounts=accounts) as deployment,
    ):
        yield Office(accounts, deployment)


# ---- all keys together --------------------------------------------------------------------------------


async def test_another_key_evades_nothing(office: Office) -> None:
    """Whichever key of an account a request comes with, a new one or the console's, it counts under the
    account's limits, and no other account's does."""
    ada, grace = await office.account(requests_per_minute=3), await office.account(requests_per_minute=3)
    for who in (await office.key(ada), await office.key(ada), await office.console(ada)):
        await office.served(who)
    for who in (await office.key(ada), await office.console(ada)):
        assert await office.refused(who) == "requests_per_minute: the account's limit of 3 is reached"
    response = await office.ask(await office.key(grace))
    assert response.status_code == 200
    assert response.headers["x-ratelimit-limit-requests"] == "3"
    assert response.headers["x-ratelimit-remaining-requests"] == "2"


async def test_a_keys_own_limits_hold_beside_its_accounts(office: Office) -> None:
    """Whichever of both is reached first refuses, and says whose it is."""
    ada = await office.account(requests_per_minute=2)
    bounded, free = await office.key(ada, requests_per_minute=1), await office.key(ada)
    await office.served(bounded)
    assert await office.refused(bounded) == "requests_per_minute: this key's limit of 1 is reached"
    await office.served(free)
    assert await office.refused(free) == "requests_per_minute: the account's limit of 2 is reached"


async def test_an_account_has_limits_of_single_models(office: Office) -> None:
    """They count its requests for that model alone, by all keys together."""
    ada = await office.account(models={"paid": {"requests_per_minute": 1}})
    one, other = await office.key(ada), await office.key(ada)
    await office.served(one)
    assert await office.refused(other) == ('requests_per_minute: the account\'s "paid" limit of 1 is reached')
    await office.served(other, "free")


async def test_the_money_of_an_account_is_what_all_its_keys_have_spent(office: Office) -> None:
    """Before there was a limit too, by keys that are gone as well, to the last nano-dollar."""
    ada = await office.account()
    key, gone = await office.known_key(ada)
    await office.served(gone)
    await office.accounts.keys.revoke(key.id)
    spent = await office.spent(ada)
    assert spent > 0
    left = Decimal("0.005")
    await office.bound(ada, dollars_per_month=spent + left - Decimal("0.000000001"))
    who = await office.key(ada)
    assert await office.refused(who, max_tokens=5) == (
        f"dollars_per_month: the account's limit of {spent + left - Decimal('0.000000001')} has 0.004999999"
        " left, and this request may cost 0.005"
    )
    await office.bound(ada, dollars_per_month=spent + left)
    await office.served(who, max_tokens=5)


# ---- changes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forgetting", [False, True])
async def test_what_was_spent_without_limits_counts_once_there_are_some(
    office: Office, forgetting: bool
) -> None:
    """Where an account's limits were lifted for a time, all that any of its keys has spent meanwhile counts
    as soon as there are limits again, whichever key is used first."""
    ada = await office.account(dollars_per_month=1)
    first, second = await office.key(ada), await office.key(ada)
    await office.served(first)
    await office.bound(ada)
    for _ in range(3):
        await office.served(second)
    limit = await office.spent(ada) + Decimal("0.002")
    await office.bound(ada, dollars_per_month=limit)
    if forgetting:
        await office.accounts.forget()
    third = await office.key(ada)
    assert "has 0.002 left, and this request may cost 0.003" in await office.refused(third, max_tokens=3)
    await office.served(third, max_tokens=2)


async def test_a_keys_money_counts_likewise(office: Office) -> None:
    """What a key has spent while it had no limits counts once it has some again, also where the router has
    forgotten meanwhile what it need not know."""
    ada = await office.account()
    key, who = await office.known_key(ada, dollars_per_month=1)
    await office.served(who)
    for limits in ({}, {"dollars_per_month": await office.spent(ada) * 2 + Decimal("0.002")}):
        await office.accounts.keys.change(key.id, limits=said(dict(limits)))
        await office.accounts.ring.refresh()
        await office.accounts.forget()
        if not limits:
            await office.served(who)
    assert "has 0.002 left" in await office.refused(who, max_tokens=3)
    await office.served(who, max_tokens=2)


async def test_other_limits_hold_for_the_next_request(office: Office) -> None:
    """Raised, lowered or lifted: what was counted before goes on counting."""
    ada = await office.account(requests_per_minute=1)
    who = await office.key(ada)
    await office.served(who)
    await office.refused(who)
    await office.bound(ada, requests_per_minute=2)
    await office.served(who)
    await office.bound(ada, requests_per_minute=1)
    await office.refused(who)
    await office.bound(ada)
    await office.served(who)


async def test_of_scopes_that_are_gone_nothing_is_remembered(office: Office) -> None:
    """A router that is asked with ever new keys, each of which is revoked, does not grow with them."""
    ada = await office.account(dollars_per_month=1)
    for _ in range(5):
        key, who = await office.known_key(ada, requests_per_minute=5)
        await office.served(who)
        await office.accounts.keys.revoke(key.id)
    await office.served(await office.key(ada))
    await office.accounts.ring.refresh()
    await office.accounts.forget()
    remembered = [scope for scope in office.accounts._says if scope.startswith("key:")]
    assert len(remembered) == 2
    assert len(office.accounts._claims) == 1
