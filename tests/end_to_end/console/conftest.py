from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.end_to_end.console import ADMIN_KEY, ADMIN_PASSWORD, ECHO, SLOW
from tests.end_to_end.console.visitor import Visitor
from tests.end_to_end.server import Server, serving

Visit = Callable[..., Visitor]
"""Opens a window: its width, its colour scheme, whether somebody has logged in there, and where it is."""

CONFIG: dict[str, Any] = {
    "accounts": {"enabled": True, "record_text": True, "trusted_proxies": ["127.0.0.1"]},
    "models": [
        {
            "name": ECHO,
            "aliases": ["Org/Echo-7B:free"],
            "engine": "echo",
            "engine_args": {"tokens_per_second": 60},
            "price": {"prompt": 0.15, "completion": 0.6},
            "card": {"description": "Says again what was said.", "license_name": "Apache-2.0"},
        },
        {
            "name": SLOW,
            "engine": "echo",
            "engine_args": {"tokens_per_second": 20},
            "price": {"prompt": 1, "completion": 2.5},
        },
    ],
}


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A router with accounts, and two models that repeat."""
    environment = {"TRUNKLINE_ADMIN_PASSWORD": ADMIN_PASSWORD, "TRUNKLINE_ADMIN_KEY": ADMIN_KEY}
    with serving(CONFIG, tmp_path_factory.mktemp("console"), environment) as server:
        yield server


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """The Chromium that the system has."""
    with sync_playwright() as playwright:
        # Root, which containers run as, has no sandbox.
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(server: Server, browser: Browser) -> Iterator[Visit]:
    """Opens windows. After the test none of them may have complained of anything."""
    visitors: list[Visitor] = []

    def visit(
        width: int = 1280, scheme: Any = "light", *, logged_in: bool = True, address: str = "192.0.2.1"
    ) -> Visitor:
        context = browser.new_context(
            base_url=server.url,
            viewport={"width": width, "height": 900},
            color_scheme=scheme,
            timezone_id="America/St_Johns",
            extra_http_headers={"x-forwarded-for": address},
        )
        visitor = Visitor(context.new_page())
        visitors.append(visitor)
        if logged_in:
            visitor.log_in()
        return visitor

    yield visit
    for visitor in visitors:
        visitor.page.context.close()
    assert [fault for visitor in visitors for fault in visitor.faults] == []
