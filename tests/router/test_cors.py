from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from pydantic import ValidationError

from router.accounts.limits import KeyLimits
from router.accounts.settings import AccountsSettings, Limits
from router.cors import EXPOSED, origin_lines, with_cors
from tests.harness import Deployment, deployed, echo_engine, request, served
from tests.router.accounts.gated import accounts_on, as_admin

OURS = "https://chat.example.org"
ALSO_OURS = "http://localhost:3000"
FOREIGN = (
    "https://evil.example",
    "https://chat.example.org.evil.example",
    "https://chat.example.org:444",
    "http://chat.example.org",
    "null",
    "",
)
"""Origins that the configuration does not name, however alike."""

SENT_BY_SDK = "authorization,content-type,x-stainless-lang,x-stainless-retry-count"


def cors(response: httpx.Response) -> dict[str, str]:
    """What an answer says to a browser of who may read it."""
    return {
        name: value for name, value in response.headers.items() if name.startswith("access-control-allow")
    }


async def preflight(
    deployment: Deployment, path: str, origin: str, method: str = "POST", headers: str = SENT_BY_SDK
) -> httpx.Response:
    """What a browser asks before it lets a page ask."""
    return await deployment.http.options(
        path,
        headers={
            "origin": origin,
            "access-control-request-method": method,
            "access-control-request-headers": headers,
        },
    )


async def test_the_named_origins_may_ask_and_read(sqlite_url: str, tmp_path: Path) -> None:
    """A page of a named origin may ask for tokens and models with its key, and reads the answer with all that
    our headers tell, streams and refusals too."""
    async with (
        accounts_on(sqlite_url, tmp_path, cors_origins=(OURS, ALSO_OURS)) as accounts,
        deployed(served(echo_engine()), accounts=accounts) as deployment,
    ):
        for origin in (OURS, ALSO_OURS):
            for path in ("/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/echo"):
                method = "GET" if "models" in path else "POST"
                asked = await preflight(deployment, path, origin, method)
                assert asked.status_code == 200
                assert cors(asked)["access-control-allow-origin"] == origin
                assert method in asked.headers["access-control-allow-methods"]
                assert asked.headers["access-control-allow-headers"] == SENT_BY_SDK
            as_page = {"origin": origin}
            answers = [
                await deployment.post(request("a", stream=stream), **as_admin(), **as_page)
                for stream in (False, True)
            ]
            answers += [
                await deployment.post(request("a"), **as_page),
                await deployment.post(request("a", n=0), **as_admin(), **as_page),
                await deployment.http.get("/v1/models", headers={**as_admin(), **as_page}),
                await deployment.http.get("/v1/models", headers=as_page),
                await deployment.http.get("/v1/models/none", headers={**as_admin(), **as_page}),
            ]
            assert [answer.status_code for answer in answers] == [200, 200, 401, 400, 200, 401, 404]
            for answer in answers:
                assert cors(answer) == {"access-control-allow-origin": origin}
                assert "origin" in answer.headers["vary"].lower()
                exposed = answer.headers["access-control-expose-headers"].split(", ")
                assert exposed == list(EXPOSED)


async def test_what_is_left_of_limits_may_be_read(sqlite_url: str, tmp_path: Path) -> None:
    """Each header that tells a key of its limits is one that pages may read."""
    async with (
        accounts_on(sqlite_url, tmp_path, cors_origins=(OURS,)) as accounts,
        deployed(served(echo_engine()), accounts=accounts) as deployment,
    ):
        (admin,) = await accounts.people.everyone()
        limits = KeyLimits(overall=Limits(requests_per_minute=9, tokens_per_minute=9000))
        _, secret = await accounts.keys.create(admin.id, "limited", limits=limits)
        await accounts.ring.refresh()
        answer = await deployment.post(request("a"), authorization=f"Bearer {secret}", origin=OURS)
        told = {name for name in answer.headers if name.startswith("x-ratelimit")}
        assert told
        assert told <= set(EXPOSED)


async def test_no_other_page_may_read_anything(sqlite_url: str, tmp_path: Path) -> None:
    """An origin that is not named gets no word that a browser would take for leave; none ever gets it outside
    of /v1."""
    async with (
        accounts_on(sqlite_url, tmp_path, cors_origins=(OURS,)) as accounts,
        deployed(served(echo_engine()), accounts=accounts) as deployment,
    ):
        for origin in FOREIGN:
            for path in ("/v1/chat/completions", "/v1/models"):
                assert "access-control-allow-origin" not in cors(await preflight(deployment, path, origin))
            assert cors(await deployment.post(request("a"), **as_admin(origin=origin))) == {}
            models = await deployment.http.get("/v1/models", headers=as_admin(origin=origin))
            assert cors(models) == {}
        for path in ("/api/me", "/api/keys", "/", "/login", "/health", "/metrics", "/openapi.json", "/docs"):
            for answer in (
                await deployment.http.get(path, headers=as_admin(origin=OURS)),
                await preflight(deployment, path, OURS),
            ):
                assert cors(answer) == {}


async def test_unless_configured_no_page_may_ask(sqlite_url: str, tmp_path: Path) -> None:
    """Without named origins there is no leave for anybody, and no route for asking whether there is."""
    async with (
        accounts_on(sqlite_url, tmp_path) as accounts,
        deployed(served(echo_engine()), accounts=accounts) as deployment,
    ):
        answers = [
            await preflight(deployment, "/v1/chat/completions", OURS),
            await deployment.post(request("a"), **as_admin(origin=OURS)),
            await deployment.http.get("/v1/models", headers=as_admin(origin=OURS)),
        ]
        assert [cors(answer) for answer in answers] == [{}] * len(answers)


def test_nothing_is_written_that_was_not_configured() -> None:
    """An origin is repeated only where it is, letter by letter, one of those that are named."""
    for sent in (*FOREIGN, f"{OURS}\r\nset-cookie: a=1", OURS.upper(), f"{OURS}/", "\xff"):
        assert origin_lines([OURS], [(b"origin", sent.encode("latin-1"))]) == b""
    assert origin_lines([OURS], []) == b""
    lines = origin_lines([OURS], [(b"origin", OURS.encode())]).split(b"\r\n")
    assert lines[0] == b"access-control-allow-origin: https://chat.example.org"


def test_without_origins_nothing_stands_in_the_way() -> None:
    """Where no origin is named the application is reached as it is."""

    async def app(*_: object) -> None:
        """Never asked."""

    assert with_cors(app, ()) is app


@pytest.mark.parametrize(
    "origin", [OURS, ALSO_OURS, "https://[2001:db8::1]:8443", "chrome-extension://abcdef"]
)
def test_an_origin_is_written_as_browsers_do(origin: str) -> None:
    """What can be an origin may be named."""
    assert AccountsSettings(cors_origins=(origin,)).cors_origins == (origin,)


@pytest.mark.parametrize(
    "origin",
    [
        "*",
        "null",
        "",
        "chat.example.org",
        f"{OURS}/",
        f"{OURS}/path",
        "https://Chat.example.org",
        f"{OURS}\r\nx: y",
    ],
)
def test_what_no_browser_would_send_is_refused(origin: str) -> None:
    """Anything else would let everybody in, or nobody without a word."""
    with pytest.raises(ValidationError, match="an origin such as"):
        AccountsSettings(cors_origins=(origin,))
