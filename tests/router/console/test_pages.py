"""The console's pages: who may see them, and what a browser may do with them."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest

from router.accounts.settings import MONEY_PLACES, Limits
from router.console.assets import Assets
from router.console.families import FAMILIES, GENERAL, family
from router.console.pages import PLACES
from tests.router.accounts.gated import as_admin
from tests.router.console.opened import HOSTILE, PAGES, log_in

STATIC = Path(__file__).parents[3] / "router" / "console" / "static"

POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' data:",
    "connect-src": "'self'",
    "form-action": "'self'",
    "base-uri": "'none'",
    "frame-ancestors": "'none'",
}


class Page(HTMLParser):
    """What a page is made of."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.labels: set[str] = set()
        self.text = ""
        self._open: list[str] = []
        self.scripts: list[str] = []
        """What stands in scripts."""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open:
            self.scripts.append(data.strip())
        self.text += data

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        """The attributes of each element of these kinds."""
        return [attributes for tag, attributes in self.elements if tag in tags]


async def every_page(admin: httpx.AsyncClient) -> list[httpx.Response]:
    """Each page as who is logged in has it, and the form to log in."""
    responses = [await admin.get(path) for path in PAGES]
    responses.append(await admin.get("/login", headers={"cookie": ""}))
    assert [one.status_code for one in responses] == [200] * len(responses)
    return responses


# ---- who --------------------------------------------------------------------------------------------


async def test_no_page_without_a_session(client: httpx.AsyncClient) -> None:
    """Who has not logged in is led to the form, and from there back."""
    for path in ("/", *PAGES):
        response = await client.get(f"{path}?a=b%20c")
        assert response.status_code == 303, path
        assert response.headers["location"] == f"/login?next={quote(f'{path}?a=b%20c', safe='/')}"
        assert response.content == b""
        assert (await client.post(path)).status_code == 405


async def test_every_place_of_the_navigation_is_there(admin: httpx.AsyncClient) -> None:
    """The navigation leads to pages that exist, and each says that it is where one is."""
    for place in PLACES:
        page = Page((await admin.get(place.path)).text)
        links = page.all("a")
        assert {one.get("href") for one in links} >= {other.path for other in PLACES}
        assert place.path in {one.get("href") for one in links if one.get("aria-current") == "page"}
    assert (await admin.get("/")).headers["location"] == "/reference"


async def test_members_see_nothing_of_other_people(client: httpx.AsyncClient) -> None:
    """The page of people is for admins: others are told so, and not led there."""
    ada = {"name": "ada", "password": "a password of hers"}
    assert (await client.post("/api/accounts", json=ada, headers=as_admin())).status_code == 201
    assert (await log_in(client, "ada", "a password of hers")).status_code == 303
    response = await client.get("/people")
    assert response.status_code == 403
    assert "Only an administrator" in response.text
    for path in ("/reference", "/requests", "/usage", "/keys"):
        page = Page((await client.get(path)).text)
        assert "/people" not in {one.get("href") for one in page.all("a")}
        assert not [one for one in page.all("select") if "account" in (one.get("id") or "")]


async def test_each_page_has_the_limits_that_it_is_about(client: httpx.AsyncClient) -> None:
    """An admin can say what all keys of an account may use together, over all and of each model; its holder
    is told of it, and cannot say it."""
    limits = {"overall": {"dollars_per_month": "0.000000001"}, "models": {HOSTILE: {"tokens_per_minute": 5}}}
    ada = {"name": "ada", "password": "a password of hers", "limits": limits}
    assert (await client.post("/api/accounts", json=ada, headers=as_admin())).status_code == 201
    assert (await log_in(client, "ada", "a password of hers")).status_code == 303
    for path in ("/keys", "/account"):
        page = Page((await client.get(path)).text)
        (shown,) = [one["data-limits"] for one in page.all("p") if one.get("id") == "together"]
        bounds = json.loads(shown or "")
        assert bounds["overall"]["dollars_per_month"] == "0.000000001"
        assert bounds["models"][HOSTILE]["tokens_per_minute"] == 5
        assert not [one for one in page.all("input") if "data-limit" in one]
    client.cookies.clear()
    assert (await log_in(client)).status_code == 303
    for path in ("/keys", "/people"):
        page = Page((await client.get(path)).text)
        fields = [one["data-limit"] for one in page.all("input") if "data-limit" in one]
        assert fields == [*Limits.model_fields] * 2  # of all requests, and of a model
        assert "limit-model" in {one.get("id") for one in page.all("select")}
        assert "limits-template" in {one.get("id") for one in page.all("template")}


async def test_money_may_be_as_little_as_there_is(admin: httpx.AsyncClient) -> None:
    """Fields of dollars take as many decimals as the API does."""
    for path in ("/keys", "/people"):
        fields = Page((await admin.get(path)).text).all("input")
        patterns = {one["pattern"] for one in fields if one.get("data-limit") == "dollars_per_month"}
        (pattern,) = patterns
        assert re.fullmatch(pattern or "", "25." + "1" * MONEY_PLACES)
        assert not re.fullmatch(pattern or "", "25." + "1" * (MONEY_PLACES + 1))


# ---- what a browser may do --------------------------------------------------------------------------


async def test_a_page_runs_nothing_but_our_files(admin: httpx.AsyncClient) -> None:
    """A page's policy lets in what comes from this server and nothing else, and the page needs nothing else:
    no script, style or handler stands in it."""
    for response in await every_page(admin):
        _is_closed(response)
        for one in Page(response.text).all("script", "link", "img"):
            address = one.get("src") or one.get("href")
            assert address is not None
            assert (await admin.get(address)).status_code == 200


def _is_closed(response: httpx.Response) -> None:
    policy = response.headers["content-security-policy"].split("; ")
    assert dict(part.split(" ", 1) for part in policy) == POLICY
    assert response.headers["referrer-policy"] == "no-referrer"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-store"
    page = Page(response.text)
    assert not any(page.scripts)
    assert page.all("style", "iframe", "object", "embed", "base") == []
    for tag, attributes in page.elements:
        assert "style" not in attributes, tag
        assert not [name for name in attributes if name.startswith("on")], tag


async def test_names_are_text(admin: httpx.AsyncClient) -> None:
    """A model's name is text wherever it stands, and an address of its card is a link only where it leads to
    a page."""
    for response in await every_page(admin):
        page = Page(response.text)
        assert "alert(1)" not in "".join(page.scripts)
        assert not [one for one in page.all("a") if (one.get("href") or "").startswith("javascript:")]
    models = Page((await admin.get("/models")).text)
    assert HOSTILE in models.text
    assert "https://example.org/guide" in {one.get("href") for one in models.all("a")}


async def test_every_field_has_a_name(admin: httpx.AsyncClient) -> None:
    """Whatever can be filled in has a label, what describes it is there, and no two elements have one id."""
    for response in await every_page(admin):
        _is_labelled(response.text)


def _is_labelled(html: str) -> None:
    page = Page(html)
    ids = [one["id"] for _, one in page.elements if one.get("id")]
    assert len(ids) == len(set(ids))
    labelled = {one.get("for") for one in page.all("label")}
    wrapped = re.findall(r"<label[^>]*>(?:(?!</label>).)*<(?:input|select|textarea)", html, re.DOTALL)
    bare = [
        one
        for one in page.all("input", "select", "textarea")
        if one.get("type") != "hidden"
        and one.get("id") not in labelled
        and not {"aria-label", "aria-hidden"} & one.keys()
    ]
    assert len(bare) <= len(wrapped)
    for one in page.all("input", "select", "textarea", "p", "div", "form"):
        for described in (one.get("aria-describedby") or "").split():
            assert described in ids


# ---- files ------------------------------------------------------------------------------------------


async def test_files_are_kept_for_as_long_as_they_are_the_same(client: httpx.AsyncClient) -> None:
    """A file's address has its version in it: a browser keeps it for ever. Under another version it gets the
    file that there is, and does not keep it."""
    assets = Assets(STATIC)
    for name, data in assets.files.items():
        response = await client.get(assets.url(name))
        assert response.content == data
        assert "immutable" in response.headers["cache-control"]
        assert response.headers["x-content-type-options"] == "nosniff"
    other = await client.get("/static/0123456789abcdef/base.css")
    assert other.status_code == 200
    assert other.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("name", ["nothing.js", "..%2fpages.py", "%2e%2e/pages.py", "../pages.py"])
async def test_no_other_file_is_served(client: httpx.AsyncClient, name: str) -> None:
    """Nothing but the files themselves can be had there."""
    response = await client.get(f"/static/0123456789abcdef/{name}")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "unknown_url"


def test_versions_change_with_the_files(tmp_path: Path) -> None:
    """Another content, or another name, is another version."""
    versions = set()
    for name, text in [("a.css", "x"), ("a.css", "y"), ("b.css", "y")]:
        for path in tmp_path.iterdir():
            path.unlink()
        (tmp_path / name).write_text(text)
        versions.add(Assets(tmp_path).version)
    assert len(versions) == 3


def test_scripts_make_no_markup() -> None:
    """No script turns text into markup or code, or reaches for another host; each module that one imports is
    there."""
    for path in STATIC.glob("*.js"):
        script = path.read_text()
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("):
            assert word not in script, path.name
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", script), path.name
        for imported in re.findall(r'from "([^"]+)"', script):
            if imported.startswith("./"):
                assert (STATIC / imported).exists(), path.name


# ---- families ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smollm2-135m-instruct", "SmolLM"),
        ("meta-llama/Llama-3.1-70B-Instruct", "Llama"),
        ("codellama/codellama-13b-instruct", "Code Llama"),
        ("mistralai/Mixtral-8x7B", "Mixtral and Mistral"),
        ("Qwen/Qwen3-8B", "Qwen"),
        ("google/gemma-3-4b-it", "Gemma"),
        ("gpt-4o", "GPT"),
        ("o3-mini", "GPT"),
        ("echo", "Echo"),
        ("graphite", GENERAL),
    ],
)
def test_families_are_told_by_their_names(name: str, expected: str) -> None:
    """A model belongs to the family that its name tells, or to none."""
    assert family(name) == expected


def test_every_family_has_guidelines() -> None:
    """The template has something to say of each family."""
    template = (STATIC.parent / "templates" / "guidelines.html").read_text()
    assert set(re.findall(r'family == "([^"]+)"', template)) == set(FAMILIES)
