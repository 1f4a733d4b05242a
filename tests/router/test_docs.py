"""The page at /docs, as a browser that knows no other host would have it."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import AsyncIterator
from hashlib import sha256
from html.parser import HTMLParser
from typing import Any
from urllib.parse import urljoin

import httpx
import pytest_asyncio

from router.docs import Documentation
from router.settings import HostedModel
from tests.harness import Deployment, deployed, echo_engine, served

LINKS = {"href", "src", "srcset", "action", "data", "poster", "formaction", "manifest"}
"""Attributes that name something to load or to go to."""


class Page(HTMLParser):
    """What a page is made of."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.links: set[str] = set()
        self.ids: list[str] = []
        self.text: dict[str, str] = {}
        """By the tag that it stands in."""
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._open.append(tag)
        for name, value in attrs:
            self.attributes.add(name)
            if name in LINKS:
                self.links.add(value or "")
            elif name == "id":
                self.ids.append(value or "")

    def handle_data(self, data: str) -> None:
        tag = self._open[-1] if self._open else ""
        self.text[tag] = self.text.get(tag, "") + data

    def handle_endtag(self, tag: str) -> None:
        while self._open.pop() != tag:
            pass


@pytest_asyncio.fixture
async def deployment() -> AsyncIterator[Deployment]:
    """A model whose name a page must not take for its own."""
    async with deployed(served(echo_engine(), name="<script>alert(1)</script>")) as one:
        yield one


@pytest_asyncio.fixture
async def response(deployment: Deployment) -> httpx.Response:
    """The page as it comes."""
    return await deployment.http.get("/docs")


async def test_the_page_needs_nothing_else(deployment: Deployment, response: httpx.Response) -> None:
    """It runs no script, names no other host, and whatever it refers to is there."""
    page = Page(response.text)
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert not page.tags & {"script", "iframe", "object", "embed", "base", "form"}
    assert not {name for name in page.attributes if name.startswith("on") or name == "style"}
    assert len(page.ids) == len(set(page.ids))
    for link in page.links:
        if link.startswith("#"):
            assert link[1:] in page.ids
        elif link != "data:,":
            target = httpx.URL(urljoin(str(response.url), link))
            assert target.netloc == response.url.netloc
            assert (await deployment.http.get(target)).status_code == 200
    assert "url(" not in page.text["style"]
    assert "@import" not in page.text["style"]


async def test_the_page_may_do_nothing_else(response: httpx.Response) -> None:
    """Its policy allows the style that is in it, and nothing that is not."""
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    style = Page(response.text).text["style"]
    digest = b64encode(sha256(style.encode()).digest()).decode()
    assert policy == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": f"'sha256-{digest}'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }


async def test_the_page_has_all_that_the_document_has(
    deployment: Deployment, response: httpx.Response
) -> None:
    """Every path, parameter, description and error of the document can be read on it."""
    page = Page(response.text)
    has_all_of(page, (await deployment.http.get("/openapi.json")).json())
    assert "<script>alert(1)</script>" in page.text["code"]


async def test_the_page_has_the_accounts_too() -> None:
    """Where there are accounts, so can every path, parameter and field of theirs."""
    documentation = Documentation([HostedModel(name="echo", application="echo")], accounts=True)
    page = Page((await documentation.page()).decode())
    document = json.loads(await documentation.openapi())
    assert len(page.ids) == len(set(page.ids))
    has_all_of(page, document)
    assert all(tag["name"] in page.text["h2"] for tag in document["tags"])
    for name in ("NewKey", "KeyChange", "NewAccount", "LoggedRequest", "UsageSum"):
        for field in document["components"]["schemas"][name]["properties"]:
            assert field in page.text["code"]


def has_all_of(page: Page, document: dict[str, Any]) -> None:
    """Fails if a document has something that cannot be read on a page."""
    text = " ".join(" ".join(page.text.values()).split())
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert path in page.text["code"]
            assert operation["operationId"] in page.ids
    for name in ("ChatRequest", "TextRequest"):
        for parameter, schema in document["components"]["schemas"][name]["properties"].items():
            assert parameter in page.text["code"]
            assert schema["description"] in text
    for response_name, of_status in document["components"]["responses"].items():
        assert response_name in page.ids
        for example in of_status["content"]["application/json"]["examples"].values():
            assert example["summary"] in text
