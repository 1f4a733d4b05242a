"""Somebody in front of a browser."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]  # it has no types
from playwright.sync_api import ConsoleMessage, Locator, Page, expect

from tests.end_to_end.console import ADMIN_PASSWORD, ECHO

ARTEFACTS = Path(__file__).parents[2] / "artefacts" / "console"
"""Where screenshots are kept, for a person to look at."""

ANSWERED_MS = 20_000
"""Milliseconds that an answer may take."""

_STATUS = re.compile("Failed to load resource: the server responded with a status of 4[0-9][0-9]")


class Visitor:
    """A window, who looks at it, and what the browser complained of meanwhile."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.faults: list[str] = []
        """Scripts that failed, and what a page's policy did not allow."""
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.faults.append(f"{page.url}: {error}"))

    def _heard(self, message: ConsoleMessage) -> None:
        # A refusal is what some tests are about; the browser tells of it as of everything else.
        if message.type in {"error", "warning"} and not _STATUS.match(message.text):
            self.faults.append(f"{self.page.url}: {message.text}")

    # ---- logging in ----------------------------------------------------------------------------------

    def log_in(self, name: str = "admin", password: str = ADMIN_PASSWORD) -> None:
        """Go through the form, and arrive at the first page."""
        self.page.goto("/")
        expect(self.page).to_have_url(re.compile(r"/login\?next=/$"))
        self.page.get_by_label("Account").fill(name)
        self.page.get_by_label("Password", exact=True).fill(password)
        self.page.get_by_role("button", name="Log in").click()
        expect(self.page).to_have_url(re.compile("/reference$"))

    # ---- keys ----------------------------------------------------------------------------------------

    def create_key(self, name: str) -> str:
        """Make a key, and copy it down."""
        self.page.goto("/keys")
        self.page.get_by_role("button", name="Create a key").click()
        self.page.get_by_label("Name").fill(name)
        self.page.get_by_role("button", name="Create", exact=True).click()
        secret = self.take_down("Your new key")
        expect(self.row(name)).to_contain_text("in use")
        return secret

    def take_down(self, title: str) -> str:
        """What the dialog of this title shows once, and close it."""
        dialog = self.page.get_by_role("dialog", name=title)
        secret = dialog.locator("#secret").inner_text()
        dialog.get_by_role("button", name="I have it").click()
        expect(self.page.locator("#secret")).to_be_empty()
        return secret

    def revoke_key(self, name: str) -> None:
        """Revoke a key, and say that it is meant."""
        self.page.goto("/keys")
        self.page.get_by_role("button", name=f"Revoke {name}").click()
        self.page.get_by_role("button", name="Revoke", exact=True).click()
        expect(self.row(name)).to_have_count(0)

    # ---- Try It! -------------------------------------------------------------------------------------

    def fill_in(self, words: str, model: str = ECHO, key: str = "") -> None:
        """Fill in the reference's form: one message to a model, streamed; with a key, or as who is logged
        in."""
        self.page.goto("/reference")
        self.field("model").locator("select").select_option(model)
        self.field("messages").get_by_label("Content", exact=True).fill(words)
        self.page.get_by_label("Authorization: Bearer").fill(key)

    def try_it(self) -> Locator:
        """Send the request that is filled in; the answer's text, once it has ended."""
        self.page.get_by_role("button", name="Try It!").click()
        expect(self.page.locator("#figures")).to_be_visible(timeout=ANSWERED_MS)
        expect(self.page.locator("#stop")).to_be_disabled(timeout=ANSWERED_MS)
        return self.page.locator("#view-text")

    def field(self, parameter: str) -> Locator:
        """The reference's field for a parameter."""
        return self.page.locator(f'[data-parameter="{parameter}"]')

    def figure(self, name: str) -> str:
        """One of the figures of an answer: status, first, speed, total or tokens."""
        return self.page.locator(f"#figure-{name}").inner_text()

    # ---- what can be seen ----------------------------------------------------------------------------

    def row(self, text: str) -> Locator:
        """The rows of the page's list that have this text."""
        return self.page.locator("#rows tr").filter(has_text=text)

    def picture(self, name: str) -> None:
        """Keep how the page looks."""
        ARTEFACTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=ARTEFACTS / f"{name}.png", full_page=True)

    def barriers(self) -> list[Any]:
        """What keeps people out, of the page as it is: axe-core's serious and critical findings."""
        found = Axe().run(self.page).response["violations"]
        return [
            (one["id"], [node["html"] for node in one["nodes"]])
            for one in found
            if one["impact"] in {"serious", "critical"}
        ]

    def overflows(self) -> bool:
        """Whether the page is wider than its window."""
        return bool(self.page.evaluate("document.documentElement.scrollWidth > innerWidth"))
