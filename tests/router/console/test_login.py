"""Logging in to the console, and out of it."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urljoin

import httpx
import pytest

from router.accounts.sessions import COOKIE
from router.console.login import BEFORE_COOKIE, FORM_BYTES, HOME, local
from tests.router.accounts.gated import PASSWORD
from tests.router.console.opened import console, log_in, token


def cookie(response: httpx.Response, name: str) -> tuple[str, set[str]]:
    """A cookie's value and what else was said of it, in small letters."""
    (line,) = [one for one in response.headers.get_list("set-cookie") if one.startswith(f"{name}=")]
    value, *said = line.split("; ")
    return value.removeprefix(f"{name}="), {one.lower() for one in said}


async def test_the_right_password_begins_a_session(client: httpx.AsyncClient) -> None:
    """Who knows the password is led on, with a cookie that no script reads, that no other site makes a
    browser send, and that ends with the session."""
    response = await log_in(client, next="/keys?new=1")
    assert response.status_code == 303
    assert response.headers["location"] == "/keys?new=1"
    value, said = cookie(response, COOKIE)
    assert value
    assert said == {"httponly", "samesite=lax", "path=/", f"max-age={12 * 3600}"}
    assert (await client.get("/keys")).status_code == 200
    assert (await client.get("/login", params={"next": "/usage"})).headers["location"] == "/usage"


async def test_cookies_go_over_tls_alone_where_that_is_asked_for(tmp_path: Path) -> None:
    """With secure_cookies both cookies are for TLS alone."""
    async with console(tmp_path, secure_cookies=True) as deployment:
        csrf = await token(deployment.http)
        fields = {"name": "admin", "password": PASSWORD, "csrf": csrf}
        headers = {"cookie": f"{BEFORE_COOKIE}={csrf}"}  # the client would not send it without TLS
        response = await deployment.http.post("/login", data=fields, headers=headers)
        assert response.status_code == 303
        assert "secure" in cookie(response, COOKIE)[1]
        assert "secure" in cookie(await deployment.http.get("/login"), BEFORE_COOKIE)[1]


async def test_a_session_is_new_at_each_log_in(client: httpx.AsyncClient) -> None:
    """A cookie that somebody had before is not the one of the session that begins, and is worth nothing
    afterwards, whoever has planted it."""
    client.cookies.set(COOKIE, "planted")
    begun, _ = cookie(await log_in(client), COOKIE)
    assert begun != "planted"
    for value, status in ((begun, 200), ("planted", 303)):
        client.cookies.clear()
        client.cookies.set(COOKIE, value)
        assert (await client.get("/keys")).status_code == status


async def test_another_log_in_ends_the_session_before(client: httpx.AsyncClient) -> None:
    """Who logs in anew in the same browser leaves no session behind."""
    csrf = await token(client)
    fields = {"name": "admin", "password": PASSWORD, "csrf": csrf}
    before = client.cookies[BEFORE_COOKIE]
    first, _ = cookie(await client.post("/login", data=fields), COOKIE)
    client.cookies.set(BEFORE_COOKIE, before, path="/login")
    second, _ = cookie(await client.post("/login", data=fields), COOKIE)
    assert first != second
    client.cookies.clear()
    client.cookies.set(COOKIE, first)
    assert (await client.get("/keys")).status_code == 303
    client.cookies.set(COOKIE, second)
    assert (await client.get("/keys")).status_code == 200


@pytest.mark.parametrize("name", ["admin", "nobody", HOME, '"><script>alert(1)</script>'])
async def test_a_wrong_password_begins_none(client: httpx.AsyncClient, name: str) -> None:
    """A wrong password gets the form again, with the name and never the password, whether or not there is
    such an account: both are answered alike."""
    response = await log_in(client, name, "a wrong password")
    assert response.status_code == 401
    assert "This account and password do not match." in response.text
    assert "a wrong password" not in response.text
    assert "<script>alert" not in response.text
    assert COOKIE not in response.cookies
    assert (await client.get("/keys")).status_code == 303


async def test_guessing_is_slowed_down(client: httpx.AsyncClient) -> None:
    """After some wrong passwords even the right one has to wait, and the form says for how long."""
    for _ in range(8):
        response = await log_in(client, "admin", "a wrong password")
    response = await log_in(client)
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1
    assert "Too many failed attempts. Please wait" in response.text


async def test_another_site_logs_nobody_in(client: httpx.AsyncClient) -> None:
    """Without the cookie that the form came with, or with another token than its own, a right password is
    refused."""
    csrf = await token(client)
    fields = {"name": "admin", "password": PASSWORD}
    for wrong in ({}, {"csrf": ""}, {"csrf": csrf[:-1]}, {"csrf": "é"}):
        response = await client.post("/login", data=fields | wrong)
        assert response.status_code == 403
        assert COOKIE not in response.cookies
    client.cookies.clear()
    for guess in ("", csrf):
        assert (await client.post("/login", data=fields | {"csrf": guess})).status_code == 403
        client.cookies.clear()


async def test_logging_out_ends_the_session(admin: httpx.AsyncClient) -> None:
    """It takes the page's token; afterwards the cookie is worth nothing."""
    value = admin.cookies[COOKIE]
    csrf = await token(admin, "/account")
    assert (await admin.post("/logout", data={"csrf": "wrong"})).status_code == 403
    assert (await admin.get("/keys")).status_code == 200
    response = await admin.post("/logout", data={"csrf": csrf})
    assert response.status_code == 303
    assert response.headers["location"] == "/login"
    admin.cookies.set(COOKIE, value)
    assert (await admin.get("/keys")).status_code == 303
    assert (await admin.post("/logout", data={"csrf": csrf})).headers["location"] == "/login"


async def test_a_form_is_bounded(client: httpx.AsyncClient) -> None:
    """What is no form, or is longer than one, is refused."""
    csrf = await token(client)
    long = {"name": "admin", "password": "x" * FORM_BYTES, "csrf": csrf}
    assert (await client.post("/login", data=long)).status_code == 413
    assert (await client.post("/login", json={"name": "admin"})).status_code == 415
    assert (await client.get("/logout")).status_code == 405


@pytest.mark.parametrize("path", ["/keys", "/requests?model=a%20b&before=1-2", "/requests/0f", "/reference"])
def test_one_is_led_on_within_the_console(path: str) -> None:
    """After logging in one is led to the page that one wanted to see."""
    assert local(path) == path


@pytest.mark.parametrize(
    "path",
    [
        "",
        "keys",
        "//evil.example",
        "/\\evil.example",
        "///evil.example/keys",
        "/\t/evil.example",
        "/\n/evil.example",
        "https://evil.example/keys",
        "javascript:alert(1)//keys",
        "/v1/models",
        "/keysandmore",
        "/keys\r\nset-cookie: a=b",
        " /keys",
    ],
)
def test_one_is_led_nowhere_else(path: str) -> None:
    """Any other address, whatever a browser would make of it, is replaced by the first page."""
    assert local(path) == HOME
    assert urljoin("http://here.example/login", local(path)).startswith("http://here.example/")
