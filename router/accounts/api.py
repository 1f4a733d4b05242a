"""The routes at /api: accounts, keys, and what was used. A member sees and changes what is its own account's,
an admin everything; of what is another's a member is told that there is none.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response, StreamingResponse

from router.accounts import answers, bodies
from router.accounts.accounts import Accounts
from router.accounts.bodies import Chosen, ExportQuery, KeyChange, NewKey, NewKeyLimits, Whose, read
from router.accounts.callers import Caller
from router.accounts.export import FORMATS
from router.accounts.keys import UNSET, Key
from router.accounts.limits import KeyLimits
from router.accounts.passwords import make_password
from router.accounts.people import Account
from router.accounts.store import StoreDown
from router.accounts.usage import Filter, Record
from router.catalog import Catalog
from router.errors import (
    BodyTooLarge,
    Forbidden,
    InvalidRequest,
    MalformedRequest,
    ModelNotFound,
    NotFound,
    RequestTimeout,
    StoreUnavailable,
    UnsupportedMediaType,
)
from router.protocol import read_json
from router.refusals import wrong

BODY_BYTES = 256 * 1024
"""Bytes of a body."""

BODY_S = 30.0
"""Seconds for a body to arrive."""

PRIVATE = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
"""Nobody on the way keeps an answer, and no browser takes it for a page."""

_ID = re.compile(r"[0-9a-f]{32}")

B = TypeVar("B", bound=BaseModel)
W = TypeVar("W", bound=Whose)


class Parts(NamedTuple):
    """What the routes ask."""

    accounts: Accounts
    catalog: Catalog


def add_api(api: FastAPI, accounts: Accounts, catalog: Catalog) -> None:
    """Add the routes to the router's own."""
    accounts.usage.names_of = partial(_names_of, catalog)
    parts = Parts(accounts, catalog)
    _add_people(api, parts)
    _add_keys(api, parts)
    _add_requests(api, parts)
    api.add_exception_handler(StoreDown, _store_down)


# ---- accounts -----------------------------------------------------------------------------------------


def _add_people(api: FastAPI, parts: Parts) -> None:
    people = parts.accounts.people

    @api.get("/api/me")
    async def me(request: Request) -> Response:
        caller = await _caller(parts, request)
        found: dict[str, Any] = {"account": answers.account(caller.account)}
        return _json(found if caller.csrf is None else found | {"csrf": caller.csrf})

    @api.post("/api/me/password")
    async def change_password(request: Request) -> Response:
        caller = await _caller(parts, request)
        body = await _body(bodies.PasswordChange, request)
        client = parts.accounts.client(request)
        await people.change_password(caller.account, body.old, body.new, client)
        return _json({"account": answers.account(caller.account)})

    @api.get("/api/accounts")
    async def accounts(request: Request) -> Response:
        await _admin(parts, request)
        return _json({"data": [answers.account(one) for one in await people.everyone()]})

    @api.post("/api/accounts")
    async def create_account(request: Request) -> Response:
        await _admin(parts, request)
        body = await _body(bodies.NewAccount, request)
        made_up = make_password() if body.password is None else None
        limits = _limits(parts.catalog, body.limits)
        created = await people.create(body.name, body.role, body.password or made_up or "", limits)
        shown = {} if made_up is None else {"password": made_up}
        return _json(answers.account(created) | shown, 201)

    @api.patch("/api/accounts/{account_id}")
    async def change_account(account_id: str, request: Request) -> Response:
        caller = await _admin(parts, request)
        body = await _body(bodies.AccountChange, request)
        found = await people.get(_id("account", account_id))
        if found.id == caller.account.id:
            _refuse_to_give_up(body)
        changed = await _change_account(parts, found, body)
        await _known(parts)
        return _json(answers.account(changed))


async def _change_account(parts: Parts, account: Account, change: bodies.AccountChange) -> Account:
    """The account as it is then. Raises InvalidRequest before anything has changed."""
    people = parts.accounts.people
    limits = _limits(parts.catalog, change.limits)
    if change.password is not None:
        await people.set_password(account.id, change.password)
    if change.role is not None:
        account = await people.set_role(account.id, change.role)
    if change.disabled is not None:
        account = await people.set_disabled(account.id, disabled=change.disabled)
    if "limits" in change.model_fields_set:
        account = await people.set_limits(account.id, limits)
    return account


def _refuse_to_give_up(change: bodies.AccountChange) -> None:
    """So that there is always an admin."""
    if change.disabled:
        raise InvalidRequest("disabled: nobody can disable their own account", param="disabled")
    if change.role == "member":
        raise InvalidRequest("role: no admin can become a member by its own will", param="role")


# ---- keys ---------------------------------------------------------------------------------------------


def _add_keys(api: FastAPI, parts: Parts) -> None:
    keys = parts.accounts.keys

    @api.get("/api/keys")
    async def list_keys(request: Request) -> Response:
        caller = await _caller(parts, request)
        return _json({"data": [answers.key(one) for one in await keys.list(_whose(caller, None))]})

    @api.post("/api/keys")
    async def create_key(request: Request) -> Response:
        caller = await _caller(parts, request)
        body = await _body(NewKey, request)
        _refuse_unless_admin(caller, body)
        holder = _whose(caller, body.account_id) or caller.account.id
        await parts.accounts.people.get(_id("account", holder))
        models, limits = _models(parts.catalog, body.models), _limits(parts.catalog, body.limits)
        created, secret = await keys.create(holder, body.name, models, limits)
        await _known(parts)
        return _json(answers.key(created) | {"key": secret}, 201)

    @api.patch("/api/keys/{key_id}")
    async def change_key(key_id: str, request: Request) -> Response:
        caller = await _caller(parts, request)
        body = await _body(KeyChange, request)
        found = await _own_key(parts, caller, key_id)
        _refuse_unless_admin(caller, body)
        given = body.model_fields_set
        changed = await keys.change(
            found.id,
            name=UNSET if body.name is None else body.name,
            models=_models(parts.catalog, body.models) if "models" in given else UNSET,
            limits=_limits(parts.catalog, body.limits) if "limits" in given else UNSET,
        )
        await _known(parts)
        return _json(answers.key(changed))

    @api.delete("/api/keys/{key_id}")
    async def revoke_key(key_id: str, request: Request) -> Response:
        caller = await _caller(parts, request)
        found = await _own_key(parts, caller, key_id)
        if found.kind == "console":
            raise InvalidRequest(
                "this key stands for the console, and cannot be revoked; its account can be disabled"
            )
        revoked = await keys.revoke(found.id)
        await _known(parts)
        return _json(answers.key(revoked))


async def _known(parts: Parts) -> None:
    """What has changed holds at once, at this router. The others learn of it by themselves, as this one does
    where the store is gone just now: to say so would hide that the change was made."""
    with suppress(StoreDown):
        await parts.accounts.ring.refresh()


async def _own_key(parts: Parts, caller: Caller, key_id: str) -> Key:
    """A key that the caller may change. Raises NotFound."""
    found = await parts.accounts.keys.get(_id("key", key_id))
    if caller.account.role != "admin" and found.account_id != caller.account.id:
        raise NotFound("key", key_id)
    return found


def _refuse_unless_admin(caller: Caller, body: KeyChange) -> None:
    """What a key may do is not for its holder to say. A new one is without bounds, also where its holder says
    so."""
    for field in ("models", "limits"):
        said = field in body.model_fields_set and not (
            isinstance(body, NewKey) and getattr(body, field) is None
        )
        if said and caller.account.role != "admin":
            raise Forbidden(f"{field}: only an admin may say what a key may do", param=field)


def _models(catalog: Catalog, names: Sequence[str] | None) -> list[str] | None:
    """Models as they are kept: each once, by its own name and not an alias. Raises InvalidRequest."""
    if names is None:
        return None
    return list(dict.fromkeys(_canonical(catalog, name, f"models[{n}]") for n, name in enumerate(names)))


def _limits(catalog: Catalog, given: NewKeyLimits | None) -> KeyLimits:
    """Limits as they are kept, of each model once. Raises InvalidRequest."""
    if given is None:
        return KeyLimits()
    canonical = {name: _canonical(catalog, name, f"limits.models.{name}") for name in given.models}
    for name, meant in canonical.items():
        if list(canonical.values()).count(meant) > 1:
            path = f"limits.models.{name}"
            raise InvalidRequest(f"{path}: the limits of {meant} are given more than once", param=path)
    return given.settings(canonical)


def _canonical(catalog: Catalog, name: str, path: str) -> str:
    try:
        return catalog.find(name)[1].settings.name
    except ModelNotFound:
        raise wrong(path, "one of the models that GET /v1/models lists", name) from None


# ---- what was used ------------------------------------------------------------------------------------


def _add_requests(api: FastAPI, parts: Parts) -> None:
    ledger = parts.accounts.usage

    @api.get("/api/requests")
    async def requests(request: Request) -> Response:
        caller = await _caller(parts, request)
        query = _query(bodies.RequestsQuery, request)
        page = await ledger.page(_filter(parts, caller, query), query.before, query.limit)
        after = page.next and f"{page.next.began_us}-{page.next.id}"
        return _json({"data": [answers.request(one) for one in page.records], "next": after})

    @api.get("/api/requests/{request_id}")
    async def one_request(request_id: str, request: Request) -> Response:
        caller = await _caller(parts, request)
        found = await ledger.get(_id("request", request_id), _whose(caller, None))
        texts = {"asked": found.asked, "answered": found.answered}
        return _json(answers.request(found.record) | texts)

    @api.get("/api/export")
    async def export(request: Request) -> Response:
        caller = await _caller(parts, request)
        query = _query(ExportQuery, request)
        # The first of them before anything is said, so that a refusal has its status.
        chunks = await _begun(ledger.chunks(_filter(parts, caller, query)))
        form = FORMATS[query.format]
        headers = PRIVATE | {"content-disposition": f'attachment; filename="{form.name}"'}
        return StreamingResponse(form.write(chunks), 200, headers, form.media_type)

    @api.get("/api/usage")
    async def usage(request: Request) -> Response:
        caller = await _caller(parts, request)
        query = _query(bodies.UsageQuery, request)
        sums = await ledger.sums(query.by, query.span, _filter(parts, caller, query))
        return _json({"data": [answers.usage_sum(one) for one in sums]})

    @api.get("/api/speed")
    async def speed(request: Request) -> Response:
        await _caller(parts, request)
        now = time.perf_counter()
        models = parts.catalog.models
        return _json(
            {"data": {one.settings.name: round(one.metrics.rate.per_second(now), 3) for one in models}}
        )


def _names_of(catalog: Catalog, name: str) -> Sequence[str]:
    try:
        settings = catalog.find(name)[1].settings
    except ModelNotFound:
        return (name,)
    return (settings.name, *settings.aliases)


async def _begun(chunks: AsyncIterator[list[Record]]) -> AsyncIterator[list[Record]]:
    """The same chunks, the first of them read already."""
    nothing: list[Record] = []
    first = await anext(chunks, nothing)

    async def all_of_them() -> AsyncIterator[list[Record]]:
        if first:
            yield first
        async for chunk in chunks:
            yield chunk

    return all_of_them()


def _filter(parts: Parts, caller: Caller, query: Chosen | bodies.UsageQuery) -> Filter:
    """What a query asks for, as far as the caller may see it."""
    model = query.model
    if model is not None:
        with suppress(ModelNotFound):  # there may have been requests for it before
            model, _ = parts.catalog.find(model)
    whose = {"account_id": _whose(caller, query.account_id), "model": model}
    return query.model_copy(update=whose).filter()


# ---- every route --------------------------------------------------------------------------------------


async def _caller(parts: Parts, request: Request) -> Caller:
    """Who sends a request. What a key with limits of its own is for is tokens: were it to change anything, it
    could make another one without. Raises ApiError."""
    caller = await parts.accounts.callers.caller(request.scope["headers"], request.method)
    key = caller.key
    restricted = key is not None and (key.models is not None or key.limits != KeyLimits())
    if restricted and request.method != "GET":
        raise Forbidden("a key that is bounded to models or by limits changes nothing here: use another one")
    return caller


async def _admin(parts: Parts, request: Request) -> Caller:
    """The same of an admin."""
    caller = await _caller(parts, request)
    if caller.account.role != "admin":
        raise Forbidden("only an admin may see and change accounts")
    return caller


def _whose(caller: Caller, account_id: str | None) -> str | None:
    """The account that is meant; None for an admin who names none. Raises NotFound."""
    if caller.account.role == "admin":
        return account_id
    if account_id not in {None, caller.account.id}:
        raise NotFound("account", str(account_id))
    return caller.account.id


def _id(kind: Literal["account", "key", "request"], identifier: str) -> str:
    """An id that the store can be asked for. Raises NotFound."""
    if not _ID.fullmatch(identifier):
        raise NotFound(kind, identifier)
    return identifier


async def _body(kind: type[B], request: Request) -> B:
    """What a request's body says. Raises ApiError."""
    content_type = request.headers.get("content-type")
    if (content_type or "").partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedMediaType(content_type)
    return read(kind, read_json(await _read(request)))


async def _read(request: Request) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                body += part
                if len(body) > BODY_BYTES:
                    raise BodyTooLarge(BODY_BYTES)
    except TimeoutError:
        raise RequestTimeout(BODY_S) from None
    except ClientDisconnect:
        raise MalformedRequest from None  # which nobody reads any more
    return bytes(body)


def _query(kind: type[W], request: Request) -> W:
    """What stands behind the question mark. Raises InvalidRequest."""
    given = request.query_params.multi_items()
    _refuse_twice(name for name, _ in given)
    return read(kind, dict(given))


def _refuse_twice(names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise InvalidRequest(f"{name} is given more than once", param=name)
        seen.add(name)


def _json(content: Any, status: int = 200) -> Response:
    return JSONResponse(content, status, PRIVATE)


async def _store_down(_: Request, __: Exception) -> Response:
    error = StoreUnavailable()
    return Response(error.body(), error.status, dict(error.headers), "application/json")
