from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest_asyncio

from tests.harness import Deployment
from tests.router.console.opened import console, log_in


@pytest_asyncio.fixture
async def deployment(tmp_path: Path) -> AsyncIterator[Deployment]:
    """A deployment with a console."""
    async with console(tmp_path) as one:
        yield one


@pytest_asyncio.fixture
async def client(deployment: Deployment) -> AsyncIterator[httpx.AsyncClient]:
    """A browser in which nobody has logged in."""
    async with httpx.AsyncClient(base_url=deployment.url, trust_env=False, timeout=30) as client:
        yield client


@pytest_asyncio.fixture
async def admin(client: httpx.AsyncClient) -> httpx.AsyncClient:
    """The same after the admin has."""
    assert (await log_in(client)).status_code == 303
    return client
