"""Headers of a request, as ASGI gives them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from router.errors import MissingKey

Header = tuple[bytes, bytes]

_CALLERS_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


def header(headers: Iterable[Header], name: bytes) -> bytes | None:
    """The first value of a request header; `name` in lower case."""
    for key, value in headers:
        if key == name:
            return value
    return None


def request_id(headers: Iterable[Header]) -> str | None:
    """The caller's own id for its request, where it is one that is fit for headers and logs."""
    given = header(headers, b"x-request-id")
    return given.decode() if given is not None and _CALLERS_ID.fullmatch(given) else None


def user_agent(headers: Iterable[Header]) -> str:
    """What the client says that it is, in at most 200 characters; empty where it says nothing."""
    given = header(headers, b"user-agent")
    return given.decode("latin-1")[:200] if given else ""


def bearer(headers: Iterable[Header]) -> str:
    """The key of a request. Raises MissingKey."""
    scheme, _, secret = (header(headers, b"authorization") or b"").decode("latin-1").partition(" ")
    if scheme.lower() != "bearer" or not secret.strip():
        raise MissingKey
    return secret.strip()
