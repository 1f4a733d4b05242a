"""Everything under /v1 asks who calls; requests for tokens do so themselves."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import SecretStr
from starlette.datastructures import State
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from router.errors import ApiError, InvalidKey
from router.headers import Header, bearer

if TYPE_CHECKING:  # where accounts are off, the library of the store need not be loaded
    from router.accounts.callers import Callers
    from router.accounts.keys import Key

_KEY = "trunkline.key"


def guarded(app: ASGIApp, callers: Callers) -> ASGIApp:
    """Let only those reach what `app` has under /v1 who have a key, or are logged in."""

    async def asked(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1/"):
            try:
                key = await callers.holder(scope["headers"], scope["method"])
            except ApiError as error:
                await refusal(error)(scope, receive, send)
                return
            scope.setdefault("state", {})[_KEY] = key
        await app(scope, receive, send)

    return asked


def refusal(error: ApiError) -> Response:
    """The error as a response."""
    return Response(error.body(), error.status, dict(error.headers), "application/json")


def models_of(state: State) -> frozenset[str] | None:
    """The models that the caller of a request may use, by name; None: all."""
    key: Key | None = getattr(state, _KEY, None)
    return None if key is None else key.models


def check_token(headers: Sequence[Header], token: SecretStr) -> None:
    """Raises MissingKey or InvalidKey unless the request comes with this token as its Bearer."""
    given, expected = bearer(headers).encode(), token.get_secret_value().encode()
    if not hmac.compare_digest(given, expected):
        raise InvalidKey
