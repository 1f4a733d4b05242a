"""The console of a deployment that runs, for somebody with a browser: a client that keeps its cookies."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from html import unescape
from pathlib import Path
from typing import Any

import httpx

from router.settings import ModelCard
from tests.harness import Deployment, deployed, echo_engine, served
from tests.router.accounts.gated import PASSWORD, accounts_on

HOSTILE = "<script>alert(1)</script>"
"""The name of a model, which a page must not take for its own."""

PAGES = (
    "/reference",
    "/reference/completions",
    "/playground",
    "/requests",
    f"/requests/{'0' * 32}",
    "/usage",
    "/models",
    "/keys",
    "/account",
    "/people",
)

_CSRF = re.compile(r'name="csrf" value="([^"]+)"')


@asynccontextmanager
async def console(folder: Path, **settings: Any) -> AsyncIterator[Deployment]:
    """A deployment with a console, its accounts on a store of their own."""
    async with accounts_on(f"sqlite:///{folder / 'store.db'}", folder, **settings) as accounts:
        card = ModelCard(docs_url="javascript:alert(1)", prompt_guide_url="https://example.org/guide")
        async with deployed(served(echo_engine(), name=HOSTILE, card=card), accounts=accounts) as deployment:
            yield deployment


async def token(client: httpx.AsyncClient, path: str = "/login") -> str:
    """What the form at a path sends along."""
    found = _CSRF.search((await client.get(path)).text)
    assert found is not None
    return unescape(found[1])


async def log_in(
    client: httpx.AsyncClient, name: str = "admin", password: str = PASSWORD, **fields: str
) -> httpx.Response:
    """The answer to the form, filled in."""
    csrf = await token(client)
    return await client.post("/login", data={"name": name, "password": password, "csrf": csrf, **fields})
