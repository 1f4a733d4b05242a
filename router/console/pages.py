"""The console's pages: who may see them, and what each is made of. What they show of accounts and requests
their scripts ask of /api.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, get_args
from urllib.parse import quote

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from router.accounts.accounts import Accounts
from router.accounts.answers import key_limits
from router.accounts.people import LEAST_PASSWORD, LONGEST_PASSWORD
from router.accounts.schema import INTERRUPTED, OPEN
from router.accounts.sessions import Session
from router.accounts.store import StoreDown
from router.catalog import Catalog
from router.console.assets import MEDIA_TYPES, Assets
from router.console.families import family
from router.console.fields import Form, forms
from router.console.login import Login
from router.docs import Documentation
from router.errors import ApiError, StoreUnavailable, UnknownPath
from router.metrics import Outcome

_HERE = Path(__file__).parent

Context = Mapping[str, Any]
Show = Callable[[Request, Session], Awaitable[Response]]
Endpoint = Callable[[Request], Awaitable[Response]]

PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self';"
    " img-src 'self' data:; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
"""A page may load and call what is of this server, and nobody keeps it or puts it into a frame."""

ASSET_HEADERS = {
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
}

FOREVER = "public, max-age=31536000, immutable"

SIDE = ("temperature", "top_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
"""Parameters that the playground has at its side, beside max_tokens, seed and stop."""


class Place(NamedTuple):
    """A page that the navigation leads to."""

    path: str
    name: str
    for_admins: bool = False


PLACES = (
    Place("/reference", "API reference"),
    Place("/playground", "Playground"),
    Place("/requests", "Requests"),
    Place("/usage", "Usage"),
    Place("/models", "Models"),
    Place("/keys", "Keys"),
    Place("/people", "People", for_admins=True),
    Place("/account", "Account"),
)


def add_console(api: FastAPI, accounts: Accounts, catalog: Catalog, documentation: Documentation) -> None:
    """Add the console's pages to the router's routes."""
    console = Console(accounts, catalog, documentation)
    api.router.routes.extend(console.routes())


class Console:
    """The pages of one router."""

    def __init__(self, accounts: Accounts, catalog: Catalog, documentation: Documentation) -> None:
        self._accounts = accounts
        self._catalog = catalog
        self._documentation = documentation
        self._assets = Assets(_HERE / "static")
        self._login = Login(accounts, self.render)
        self._forms: dict[str, Form] = {}

    def routes(self) -> list[Route]:
        """All of them, by path."""
        pages: dict[str, Show] = {
            "/": self._home,
            "/reference": self._chat_reference,
            "/reference/completions": self._text_reference,
            "/playground": self._playground,
            "/requests": self._requests,
            "/requests/{id}": self._request,
            "/usage": self._usage,
            "/models": self._models,
            "/keys": self._keys,
            "/account": self._account,
            "/people": self._people,
        }
        return [
            *(Route(path, self._with_session(show), methods=["GET"]) for path, show in pages.items()),
            Route("/login", self._guarded(self._login.form), methods=["GET"]),
            Route("/login", self._guarded(self._login.enter), methods=["POST"]),
            Route("/logout", self._guarded(self._login.leave), methods=["POST"]),
            Route("/static/{version}/{name}", self._asset, methods=["GET"]),
        ]

    async def render(self, template: str, *, status: int = 200, **context: Any) -> Response:
        """A page, made in a thread: the loop has tokens to pass on."""
        html = await asyncio.to_thread(self._html, template, context)
        return Response(html, status, PAGE_HEADERS, "text/html")

    # ---- who sees what -------------------------------------------------------------------------------

    def _with_session(self, show: Show) -> Endpoint:
        """The page, for those who have logged in; all others are led there first."""

        async def page(request: Request) -> Response:
            session = await self._accounts.callers.session(request.scope["headers"])
            if session is not None:
                return await show(request, session)
            asked = request.url.path + (f"?{request.url.query}" if request.url.query else "")
            return RedirectResponse(f"/login?next={quote(asked, safe='/')}", 303, PAGE_HEADERS)

        return self._guarded(page)

    def _guarded(self, page: Endpoint) -> Endpoint:
        """The page; where it cannot be had, another that says why."""

        async def guarded(request: Request) -> Response:
            try:
                return await page(request)
            except StoreDown:
                return await self._failed(StoreUnavailable())
            except ApiError as error:
                return await self._failed(error)

        return guarded

    async def _failed(self, error: ApiError) -> Response:
        response = await self.render(
            "error.html",
            status=error.status,
            layout="bare.html",
            title="Not now" if error.status >= 500 else "That did not work",
            message=error.message,
        )
        response.headers.update(error.headers)
        return response

    async def _page(self, template: str, session: Session, title: str, path: str, **context: Any) -> Response:
        """A page with the navigation around it. `path` is where it stands there."""
        admin = session.account.role == "admin"
        places = [place for place in PLACES if admin or not place.for_admins]
        return await self.render(
            template, session=session, admin=admin, places=places, title=title, here=path, **context
        )

    # ---- the pages -----------------------------------------------------------------------------------

    async def _home(self, _: Request, __: Session) -> Response:
        return RedirectResponse("/reference", 303, PAGE_HEADERS)

    async def _chat_reference(self, _: Request, session: Session) -> Response:
        return await self._reference(session, "/v1/chat/completions")

    async def _text_reference(self, _: Request, session: Session) -> Response:
        return await self._reference(session, "/v1/completions")

    async def _reference(self, session: Session, path: str) -> Response:
        every = await self._all_forms()
        form = every[path]
        return await self._page(
            "reference.html", session, form.summary, "/reference", form=form, every=list(every.values())
        )

    async def _playground(self, _: Request, session: Session) -> Response:
        parameters = {one.path: one for one in (await self._all_forms())["/v1/chat/completions"].parameters}
        return await self._page(
            "playground.html",
            session,
            "Playground",
            "/playground",
            models=[model.settings.name for model in self._catalog.models if model.settings.card.is_chat],
            parameters=parameters,
            side=SIDE,
        )

    async def _requests(self, _: Request, session: Session) -> Response:
        return await self._page(
            "requests.html",
            session,
            "Recent requests",
            "/requests",
            models=self._names(),
            outcomes=[*get_args(Outcome), OPEN, INTERRUPTED],
        )

    async def _request(self, request: Request, session: Session) -> Response:
        identifier = request.path_params["id"]
        return await self._page("request.html", session, "Request", "/requests", identifier=identifier)

    async def _usage(self, _: Request, session: Session) -> Response:
        return await self._page("usage.html", session, "Usage", "/usage", models=self._names())

    async def _models(self, _: Request, session: Session) -> Response:
        cards = []
        for model in self._catalog.models:
            card = self._catalog.entry(model.settings.name)
            aliases = model.settings.aliases
            words = {"aliases": aliases, "family": family(card.id, *aliases)}
            cards.append({"card": card, "price": model.settings.price, **words})
        return await self._page("models.html", session, "Models", "/models", cards=cards)

    async def _keys(self, _: Request, session: Session) -> Response:
        bounds = key_limits(session.account.limits)
        return await self._page("keys.html", session, "Keys", "/keys", models=self._names(), bounds=bounds)

    async def _account(self, _: Request, session: Session) -> Response:
        bounds = key_limits(session.account.limits)
        return await self._page("account.html", session, "Account", "/account", bounds=bounds)

    async def _people(self, _: Request, session: Session) -> Response:
        if session.account.role != "admin":
            why = "only an administrator may see who else has an account"
            return await self._page(
                "error.html", session, "Not yours", "", status=403, layout="shell.html", message=why
            )
        return await self._page("people.html", session, "People", "/people", models=self._names())

    async def _asset(self, request: Request) -> Response:
        files = await asyncio.to_thread(lambda: self._assets.files)
        version, name = request.path_params["version"], request.path_params["name"]
        if name not in files:
            raise UnknownPath(request.url.path)
        # While a deployment is upgraded, another version's page may ask here. It gets what there is.
        kept = FOREVER if version == self._assets.version else "no-store"
        media_type = MEDIA_TYPES[Path(name).suffix]
        return Response(files[name], 200, ASSET_HEADERS | {"cache-control": kept}, media_type)

    # ---- what they are made of -----------------------------------------------------------------------

    def _names(self) -> list[str]:
        """The models' own names: the ledger and keys know aliases by them."""
        return [model.settings.name for model in self._catalog.models]

    async def _all_forms(self) -> dict[str, Form]:
        if not self._forms:
            document = await self._documentation.openapi()
            self._forms = await asyncio.to_thread(lambda: forms(json.loads(document)))
        return self._forms

    def _html(self, template: str, context: Context) -> str:
        return str(self._templates.get_template(template).render(context))

    @cached_property
    def _templates(self) -> Any:
        # A router whose console nobody opens does not hold the memory.
        from jinja2 import Environment, FileSystemLoader, StrictUndefined  # noqa: PLC0415

        templates = Environment(
            loader=FileSystemLoader(_HERE / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        templates.globals["asset"] = self._assets.url
        templates.globals["password_length"] = (LEAST_PASSWORD, LONGEST_PASSWORD)
        templates.tests["web"] = _is_web
        templates.filters["dollars"] = _dollars
        return templates


def _dollars(price: Decimal) -> str:
    """At least cents: `$0.10`."""
    return f"${price:.2f}" if price == round(price, 2) else f"${price.normalize():f}"


def _is_web(url: str | None) -> bool:
    """Whether a link to it leads to a page."""
    return url is not None and url.startswith(("https://", "http://"))
