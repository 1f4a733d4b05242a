"""Pages of other origins that may call /v1 from a browser: those that the configuration names alone."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from router.headers import Header, header
from router.http import header_line

PREFLIGHT_S = 600
"""Seconds for which a browser may remember what it may do."""

EXPOSED = (
    "x-request-id",
    "retry-after",
    *(
        f"x-ratelimit-{what}-{of}"
        for of in ("requests", "tokens")
        for what in ("limit", "remaining", "reset")
    ),
)
"""Headers of an answer that such a page may read."""


def origin_lines(origins: Collection[str], headers: Sequence[Header]) -> bytes:
    """The headers that let a page read its answer; nothing where it may not."""
    origin = header(headers, b"origin")
    if origin is None or origin.decode("latin-1") not in origins:
        return b""
    return (
        header_line("access-control-allow-origin", origin.decode("latin-1"))
        + header_line("access-control-expose-headers", ", ".join(EXPOSED))
        + header_line("vary", "origin")
    )


def with_cors(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Let pages of these origins call what `app` has under /v1."""
    if not origins:
        return app
    open_one = CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],  # OpenAI's SDK sends a dozen of its own; no cookie comes along
        expose_headers=EXPOSED,
        max_age=PREFLIGHT_S,
    )

    async def routed(scope: Scope, receive: Receive, send: Send) -> None:
        reached = scope["type"] == "http" and scope["path"].startswith("/v1/")
        await (open_one if reached else app)(scope, receive, send)

    return routed
