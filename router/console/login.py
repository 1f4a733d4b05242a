"""Logging in to the console and out of it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from hmac import compare_digest
from urllib.parse import parse_qsl

from starlette.datastructures import QueryParams
from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response

from router.accounts.accounts import Accounts
from router.accounts.sessions import COOKIE
from router.errors import (
    ApiError,
    BadCsrf,
    BodyTooLarge,
    RequestTimeout,
    TooManyFailures,
    UnsupportedMediaType,
    WrongPassword,
)

Render = Callable[..., Awaitable[Response]]

BEFORE_COOKIE = "trunkline_login"
"""The cookie of somebody who has not logged in yet: the form has to say the same. No other site can read
either, so that none can log a person in."""

FORM_BYTES = 16 * 1024
"""Bytes of a form."""

FORM_S = 10.0
"""Seconds for a form to arrive."""

HOME = "/reference"

INSIDE = frozenset({"reference", "playground", "requests", "usage", "models", "keys", "account", "people"})
"""What the path of a page begins with."""


class Login:
    """The form, and what it and its counterpart do."""

    def __init__(self, accounts: Accounts, render: Render) -> None:
        self._accounts = accounts
        self._render = render

    async def form(self, request: Request) -> Response:
        """The form; those who have logged in need none."""
        after = local(request.query_params.get("next", ""))
        if await self._accounts.callers.session(request.scope["headers"]) is not None:
            return _redirect(after)
        return await self._form(request, after)

    async def enter(self, request: Request) -> Response:
        """Begin a session of its own, whatever cookie came; or the form again, with why not."""
        fields = await _fields(request)
        after, name = local(fields.get("next", "")), fields.get("name", "")
        if not _same(fields.get("csrf", ""), request.cookies.get(BEFORE_COOKIE, "")):
            why = "This form had been open for too long, or your browser keeps no cookies. Please try again."
            return await self._form(request, after, name, why, BadCsrf())
        try:
            account = await self._accounts.people.check(
                name, fields.get("password", ""), self._accounts.client(request)
            )
        except WrongPassword as error:
            return await self._form(request, after, name, "This account and password do not match.", error)
        except TooManyFailures as error:
            seconds = int(error.headers["retry-after"])
            why = f"Too many failed attempts. Please wait {_duration(seconds)} and try again."
            return await self._form(request, after, name, why, error)
        await self._accounts.sessions.close(request.cookies.get(COOKIE, ""))
        cookie = await self._accounts.sessions.open(account)
        response = _redirect(after)
        self._set(response, COOKIE, cookie, self._accounts.settings.session_hours * 3600)
        response.delete_cookie(BEFORE_COOKIE, path="/login")
        return response

    async def leave(self, request: Request) -> Response:
        """End the session."""
        session = await self._accounts.callers.session(request.scope["headers"])
        if session is not None:
            if not _same((await _fields(request)).get("csrf", ""), session.csrf):
                raise BadCsrf
            await self._accounts.sessions.close(request.cookies.get(COOKIE, ""))
        response = _redirect("/login")
        response.delete_cookie(COOKIE, path="/")
        return response

    async def _form(
        self, request: Request, after: str, name: str = "", why: str = "", error: ApiError | None = None
    ) -> Response:
        token = request.cookies.get(BEFORE_COOKIE, "") or secrets.token_urlsafe(32)
        response = await self._render(
            "login.html",
            status=error.status if error else 200,
            title="Log in",
            after=after,
            csrf=token,
            name=name,
            why=why,
        )
        if error is not None:
            response.headers.update(error.headers)
        self._set(response, BEFORE_COOKIE, token, 3600, path="/login")
        return response

    def _set(self, response: Response, name: str, value: str, seconds: int, path: str = "/") -> None:
        secure = self._accounts.settings.secure_cookies
        response.set_cookie(
            name, value, max_age=seconds, path=path, secure=secure, httponly=True, samesite="lax"
        )


def local(address: str) -> str:
    """The address, if it is one of the console's own pages; otherwise its first page."""
    # A browser takes "//host" and "/\host" for another host; neither begins with the name of a page.
    begin, _, rest = address.partition("/")
    page = rest.partition("?")[0].partition("/")[0]
    return address if not begin and page in INSIDE and address.isprintable() else HOME


def _redirect(path: str) -> Response:
    # A browser must not come back here by its memory.
    return RedirectResponse(path, 303, {"cache-control": "no-store", "referrer-policy": "no-referrer"})


def _same(given: str, expected: str) -> bool:
    return bool(expected) and compare_digest(given.encode(), expected.encode())


async def _fields(request: Request) -> QueryParams:
    """The fields of a form. Raises UnsupportedMediaType, BodyTooLarge, RequestTimeout."""
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/x-www-form-urlencoded":
        raise UnsupportedMediaType(kind)
    body = b""
    try:
        async with asyncio.timeout(FORM_S):
            async for piece in request.stream():
                body += piece
                if len(body) > FORM_BYTES:
                    raise BodyTooLarge(FORM_BYTES)
    except (TimeoutError, ClientDisconnect):
        raise RequestTimeout(FORM_S) from None
    return QueryParams(parse_qsl(body.decode(errors="replace"), keep_blank_values=True))


def _duration(seconds: int) -> str:
    if seconds < 90:
        return f"{seconds} seconds"
    return f"{-(-seconds // 60)} minutes"
