"""The routes at /api, over real sockets and on a store of each kind; every answer is held to the document."""

from __future__ import annotations

import asyncio
import csv
import io
import itertools
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import pytest_asyncio
from fastapi.routing import APIRoute
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import insert

from router.accounts import export, keys, schema, usage
from router.accounts.accounts import Accounts
from router.accounts.api import BODY_BYTES
from router.accounts.export import FORMULA, as_csv, as_json
from router.accounts.openapi import OPERATIONS, operations
from router.accounts.people import Account
from router.accounts.sessions import COOKIE
from router.accounts.store import StoreDown
from router.accounts.usage import DAY_US, Filter, Record, Usage
from router.app import build_api
from router.openapi import document
from tests.harness import Deployment, deployed, echo_engine, request, served
from tests.router.accounts.gated import KEY, PASSWORD, accounts_on
from tests.router.accounts.ledgers import MONDAY, row
from tests.router.contract import Contract
from tests.stores import PostgresCluster, postgres_cluster
from tests.waiting import soon

Json = dict[str, Any]

SOME_ID = "0" * 32
NO_LIMITS = dict.fromkeys(
    ["requests_per_minute", "tokens_per_minute", "dollars_per_month", "concurrent_requests"]
)

pytestmark = pytest.mark.asyncio(loop_scope="module")


class Person:
    """Somebody who asks, with a key or with a browser's cookie."""

    def __init__(self, world: World, account: Account | None, headers: dict[str, str]) -> None:
        self.account = account
        self.headers = headers
        self._world = world

    @property
    def id(self) -> str:
        """Of the account."""
        assert self.account is not None
        return self.account.id

    async def ask(self, method: str, path: str, **said: Any) -> httpx.Response:
        """The answer, which is as the document says."""
        headers = {**self.headers, **said.pop("headers", {})}
        response = await self._world.http.request(method, path, headers=headers, **said)
        self._world.contract.holds(template(path), response)
        return response

    async def get(self, path: str, **parameters: Any) -> Any:
        """What is answered, where it is."""
        response = await self.ask("GET", path, params=parameters)
        assert response.status_code == 200, response.text
        return response.json()

    async def send(self, method: str, path: str, body: Any = None, *, status: int = 200) -> Any:
        """The same for what changes something."""
        response = await self.ask(method, path, **({} if method == "DELETE" else {"json": body}))
        assert response.status_code == status, response.text
        return response.json()

    async def refused(self, method: str, path: str, status: int, **said: Any) -> Json:
        """The error."""
        response = await self.ask(method, path, **said)
        assert response.status_code == status, response.text
        error: Json = response.json()["error"]
        return error

    async def key(self, **fields: Any) -> Json:
        """A new key."""
        created: Json = await self.send("POST", "/api/keys", {"name": "a key", **fields}, status=201)
        return created


def template(path: str) -> str:
    """The path as the document has it."""
    fitting = (known for known in OPERATIONS if re.fullmatch(re.sub(r"{.*?}", "[^/]+", known), path))
    return path if path in OPERATIONS else next(fitting)


class World:
    """A router with accounts, and those who ask it."""

    def __init__(self, accounts: Accounts, deployment: Deployment) -> None:
        self.accounts = accounts
        self.deployment = deployment
        self.http = deployment.http
        models = [model.settings for model in deployment.application.catalog.models]
        self.contract = Contract(document(models, accounts=True))
        self.nobody = Person(self, None, {})
        self._numbers = itertools.count(1)

    async def person(self, role: Any = "member") -> Person:
        """Somebody with an account and a key of their own."""
        name = f"{role}-{next(self._numbers)}"
        account = await self.accounts.people.create(name, role, PASSWORD)
        _, secret = await self.accounts.keys.create(account.id, f"{name}'s")
        await self.accounts.ring.refresh()
        return self.with_key(secret, account)

    def with_key(self, secret: str, account: Account | None = None) -> Person:
        """Whoever has that key."""
        return Person(self, account, {"authorization": f"Bearer {secret}"})

    async def browser(self, account: Account) -> Person:
        """Somebody who has logged in to the console, without the token of its pages."""
        return Person(self, account, {"cookie": f"{COOKIE}={await self.accounts.sessions.open(account)}"})

    async def put(self, *rows: Json, **texts: str) -> list[str]:
        """Write rows into the ledger, under ids that are free; with texts where they are given."""
        placed = [one | {"id": f"{next(self._numbers):032x}"} for one in rows]
        if not placed:
            return []
        async with self.accounts.store.begin() as connection:
            await connection.execute(insert(schema.requests), placed)
            if texts:
                await connection.execute(insert(schema.texts), [{"id": one["id"], **texts} for one in placed])
        return [one["id"] for one in placed]


@asynccontextmanager
async def living(url: str, folder: Path) -> AsyncIterator[World]:
    """A world on an empty store."""
    echo = served(echo_engine(), name="Echo", aliases=("org/Parrot:latest",))
    async with (
        accounts_on(url, folder) as accounts,
        deployed(echo, served(echo_engine(), name="other"), accounts=accounts) as deployment,
    ):
        yield World(accounts, deployment)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An empty store of each kind, for all tests: each has accounts of its own."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path_factory.mktemp('store')}/store.sqlite"
    else:
        postgres: PostgresCluster = request.getfixturevalue("postgres")
        name = postgres.create_database()
        yield postgres.url(name)
        postgres.drop_database(name)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """A world on it."""
    async with living(url, tmp_path_factory.mktemp("data")) as world:
        yield world


@pytest_asyncio.fixture(loop_scope="module")
async def admin(world: World) -> Person:
    """An admin."""
    return await world.person("admin")


@pytest_asyncio.fixture(loop_scope="module")
async def member(world: World) -> Person:
    """A member."""
    return await world.person()


# ---- who may ------------------------------------------------------------------------------------------


async def test_every_route_is_documented(world: World) -> None:
    """The document has each path and method under /api that a router serves, and no other."""

    async def scrape(_: bool) -> bytes:
        return b""

    application = world.deployment.application
    api = build_api(application.catalog, application.completions, scrape, world.accounts)
    served_ones = {
        (re.sub(r"{.*?}", "{}", route.path), method)
        for route in api.routes
        if isinstance(route, APIRoute) and route.path.startswith("/api/")
        for method in route.methods or ()
    }
    documented = {(re.sub(r"{.*?}", "{}", path), method.upper()) for path, method, _ in operations()}
    assert documented == served_ones


async def test_nobody_gets_in_without_showing_who_they_are(world: World) -> None:
    """Without a key, with a wrong one and with a cookie of nobody's, every operation is refused alike."""
    strangers = [
        {},
        {"authorization": "Bearer tk-nobodys"},
        {"authorization": f"Bearer {KEY[:-1]}x"},
        {"authorization": "Basic YTpi"},
        {"cookie": f"{COOKIE}=nobodys"},
    ]
    for path, method, _ in operations():
        for headers in strangers:
            stranger = Person(world, None, headers)
            error = await stranger.refused(method.upper(), path.replace("{id}", SOME_ID), 401, json={})
            assert error["code"] in {"missing_api_key", "invalid_api_key"}


async def test_a_cookie_changes_nothing_by_itself(world: World) -> None:
    """With it alone one may look; what changes something needs the token of our pages too."""
    admin = await world.person("admin")
    browser = await world.browser(admin.account)  # type: ignore[arg-type]
    me = await browser.get("/api/me")
    assert me["account"]["id"] == admin.id
    for path, method, _ in operations():
        if method != "get":
            for token in ({}, {"x-csrf-token": "wrong"}):
                said = {"json": {}, "headers": token}
                error = await browser.refused(method.upper(), path.replace("{id}", SOME_ID), 403, **said)
                assert error["code"] == "bad_csrf_token"
    browser.headers["x-csrf-token"] = me["csrf"]
    assert (await browser.key())["account_id"] == admin.id
    assert "csrf" not in await admin.get("/api/me")


async def test_a_member_does_not_see_what_is_anothers(world: World, admin: Person, member: Person) -> None:
    """Another account's keys, requests and sums are not there for it, by whatever way it asks."""
    other = await world.person()
    key = await other.key()
    (identifier,) = await world.put(row(0, account_id=other.id, key_id=key["id"], model="Echo"))
    await world.put(row(0, account_id=member.id, key_id="mine", model="Echo", price_nano=5))
    for method, path, body in [
        ("PATCH", f"/api/keys/{key['id']}", {"name": "mine now"}),
        ("DELETE", f"/api/keys/{key['id']}", None),
        ("GET", f"/api/requests/{identifier}", None),
        ("POST", "/api/keys", {"name": "x", "account_id": other.id}),
    ]:
        error = await member.refused(method, path, 404, json=body)
        assert error["code"] == "not_found"
    for path in ("/api/requests", "/api/usage", "/api/export"):
        await member.refused("GET", path, 404, params={"account_id": other.id})
    assert {one["account_id"] for one in (await member.get("/api/keys"))["data"]} == {member.id}
    for query in ({}, {"model": "Echo"}, {"account_id": member.id}):
        page = await member.get("/api/requests", **query)
        assert [one["account_id"] for one in page["data"]] == [member.id]
        assert (await member.get("/api/usage", **query))["data"][0]["price"] == "0.000000005"
        assert (await member.get("/api/export", format="json", **query))["data"] == page["data"]
    assert (await member.get("/api/requests", key_id=key["id"]))["data"] == []
    assert (await member.get("/api/usage", key_id=key["id"]))["data"] == [
        {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0, "price": "0"}
    ]
    # An admin sees both, and what of them it asks for.
    assert (await admin.get(f"/api/requests/{identifier}"))["account_id"] == other.id
    assert {one["id"] for one in (await admin.get("/api/requests", account_id=other.id))["data"]} == {
        identifier
    }
    assert key["id"] in {one["id"] for one in (await admin.get("/api/keys"))["data"]}


async def test_a_member_cannot_make_itself_more(member: Person) -> None:
    """Accounts are an admin's to see and change, and so is what a key may do."""
    for method, path in [
        ("GET", "/api/accounts"),
        ("POST", "/api/accounts"),
        ("PATCH", f"/api/accounts/{member.id}"),
    ]:
        error = await member.refused(method, path, 403, json={"role": "admin", "name": "eve"})
        assert error["code"] == "forbidden"
    key = await member.key()
    for field, value in (("limits", {"overall": {}}), ("models", ["Echo"])):
        error = await member.refused("POST", "/api/keys", 403, json={"name": "x", field: value})
        assert error["param"] == field
        changes: list[Any] = [value, None]
        for change in changes:
            error = await member.refused("PATCH", f"/api/keys/{key['id']}", 403, json={field: change})
            assert error["param"] == field


@pytest.mark.parametrize(
    "bounds", [{"models": ["Echo"]}, {"limits": {"overall": {"requests_per_minute": 9}}}]
)
async def test_a_bounded_key_does_not_free_itself(world: World, admin: Person, bounds: Json) -> None:
    """A key that was given out for some models or so many requests looks at what it may see and changes
    nothing, though it is an admin's: it could make itself another one."""
    bounded = world.with_key((await admin.key(**bounds))["key"])
    assert (await bounded.get("/api/me"))["account"]["id"] == admin.id
    for path, method, _ in operations():
        if method != "get":
            await bounded.refused(method.upper(), path.replace("{id}", SOME_ID), 403, json={"name": "x"})


async def test_nobody_on_the_way_keeps_an_answer(admin: Person) -> None:
    """Neither a proxy nor a browser."""
    for path in ("/api/me", "/api/keys", "/api/export"):
        response = await admin.ask("GET", path)
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["x-content-type-options"] == "nosniff"


# ---- accounts -----------------------------------------------------------------------------------------


async def test_an_account_is_created(world: World, admin: Person) -> None:
    """With a password that is made up and shown once, or with one that is given and never shown."""
    made_up = await admin.send("POST", "/api/accounts", {"name": "Grace-1"}, status=201)
    assert (made_up["name"], made_up["role"], made_up["disabled"]) == ("grace-1", "member", False)
    chosen = {"name": "grace-2", "role": "admin", "password": PASSWORD}
    given = await admin.send("POST", "/api/accounts", chosen, status=201)
    assert "password" not in given
    for account, password in ((made_up, made_up["password"]), (given, PASSWORD)):
        assert (await world.accounts.people.check(account["name"], password, "here")).id == account["id"]
    listed = await admin.get("/api/accounts")
    assert [one["name"] for one in listed["data"]] == sorted(one["name"] for one in listed["data"])
    assert {made_up["id"], given["id"]} <= {one["id"] for one in listed["data"]}
    taken = await admin.refused("POST", "/api/accounts", 409, json={"name": "GRACE-1"})
    assert (taken["code"], taken["param"]) == ("taken", "name")


async def test_an_account_is_changed(world: World, admin: Person) -> None:
    """Its role, its password and whether it can do anything, each by itself."""
    other = await world.person()
    path = f"/api/accounts/{other.id}"
    assert (await admin.send("PATCH", path, {"role": "admin"}))["role"] == "admin"
    assert await other.get("/api/accounts")
    assert (await admin.send("PATCH", path, {"role": "member"}))["role"] == "member"
    await other.refused("GET", "/api/accounts", 403)
    assert (await admin.send("PATCH", path, {"disabled": True}))["disabled"] is True
    await other.refused("GET", "/api/me", 401)
    assert (await admin.send("PATCH", path, {"disabled": False}))["disabled"] is False
    assert await other.get("/api/me")
    browser = await world.browser(other.account)  # type: ignore[arg-type]
    await admin.send("PATCH", path, {"password": "another long password"})
    await browser.refused("GET", "/api/me", 401)
    name = (await other.get("/api/me"))["account"]["name"]
    assert await world.accounts.people.check(name, "another long password", "here")
    for unknown in (SOME_ID, "x", "%00"):
        await admin.refused("PATCH", f"/api/accounts/{unknown}", 404, json={"disabled": True})


async def test_there_is_always_an_admin(admin: Person) -> None:
    """None disables itself or gives up being one; everything else of its own it may change."""
    path = f"/api/accounts/{admin.id}"
    for change in ({"disabled": True}, {"role": "member"}):
        assert (await admin.refused("PATCH", path, 400, json=change))["param"] in change
    assert (await admin.send("PATCH", path, {"role": "admin", "disabled": False}))["role"] == "admin"


async def test_an_account_has_limits(world: World, admin: Person) -> None:
    """As a key has, by the names that models have; its holder sees them and does not change them, and nothing
    else that an admin changes touches them."""
    said: Json = {
        "overall": {"requests_per_minute": 60, "dollars_per_month": "0.000000001"},
        "models": {"ORG/parrot:latest": {"concurrent_requests": 2}},
    }
    limits = {
        "overall": NO_LIMITS | said["overall"],
        "models": {"Echo": NO_LIMITS | {"concurrent_requests": 2}},
    }
    created = await admin.send("POST", "/api/accounts", {"name": "limited", "limits": said}, status=201)
    assert created["limits"] == limits
    listed = (await admin.get("/api/accounts"))["data"]
    assert next(one for one in listed if one["id"] == created["id"])["limits"] == limits
    holder = world.with_key((await admin.key(account_id=created["id"]))["key"])
    assert (await holder.get("/api/me"))["account"]["limits"] == limits

    path = f"/api/accounts/{created['id']}"
    await holder.refused("PATCH", path, 403, json={"limits": None})
    for change in ({}, {"disabled": False}, {"role": "member"}, {"password": PASSWORD}):
        assert (await admin.send("PATCH", path, change))["limits"] == limits
    twice = {"disabled": True, "limits": {"models": {"echo": {}, "org/parrot:latest": {}}}}
    assert "more than once" in (await admin.refused("PATCH", path, 400, json=twice))["message"]
    assert (await holder.get("/api/me"))["account"]["limits"] == limits, "nothing has changed"
    fewer = {"overall": {"tokens_per_minute": 5}}
    expected = {"overall": NO_LIMITS | {"tokens_per_minute": 5}, "models": {}}
    assert (await admin.send("PATCH", path, {"limits": fewer}))["limits"] == expected
    unlimited = {"overall": NO_LIMITS, "models": {}}
    assert (await admin.send("PATCH", path, {"limits": None}))["limits"] == unlimited
    assert (await admin.send("POST", "/api/accounts", {"name": "free"}, status=201))["limits"] == unlimited


async def test_ones_own_password_is_changed_with_the_old_one(world: World) -> None:
    """Whoever knows it; every log-in ends; and whoever tries passwords has to wait."""
    member = await world.person()
    path, new = "/api/me/password", "another long password"
    browser = await world.browser(member.account)  # type: ignore[arg-type]
    wrong = {"old": "a wrong password", "new": new}
    assert (await member.refused("POST", path, 401, json=wrong))["code"] == "wrong_password"
    changed = await member.send("POST", path, {"old": PASSWORD, "new": new})
    assert changed["account"]["id"] == member.id
    await browser.refused("GET", "/api/me", 401)
    assert member.account is not None
    assert await world.accounts.people.check(member.account.name, new, "here")
    for _ in range(12):  # the first waits are over soon, where a password takes long
        response = await member.ask("POST", path, json=wrong)
        if response.status_code != 401:
            break
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1


# ---- keys ---------------------------------------------------------------------------------------------


async def test_a_key_is_shown_once_and_works_at_once(world: World, admin: Person) -> None:
    """Until it is revoked, from when on it works no more; to revoke it again changes nothing."""
    created = await admin.key(name="nightly jobs")
    holder = world.with_key(created["key"])
    assert (await holder.get("/api/me"))["account"]["id"] == admin.id
    listed = (await admin.get("/api/keys"))["data"]
    shown = {name: value for name, value in created.items() if name != "key"}
    assert next(one for one in listed if one["id"] == created["id"]) == shown
    assert created["key"].startswith(created["prefix"])
    assert created["key"] not in json.dumps(listed)
    assert shown["models"] is None
    assert shown["limits"] == {"overall": NO_LIMITS, "models": {}}
    revoked = await admin.send("DELETE", f"/api/keys/{created['id']}")
    assert revoked["revoked"] >= created["created"]
    assert (await holder.refused("GET", "/api/me", 401))["code"] == "invalid_api_key"
    assert await admin.send("DELETE", f"/api/keys/{created['id']}") == revoked


async def test_a_key_is_made_for_another(world: World, admin: Person, member: Person) -> None:
    """By an admin."""
    created = await admin.key(account_id=member.id, models=["Echo"])
    assert created["account_id"] == member.id
    assert (await world.with_key(created["key"]).get("/api/me"))["account"]["id"] == member.id
    for nobody in (SOME_ID, "x"):
        said = {"name": "x", "account_id": nobody}
        assert (await admin.refused("POST", "/api/keys", 404, json=said))["code"] == "not_found"


async def test_models_are_kept_as_the_catalog_calls_them(admin: Person) -> None:
    """In whatever case, by whichever name they are said; one that is not there is refused by its name."""
    said = ["ECHO", "org/parrot:LATEST", "other", "Other"]
    limits = {
        "models": {"ORG/Parrot:latest": {"tokens_per_minute": 5}, "OTHER": {"dollars_per_month": "1.25"}}
    }
    created = await admin.key(models=said, limits=limits)
    assert created["models"] == ["Echo", "other"]
    assert created["limits"] == {
        "overall": NO_LIMITS,
        "models": {
            "Echo": NO_LIMITS | {"tokens_per_minute": 5},
            "other": NO_LIMITS | {"dollars_per_month": "1.25"},
        },
    }
    for unknown, param in (
        ({"models": ["Echo", "gpt-9"]}, "models[1]"),
        ({"limits": {"models": {"gpt-9": {}}}}, "limits.models.gpt-9"),
    ):
        error = await admin.refused("POST", "/api/keys", 400, json={"name": "x", **unknown})
        assert error["param"] == param
        assert '"gpt-9"' in error["message"]
    twice: Json = {"name": "x", "limits": {"models": {"echo": {}, "org/parrot:latest": {}}}}
    error = await admin.refused("POST", "/api/keys", 400, json=twice)
    assert "more than once" in error["message"]


async def test_a_change_changes_what_it_names(admin: Person, member: Person) -> None:
    """And null takes a bound away."""
    limits = {"overall": {"requests_per_minute": 60, "dollars_per_month": "25.50"}}
    created = await admin.key(models=["Echo"], limits=limits)
    path = f"/api/keys/{created['id']}"
    expected = {name: value for name, value in created.items() if name != "key"}
    assert expected["limits"]["overall"]["dollars_per_month"] == "25.5"
    assert await admin.send("PATCH", path, {}) == expected
    expected["name"] = "other jobs"
    assert await admin.send("PATCH", path, {"name": "other jobs"}) == expected
    expected["models"] = None
    assert await admin.send("PATCH", path, {"models": None}) == expected
    expected["limits"] = {"overall": NO_LIMITS | {"concurrent_requests": 3}, "models": {}}
    changed = await admin.send("PATCH", path, {"limits": {"overall": {"concurrent_requests": 3}}})
    assert changed == expected
    expected["limits"] = {"overall": NO_LIMITS, "models": {}}
    assert await admin.send("PATCH", path, {"limits": None}) == expected
    own = await member.key()
    assert (await member.send("PATCH", f"/api/keys/{own['id']}", {"name": "renamed"}))["name"] == "renamed"


async def test_what_bounds_a_key_holds_for_its_requests(world: World, admin: Person) -> None:
    """What a key was bounded to here is refused where tokens are asked for, at once."""
    created = await admin.key(models=["other"])
    holder = world.with_key(created["key"])
    for model, status in (("other", 200), ("org/Parrot:latest", 403)):
        response = await world.http.post(
            "/v1/chat/completions", json=request("a", model=model), headers=holder.headers
        )
        assert response.status_code == status
        world.contract.holds("/v1/chat/completions", response)


async def test_another_key_does_not_evade_an_accounts_limits(
    world: World, admin: Person, member: Person
) -> None:
    """They hold at once, over every key that there is and that a member makes."""
    for change, status in (({"overall": {"requests_per_minute": 1}}, 429), (None, 200)):
        await admin.send("PATCH", f"/api/accounts/{member.id}", {"limits": change})
        for known, expected in ((member, 200), (world.with_key((await member.key())["key"]), status)):
            response = await world.http.post(
                "/v1/chat/completions", json=request("a", model="Echo"), headers=known.headers
            )
            assert response.status_code == expected
            world.contract.holds("/v1/chat/completions", response)


async def test_an_account_has_so_many_keys(
    member: Person, admin: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no more, whoever makes them, until one of them is revoked."""
    monkeypatch.setattr(keys, "MOST_KEYS", 2)
    second = await member.key()
    for person, said in ((member, {"name": "x"}), (admin, {"name": "x", "account_id": member.id})):
        error = await person.refused("POST", "/api/keys", 400, json=said)
        assert error["message"] == "an account has at most 2 keys that work: revoke one of them first"
    await member.send("DELETE", f"/api/keys/{second['id']}")
    await member.key()


async def test_the_consoles_key_stays(world: World, admin: Person, member: Person) -> None:
    """It stands for what an account does there: an admin may bound it, and nobody revokes it."""
    console = await world.accounts.keys.console(member.id)
    path = f"/api/keys/{console.id}"
    for person in (admin, member):
        assert "console" in (await person.refused("DELETE", path, 400))["message"]
    assert (await admin.send("PATCH", path, {"models": ["Echo"]}))["kind"] == "console"


# ---- requests -----------------------------------------------------------------------------------------


async def test_a_request_is_what_its_row_says(world: World, member: Person) -> None:
    """With its moment, its money to the last digit and its times as people read them."""
    (key,) = (await member.get("/api/keys"))["data"]
    kept = row(
        0,
        account_id=member.id,
        key_id=key["id"],
        began_us=MONDAY + 34_860_123_456,
        price_nano=420_000_000_000_000_001,
        first_us=34_200,
        duration_us=500_000,
        completion_tokens=24,
    )
    (identifier,) = await world.put(kept)
    assert member.account is not None
    shown = await member.get(f"/api/requests/{identifier}")
    derived = {
        "id": identifier,
        "began": "2026-11-30T09:41:00.123456Z",
        "account": member.account.name,
        "key": key["name"],
        "price": "420000000.000000001",
        "first_ms": 34.2,
        "duration_ms": 500.0,
        "tokens_per_second": 48.0,
        "asked": None,
        "answered": None,
    }
    same = {name: value for name, value in kept.items() if not name.endswith(("_us", "_nano"))}
    assert shown == same | derived
    (listed,) = (await member.get("/api/requests"))["data"]
    assert listed == {name: value for name, value in shown.items() if name not in {"asked", "answered"}}
    for unknown in (SOME_ID, identifier.upper() + "0", "x", "%00"):
        await member.refused("GET", f"/api/requests/{unknown}", 404)


async def test_an_open_request_has_no_end_yet(world: World, member: Person) -> None:
    """What is not known of it is null."""
    opened = row(
        0, account_id=member.id, outcome=schema.OPEN, status=0, first_us=None, duration_us=None, key_id="gone"
    )
    await world.put(opened)
    (shown,) = (await member.get("/api/requests", outcome="open"))["data"]
    assert (shown["first_ms"], shown["duration_ms"], shown["tokens_per_second"]) == (None, None, None)
    assert (shown["status"], shown["key"]) == (0, "")


async def test_texts_come_with_their_request_alone(world: World, member: Person) -> None:
    """Where they are kept; no list and no export has them."""
    (identifier,) = await world.put(row(0, account_id=member.id), asked="what?", answered="that.")
    shown = await member.get(f"/api/requests/{identifier}")
    assert (shown["asked"], shown["answered"]) == ("what?", "that.")
    for path in ("/api/requests", "/api/export"):
        assert "that." not in (await member.ask("GET", path)).text


async def test_pages_lead_to_each_other(world: World, member: Person) -> None:
    """By what each says is next, until there is none; requests of one moment come once, too."""
    identifiers = await world.put(
        *(row(0, account_id=member.id, began_us=MONDAY + n // 3) for n in range(10))
    )
    for limit in (1, 3, 10, 500):
        seen: list[str] = []
        before: Json = {}
        while True:
            page = await member.get("/api/requests", limit=limit, **before)
            seen += [one["id"] for one in page["data"]]
            if page["next"] is None:
                break
            before = {"before": page["next"]}
        assert seen == identifiers[::-1]


async def test_filters_choose(world: World, member: Person) -> None:
    """By model in any case, key, outcome, status and time; a day includes itself."""
    mine = {"account_id": member.id}
    first, second, third = await world.put(
        row(0, **mine, model="Echo", began_us=MONDAY - 1),
        row(0, **mine, model="org/Parrot:latest", began_us=MONDAY, key_id="k", status=404, outcome="refused"),
        row(0, **mine, model="gone", began_us=MONDAY + DAY_US),
    )
    chosen: list[tuple[Json, set[str]]] = [
        ({"model": "ECHO"}, {first}),
        ({"model": "org/parrot:latest"}, {second}),
        ({"model": "gone"}, {third}),
        ({"key_id": "k"}, {second}),
        ({"outcome": "refused"}, {second}),
        ({"status": 200}, {first, third}),
        ({"since": "2026-11-30"}, {second, third}),
        ({"until": "2026-11-30"}, {first, second}),
        ({"since": "2026-11-30", "until": "2026-11-30"}, {second}),
        ({"since": "2026-11-29T23:59:59.999999Z", "until": "2026-11-30T00:00:00Z"}, {first}),
        ({"since": "2026-11-30T01:00:00+01:00", "until": "2026-11-30T00:00:00.000001"}, {second}),
    ]
    for query, expected in chosen:
        assert {one["id"] for one in (await member.get("/api/requests", **query))["data"]} == expected, query
        exported = await member.get("/api/export", format="json", **query)
        assert {one["id"] for one in exported["data"]} == expected, query


# ---- exports ------------------------------------------------------------------------------------------


async def test_both_exports_have_every_request(
    world: World, member: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many chunks they are read in, and also if there are none."""
    monkeypatch.setattr(usage, "CHUNK", 3)
    for count in (0, 1, 2, 4):
        await world.put(*(row(0, account_id=member.id, began_us=MONDAY + n) for n in range(count)))
        listed = (await member.get("/api/requests", limit=500))["data"]
        assert (await member.get("/api/export", format="json"))["data"] == listed
        response = await member.ask("GET", "/api/export")
        assert response.headers["content-type"] == "text/csv; charset=utf-8"
        assert response.headers["content-disposition"] == 'attachment; filename="requests.csv"'
        table = list(csv.DictReader(io.StringIO(response.text, newline="")))
        assert table == [{name: cell(value) for name, value in one.items()} for one in listed]


def cell(value: Any) -> str:
    """A value as it stands in a table."""
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def record(**fields: Any) -> Record:
    """A request as an export has it."""
    kept = row(1) | {"account": "ada", "key": "a key"} | fields
    return Record(**kept)


async def chunks_of(*records: Record) -> AsyncIterator[list[Record]]:
    """Each in a chunk of its own."""
    for one in records:
        yield [one]


async def whole(pieces: AsyncIterator[bytes]) -> str:
    """All pieces together."""
    return b"".join([piece async for piece in pieces]).decode()


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
async def test_a_table_keeps_any_text_and_runs_none(text: str) -> None:
    """Whatever a client calls itself, its cell has it, after an apostrophe where it would be a formula."""
    table = await whole(as_csv(chunks_of(record(user_agent=text, account=text))))
    titles, cells = csv.reader(io.StringIO(table, newline=""))
    found = dict(zip(titles, cells, strict=True))
    for name in ("user_agent", "account"):
        assert found[name] == (f"'{text}" if text.startswith(FORMULA) else text)
    assert not any(one.startswith(FORMULA) for one in cells)


async def test_the_formulas_of_spreadsheets_are_known() -> None:
    """These are the beginnings that none of them takes for a text."""
    assert set("=+-@\t\r") <= set(export.FORMULA)


async def test_what_breaks_off_does_not_look_whole() -> None:
    """Where the store is gone in the middle, the JSON has no end."""

    async def broken() -> AsyncIterator[list[Record]]:
        yield [record()]
        raise RuntimeError

    pieces = as_json(broken())
    begun = await anext(pieces)
    with pytest.raises(RuntimeError):
        await anext(pieces)
    with pytest.raises(json.JSONDecodeError):
        json.loads(begun)


# ---- sums ---------------------------------------------------------------------------------------------


async def test_sums_are_told_apart_as_asked(world: World, member: Person) -> None:
    """By any of day, model and key; those that are forgotten count; money is exact."""
    (key,) = (await member.get("/api/keys"))["data"]
    mine = {"account_id": member.id, "key_id": key["id"], "price_nano": 10**17 + 1}
    await world.put(
        row(0, **mine, model="Echo"), row(0, **mine, model="other"), row(0, **mine, began_us=MONDAY + DAY_US)
    )
    counted = {"requests": 3, "prompt_tokens": 3, "completion_tokens": 6, "price": "300000000.000000003"}
    one = {"requests": 1, "prompt_tokens": 1, "completion_tokens": 2, "price": "100000000.000000001"}
    for forgotten in (MONDAY - DAY_US, MONDAY + 2 * DAY_US):
        await world.accounts.usage.forget(forgotten)
        assert (await member.get("/api/usage"))["data"] == [counted]
        by_key = await member.get("/api/usage", by="key")
        assert by_key["data"] == [{"key_id": key["id"], "key": key["name"], **counted}]
        by_both = await member.get("/api/usage", by="model,day", since="2026-11-30", until="2026-11-30")
        assert by_both["data"] == [
            {"day": "2026-11-30", "model": "Echo", **one},
            {"day": "2026-11-30", "model": "other", **one},
        ]
        by_day = await member.get("/api/usage", by="day", since="2026-12-01")
        assert by_day["data"] == [{"day": "2026-12-01", **one}]
        assert (await member.get("/api/usage", by="day", until="2026-11-29"))["data"] == []


async def test_how_fast_each_model_is(world: World, member: Person) -> None:
    """As the metrics say, of every model."""
    speeds = (await member.get("/api/speed"))["data"]
    assert set(speeds) == {"Echo", "other"}
    assert all(speed >= 0 for speed in speeds.values())


# ---- what is refused ----------------------------------------------------------------------------------

BODIES: list[tuple[str, str, Json, str, str]] = [
    ("POST", "/api/keys", {}, "name", "name is missing: it must be a string of 1 to 200 characters"),
    ("POST", "/api/keys", {"name": 5}, "name", "name must be a string of 1 to 200 characters"),
    ("POST", "/api/keys", {"name": ""}, "name", "name must be a string of 1 to 200 characters"),
    ("POST", "/api/keys", {"name": " x"}, "name", "none at its ends a space, not"),
    ("POST", "/api/keys", {"name": "a\nb"}, "name", "characters that can be seen"),
    ("POST", "/api/keys", {"name": "x" * 201}, "name", "1 to 200 characters"),
    ("POST", "/api/keys", {"name": "x", "nmae": 1}, "nmae", "nmae is not known here"),
    ("POST", "/api/keys", {"name": "x", "models": []}, "models", "models must be a"),
    ("POST", "/api/keys", {"name": "x", "models": [5]}, "models[0]", "a model's name, not 5"),
    ("POST", "/api/keys", {"name": "x", "account_id": 5}, "account_id", "an account's id, not 5"),
    ("POST", "/api/keys", {"name": "x", "limits": 5}, "limits", "limits must be an object, not 5"),
    (
        "POST",
        "/api/keys",
        {"name": "x", "limits": {"overall": {"requests_per_minute": 0}}},
        "limits.overall.requests_per_minute",
        "must be an integer from 1 to 1000000000, not 0",
    ),
    (
        "POST",
        "/api/keys",
        {"name": "x", "limits": {"overall": {"dollars_per_month": "0.0000000001"}}},
        "limits.overall.dollars_per_month",
        'dollars from 0 to 1000000 with up to 9 decimals, as a string, not "0.0000000001"',
    ),
    (
        "POST",
        "/api/keys",
        {"name": "x", "limits": {"models": {"Echo": {"concurrent_requests": "9"}}}},
        "limits.models.Echo.concurrent_requests",
        'must be an integer from 1 to 1000000, not "9"',
    ),
    (
        "POST",
        "/api/keys",
        {"name": "x", "limits": {"overall": {"requests": 5}}},
        "limits.overall.requests",
        "limits.overall.requests is not known here",
    ),
    (
        "POST",
        "/api/keys",
        {"name": "x", "limits": {"models": {"": {}}}},
        "limits.models",
        "limits.models must have models' names as its keys",
    ),
    ("POST", "/api/accounts", {}, "name", "name is missing"),
    ("POST", "/api/accounts", {"name": "a b"}, "name", "name must be"),
    ("POST", "/api/accounts", {"name": "a", "role": "boss"}, "role", 'one of "admin", "member", not "boss"'),
    ("POST", "/api/accounts", {"name": "a", "password": "short-one"}, "password", "12 to 200 characters"),
    ("POST", "/api/accounts", {"name": "a", "password": "x" * 201}, "password", "12 to 200 characters"),
    ("POST", "/api/accounts", {"name": "a", "limits": []}, "limits", "limits must be an object"),
    (
        "POST",
        "/api/accounts",
        {"name": "a", "limits": {"models": {"gpt-9": {}}}},
        "limits.models.gpt-9",
        "one of the models that GET /v1/models lists",
    ),
    (
        "PATCH",
        "/api/accounts/SELF",
        {"limits": {"overall": {"dollars_per_month": "1000000.1"}}},
        "limits.overall.dollars_per_month",
        "dollars from 0 to 1000000 with up to 9 decimals, as a string",
    ),
    (
        "PATCH",
        "/api/accounts/SELF",
        {"limits": {"models": {"Echo": {"tokens_per_minute": 0}}}},
        "limits.models.Echo.tokens_per_minute",
        "must be an integer from 1 to 1000000000000, not 0",
    ),
    ("PATCH", "/api/accounts/SELF", {"disabled": "yes"}, "disabled", "true or false"),
    ("PATCH", "/api/accounts/SELF", {"diasbled": True}, "diasbled", "not known here"),
    ("POST", "/api/me/password", {"old": 5, "new": PASSWORD}, "old", "old must be a string"),
    ("POST", "/api/me/password", {"old": PASSWORD}, "new", "new is missing"),
    ("POST", "/api/me/password", {"old": PASSWORD, "new": "hunter2"}, "new", "12 to 200 characters"),
]


async def test_a_body_is_refused_by_its_field(admin: Person) -> None:
    """In a sentence that names the field, its value unless it is secret, and what was expected."""
    for method, path, body, param, words in BODIES:
        error = await admin.refused(method, path.replace("SELF", admin.id), 400, json=body)
        assert error["param"] == param, body
        assert words in error["message"], error["message"]
        for secret in ("short-one", "hunter2", PASSWORD, "x" * 30):
            assert secret not in error["message"] or param == "name"


QUERIES: list[tuple[str, str, str, str]] = [
    ("/api/requests", "limit=0", "limit", 'an integer from 1 to 500, not "0"'),
    ("/api/requests", "limit=501", "limit", "an integer from 1 to 500"),
    ("/api/requests", "limit=x", "limit", "an integer from 1 to 500"),
    ("/api/requests", "status=42", "status", "an integer from 100 to 599"),
    ("/api/requests", "outcome=good", "outcome", 'one of "completed", "cancelled"'),
    ("/api/requests", "since=yesterday", "since", 'a moment such as 2026-11-30T09:41:00Z, not "yesterday"'),
    ("/api/requests", "since=2026-02-30", "since", "a day such as 2026-11-30"),
    ("/api/requests", "until=2026-11-30T25:00:00Z", "until", "a moment such as"),
    ("/api/requests", "before=x", "before", "what next was in the answer before"),
    ("/api/requests", f"before={'9' * 19}-{SOME_ID}", "before", "what next was in the answer before"),
    ("/api/requests", "modle=Echo", "modle", "modle is not known here"),
    ("/api/requests", "model=a&model=b", "model", "model is given more than once"),
    ("/api/requests", "model=", "model", "a model's name"),
    ("/api/requests", "model=a%00", "model", "a model's name"),
    ("/api/requests", "key_id=%00", "key_id", "a key's id"),
    ("/api/requests", "account_id=%00", "account_id", "an account's id"),
    ("/api/export", "format=xml", "format", 'one of "csv", "json"'),
    ("/api/export", "limit=5", "limit", "not known here"),
    ("/api/usage", "by=day,week", "by", "some of day, model and key"),
    ("/api/usage", "since=2026-11-30T00:00:00Z", "since", "a day such as 2026-11-30, not"),
]


async def test_a_parameter_is_refused_by_its_name(admin: Person) -> None:
    """The same for what stands behind the question mark."""
    for path, query, param, words in QUERIES:
        response = await admin.ask("GET", path, params=query)
        assert response.status_code == 400, query
        error = response.json()["error"]
        assert error["param"] == param, query
        assert words in error["message"], error["message"]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(data=st.data())
async def test_no_body_is_too_much(world: World, data: st.DataObject) -> None:
    """Whatever is said in it, the answer is one that the document has, and no failure of ours."""
    path, method, operation = data.draw(st.sampled_from([one for one in operations() if one[2].body]))
    assert operation.body is not None
    fields = st.sampled_from([*operation.body.model_fields, "more"])
    body = data.draw(st.dictionaries(fields, JSON_VALUES, max_size=4))
    content = json.dumps(body).encode(errors="surrogatepass")
    admin = world.with_key(KEY)
    said = {"content": content, "headers": {"content-type": "application/json"}}
    response = await admin.ask(method.upper(), path.replace("{id}", SOME_ID), **said)
    assert response.status_code < 500


@given(data=st.data())
async def test_no_parameter_is_too_much(world: World, data: st.DataObject) -> None:
    """The same behind the question mark and in the path."""
    path, _, operation = data.draw(st.sampled_from([one for one in operations() if one[1] == "get"]))
    fields = operation.query.model_fields if operation.query else {}
    query = data.draw(st.dictionaries(st.sampled_from([*fields, "more"]), st.text(), max_size=4))
    # httpx normalises the path: what is left of these has no slash.
    identifier = data.draw(
        st.text(st.characters(exclude_characters="/.", exclude_categories=["Cs"]), min_size=1)
    )
    placed = path.replace("{id}", quote(identifier, safe=""))
    query = {name: value.encode(errors="replace").decode() for name, value in query.items()}
    response = await world.with_key(KEY).ask("GET", placed, params=query)
    assert response.status_code < 500


async def test_what_is_no_body_is_refused(admin: Person) -> None:
    """Another type than JSON, JSON that is none or no object, and more than fits."""
    path = "/api/keys"
    as_json = {"content-type": "application/json"}
    for content, headers, status in [
        (b"name=x", {"content-type": "application/x-www-form-urlencoded"}, 415),
        (b"{}", {}, 415),
        (b"{", as_json, 400),
        (b"[]", as_json, 400),
        (b'{"name": "\\ud800"}', as_json, 400),
        (b"", as_json, 400),
        (b" " * (BODY_BYTES + 1), as_json, 413),
    ]:
        await admin.refused("POST", path, status, content=content, headers=headers)
    response = await admin.ask(
        "POST", path, content=b'{"name": "x"}', headers={"content-type": "Application/JSON; charset=utf-8"}
    )
    assert response.status_code == 201


async def test_other_methods_are_told_the_right_ones(world: World, admin: Person) -> None:
    """And a path that is not there is not there."""
    response = await world.http.put("/api/keys", headers=admin.headers)
    assert (response.status_code, response.headers["allow"]) == (405, "GET")
    assert (await world.http.get("/api/nothing", headers=admin.headers)).status_code == 404


async def test_secrets_are_in_no_log(
    world: World, admin: Person, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Neither a key nor a password, given or made up, also where it is refused."""
    caplog.set_level(0)
    created = await admin.key()
    account = await admin.send("POST", "/api/accounts", {"name": "logged"}, status=201)
    new = "a password to be found"
    await admin.send("PATCH", f"/api/accounts/{account['id']}", {"password": new})
    await admin.ask("POST", "/api/me/password", json={"old": new, "new": "hunter2-"})
    await admin.ask("POST", "/api/accounts", json={"name": "logged", "password": "hunter2-"})
    logged = "".join([caplog.text, *capsys.readouterr()])
    for secret in (created["key"], account["password"], new, "hunter2-", admin.headers["authorization"][7:]):
        assert secret not in logged


# ---- a store that is gone -----------------------------------------------------------------------------


async def test_a_store_that_is_down_is_said_to_be(tmp_path: Path) -> None:
    """With a 503 that says when to come again; when it is back, so is the API."""
    with postgres_cluster() as server:
        async with living(server.url(server.create_database()), tmp_path) as world:
            admin = world.with_key(KEY)
            assert (await admin.get("/api/requests"))["data"] == []
            await asyncio.to_thread(server.stop)
            for path in ("/api/me", "/api/keys", "/api/requests", "/api/usage", "/api/export"):
                response = await soon(admin.ask("GET", path))
                assert response.status_code == 503, path
                assert response.json()["error"]["code"] == "store_unavailable"
            await asyncio.to_thread(server.start)
            assert (await admin.get("/api/requests"))["data"] == []


class BreaksOff(Usage):
    """A ledger whose store is gone in the middle of an export."""

    async def chunks(self, chosen: Filter) -> AsyncIterator[list[Record]]:
        yield [record()]
        raise StoreDown


async def test_an_export_that_breaks_off_is_noticed(sqlite_url: str, tmp_path: Path) -> None:
    """Its connection ends before its body does, in either form."""
    async with accounts_on(sqlite_url, tmp_path) as accounts:
        accounts.usage = BreaksOff(accounts.store)
        async with deployed(served(echo_engine()), accounts=accounts) as deployment:
            for form in ("csv", "json"):
                with pytest.raises(httpx.RemoteProtocolError):
                    await deployment.http.get(
                        "/api/export", params={"format": form}, headers={"authorization": f"Bearer {KEY}"}
                    )
