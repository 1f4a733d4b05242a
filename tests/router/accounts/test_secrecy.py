"""What nobody may read in a log, in an error or in the store, whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from sqlalchemy import make_url

from router.accounts.sessions import COOKIE
from tests.harness import Deployment, deployed, echo_engine, request, served
from tests.router.accounts.gated import PASSWORD, accounts_on, as_admin
from tests.stores import PostgresCluster, postgres_cluster
from tests.waiting import until

pytestmark = pytest.mark.usefixtures("quick_hashes")

WRONG_KEY = "tk-WrongKeyThatSomebodyHasSentByMistake0000"
WRONG_PASSWORD = "wrong-password-of-somebody"  # noqa: S105 - nobody's
NEW_PASSWORD = "new-password-of-the-admin"  # noqa: S105 - nobody's


@pytest.fixture(scope="module")
def own_postgres() -> Iterator[PostgresCluster]:
    """A server that may be stopped."""
    with postgres_cluster() as cluster:
        yield cluster


async def log_in(deployment: Deployment, password: str) -> httpx.Response:
    """Fill in the form of the console."""
    deployment.http.cookies.clear()
    form = await deployment.http.get("/login")
    token = form.cookies.get("trunkline_login") or ""
    fields = {"name": "admin", "password": password, "csrf": token}
    return await deployment.http.post("/login", data=fields)


async def test_no_secret_is_in_any_log_or_answer(
    own_postgres: PostgresCluster, tmp_path: Path, said: list[str]
) -> None:
    """Keys, passwords, cookies and tokens, right and wrong ones, and the password of the store: nothing of
    them is logged at any level, and no answer repeats them, whatever is done with them, and while the store
    is away."""
    url = own_postgres.url(own_postgres.create_database())
    said += [str(make_url(url).password), url, WRONG_KEY, WRONG_PASSWORD, NEW_PASSWORD]
    async with (
        accounts_on(url, tmp_path) as accounts,
        deployed(served(echo_engine()), accounts=accounts) as deployment,
    ):
        answers = [*await with_keys(deployment), *await with_passwords(deployment)]
        answers += await with_new_key(deployment, said)
        answers += await with_session(deployment, said)
        await asyncio.to_thread(own_postgres.stop)
        await until(lambda: accounts.ledger.down)
        answers += [*await with_keys(deployment), *await with_passwords(deployment)]
        own_postgres.start()
        await until(lambda: not accounts.ledger.down)
    for answer in answers:
        text = f"{answer.text}{answer.headers}"
        leaked = [secret for secret in said if secret in text or secret[len(secret) // 3 :] in text]
        assert leaked == [], answer.request.url
    assert {answer.status_code for answer in answers} >= {200, 400, 401, 403, 503}


async def with_keys(deployment: Deployment) -> list[httpx.Response]:
    """What is answered to keys, right ones and wrong ones."""
    deployment.http.cookies.clear()
    answers = []
    for sent in (f"Bearer {WRONG_KEY}", f"Bearer {WRONG_KEY[:20]}", f"Basic {WRONG_KEY}", WRONG_KEY):
        wrong = {"authorization": sent}
        answers += [
            await deployment.post(request("a"), **wrong),
            await deployment.http.get("/api/me", headers=wrong),
            await deployment.http.get("/v1/models", headers=wrong),
        ]
    return [
        *answers,
        await deployment.post(request("a"), **as_admin()),
        await deployment.http.get("/api/keys", headers=as_admin()),
    ]


async def with_passwords(deployment: Deployment) -> list[httpx.Response]:
    """What is answered to passwords that are wrong, or cannot be any."""
    bodies = [
        {"old": old, "new": new}
        for old, new in ((WRONG_PASSWORD, NEW_PASSWORD), (PASSWORD, "short"), (PASSWORD, NEW_PASSWORD * 20))
    ]
    changes = [
        await deployment.http.post("/api/me/password", json=body, headers=as_admin()) for body in bodies
    ]
    return [await log_in(deployment, WRONG_PASSWORD), *changes]


async def with_new_key(deployment: Deployment, said: list[str]) -> list[httpx.Response]:
    """What is answered to a key that was just made."""
    made = await deployment.http.post("/api/keys", json={"name": "mine"}, headers=as_admin())
    said.append(made.json()["key"])
    sent = {"authorization": f"Bearer {said[-1]}"}
    return [
        await deployment.post(request("a"), **sent),
        await deployment.http.get("/api/keys", headers=sent),
        await deployment.http.delete(f"/api/keys/{made.json()['id']}", headers=sent),
        await deployment.post(request("a"), **sent),
    ]


async def with_session(deployment: Deployment, said: list[str]) -> list[httpx.Response]:
    """What is answered to somebody who is logged in, who changes the password in the end."""
    assert (await log_in(deployment, PASSWORD)).status_code == 303
    said.append(str(deployment.http.cookies.get(COOKIE)))
    said.append((await deployment.http.get("/api/me")).json()["csrf"])
    ours = {"x-csrf-token": said[-1]}
    body = {"old": PASSWORD, "new": NEW_PASSWORD}
    answers = [
        await deployment.post(request("a"), **{"x-csrf-token": said[-1][:-1]}),
        await deployment.post(request("a"), **ours),
        await deployment.http.post("/api/me/password", json=body, headers=ours),
    ]
    assert [answer.status_code for answer in answers] == [403, 200, 200]
    return answers


def contents(folder: Path) -> list[bytes]:
    """All files of a folder."""
    return [path.read_bytes() for path in folder.rglob("*") if path.is_file()]


async def test_the_files_of_a_store_have_no_secret(sqlite_url: str, tmp_path: Path, said: list[str]) -> None:
    """Whoever gets hold of the folder finds neither a key nor a password nor a cookie in it."""
    async with (
        accounts_on(sqlite_url, tmp_path) as accounts,
        deployed(served(echo_engine()), accounts=accounts) as deployment,
    ):
        made = await deployment.http.post("/api/keys", json={"name": "mine"}, headers=as_admin())
        said.append(made.json()["key"])
        await deployment.post(request("a"), authorization=f"Bearer {said[-1]}")
        await log_in(deployment, WRONG_PASSWORD)
        assert (await log_in(deployment, PASSWORD)).status_code == 303
        cookie = str(deployment.http.cookies.get(COOKIE))
        said.append(cookie)
        token = (await deployment.http.get("/api/me")).json()["csrf"]
        said.append(token)
    files = contents(tmp_path)
    assert files
    for secret in (*said, WRONG_PASSWORD):
        assert not any(secret[len(secret) // 3 :].encode() in file for file in files)
