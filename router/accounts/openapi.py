"""What the OpenAPI document says of /api, of who may call, and of what calls are counted."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from pydantic import BaseModel

from router import examples
from router.accounts import answers, bodies
from router.accounts.callers import CSRF
from router.accounts.keys import MOST_KEYS
from router.accounts.sessions import COOKIE
from router.examples import Json

TAGS = {
    "Accounts": "Who may log in and hold keys.",
    "Keys": "What clients send to say who they are.",
    "Usage": "What was asked, and what it took.",
}

SECURITY: Json = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "A key. The first start shows one; the console, POST /api/keys and `trunkline keys"
        " create` make others.",
    },
    "console": {
        "type": "apiKey",
        "in": "cookie",
        "name": COOKIE,
        "description": "What a browser has after a log-in to the console.",
    },
    "csrf": {
        "type": "apiKey",
        "in": "header",
        "name": CSRF.decode().title().replace("Csrf", "CSRF"),
        "description": "With the console's cookie, what GET /api/me says as csrf, for all but GET.",
    },
}

BY_KEY: list[Json] = [{"bearer": []}]
TO_LOOK: list[Json] = [*BY_KEY, {"console": []}]
TO_CHANGE: list[Json] = [*BY_KEY, {"console": [], "csrf": []}]
OPEN: list[Json] = []

HEADERS: Json = {
    "www-authenticate": {
        "description": "How to say who sends a request.",
        "schema": {"type": "string", "const": "Bearer"},
    },
    "x-should-retry": {
        "description": "There where the same request will not succeed later either.",
        "schema": {"type": "string", "const": "false"},
    },
}

_LIMITS = {
    "limit": ("How many {what} a minute has.", {"type": "integer"}),
    "remaining": ("How many {what} are left of it.", {"type": "integer"}),
    "reset": ("How long until all of them are there again, such as 1m30s.", {"type": "string"}),
}

RATE_HEADERS: Json = {
    f"x-ratelimit-{name}-{what}": {
        "description": f"{text.format(what=what)} Of the limit that is nearest; only where there is one.",
        "schema": schema,
    }
    for what in ("requests", "tokens")
    for name, (text, schema) in _LIMITS.items()
}
"""What answers of tokens say of the limits that they fall under."""

PARAMETERS: Json = {
    f"{kind}-id": {
        "name": "id",
        "in": "path",
        "required": True,
        "description": f"The {kind}'s own id.",
        "schema": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
        "example": "6f1d2c9ab4e84a0f9b1d0f5c3e7a8b21",
    }
    for kind in ("account", "key", "request")
}

# ---- examples -----------------------------------------------------------------------------------------

_NO_LIMITS: Json = {
    "requests_per_minute": None,
    "tokens_per_minute": None,
    "dollars_per_month": None,
    "concurrent_requests": None,
}

_ACCOUNT: Json = {
    "id": "0b9d5f3ae0a04c1d8f4f7d1e6c2b3a49",
    "name": "ada",
    "role": "member",
    "disabled": False,
    "limits": {"overall": _NO_LIMITS | {"dollars_per_month": "100"}, "models": {}},
    "created": "2026-11-30T09:41:00.123456Z",
}

_KEY: Json = {
    "id": "7c1c8f1de5a54f6cb0f3c2a9d4e5b617",
    "name": "nightly jobs",
    "account": "ada",
    "account_id": _ACCOUNT["id"],
    "kind": "api",
    "prefix": "tk-4fQz81Lm",
    "models": [examples.MODEL_NAME],
    "limits": {
        "overall": _NO_LIMITS | {"requests_per_minute": 60, "dollars_per_month": "25.5"},
        "models": {},
    },
    "created": "2026-11-30T09:41:00.123456Z",
    "revoked": None,
}

_REQUEST: Json = {
    "id": "6f1d2c9ab4e84a0f9b1d0f5c3e7a8b21",
    "request_id": "job-7.step-2",
    "began": "2026-11-30T09:41:00.123456Z",
    "account_id": _ACCOUNT["id"],
    "account": "ada",
    "key_id": _KEY["id"],
    "key": "nightly jobs",
    "path": "/v1/chat/completions",
    "model": examples.MODEL_NAME,
    "replica": "x3v9k2ab",
    "stream": True,
    "status": 200,
    "outcome": "completed",
    "error": "",
    "prompt_tokens": 37,
    "completion_tokens": 7,
    "price": "0.0000095",
    "first_ms": 34.2,
    "duration_ms": 127.9,
    "tokens_per_second": 54.73,
    "user_agent": "OpenAI/Python 3.1.0",
    "router": "b7a3d5f0c2e14f6c8a9b0d1e2f304152",
}

_SUM: Json = {
    "day": "2026-11-30",
    "model": examples.MODEL_NAME,
    "requests": 7,
    "prompt_tokens": 259,
    "completion_tokens": 49,
    "price": "0.0000665",
}

# ---- what there is ------------------------------------------------------------------------------------

Bodies = Mapping[str, tuple[str, Json]]
"""By name: what they show, and what they are."""


class Form(NamedTuple):
    """What an answer is made of."""

    answer: type[BaseModel] | None
    """None: a text."""
    example: Any


class Operation(NamedTuple):
    """A method of a path."""

    identifier: str
    tag: str
    summary: str
    description: str
    forms: dict[str, Form]
    """By media type."""
    refused: tuple[int, ...] = ()
    """Statuses of errors, beside those that any request to /api may meet."""
    status: int = 200
    body: type[BaseModel] | None = None
    bodies: Bodies = MappingProxyType({})
    parameters: tuple[str, ...] = ()
    query: type[BaseModel] | None = None


OF_ANY = (401, 403)
"""Statuses of errors that any request to /api may meet, beside those of any request at all."""

OF_A_BODY = (413, 415)


def _json(answer: type[BaseModel], example: Json) -> dict[str, Form]:
    return {"application/json": Form(answer, example)}


OPERATIONS: dict[str, dict[str, Operation]] = {
    "/api/me": {
        "get": Operation(
            "me",
            "Accounts",
            "Who is asking",
            "The account that the key or the log-in belongs to.",
            _json(answers.Me, {"account": _ACCOUNT}),
        )
    },
    "/api/me/password": {
        "post": Operation(
            "changePassword",
            "Accounts",
            "Change the own password",
            "All log-ins of the account end. After several wrong ones the next attempt has to wait.",
            _json(answers.Me, {"account": _ACCOUNT}),
            (*OF_A_BODY, 429),
            body=bodies.PasswordChange,
            bodies={
                "change": (
                    "Another password",
                    {"old": "what-it-was-before", "new": "correct-horse-battery"},
                )
            },
        )
    },
    "/api/accounts": {
        "get": Operation(
            "listAccounts",
            "Accounts",
            "List the accounts",
            "For admins.",
            _json(answers.AccountList, {"data": [_ACCOUNT]}),
        ),
        "post": Operation(
            "createAccount",
            "Accounts",
            "Create an account",
            "For admins. Without a password one is made up and shown, this once.",
            _json(answers.CreatedAccount, _ACCOUNT | {"password": "p7Qm2vXw9LzR4tYk8NcB"}),
            (*OF_A_BODY, 409),
            201,
            bodies.NewAccount,
            {
                "member": ("A member, with a password that is made up", {"name": "ada"}),
                "limited": (
                    "A member whose keys have limits together",
                    {"name": "ada", "limits": {"overall": {"dollars_per_month": "100"}}},
                ),
                "admin": (
                    "Another admin",
                    {"name": "grace", "role": "admin", "password": "correct-horse-battery"},
                ),
            },
        ),
    },
    "/api/accounts/{id}": {
        "patch": Operation(
            "changeAccount",
            "Accounts",
            "Change an account",
            "For admins. Nobody can disable their own account or give up being an admin, so that there is"
            " always one. Limits hold everywhere within two seconds.",
            _json(answers.Account, _ACCOUNT | {"disabled": True}),
            (*OF_A_BODY, 404),
            body=bodies.AccountChange,
            bodies={
                "disable": ("Disable it", {"disabled": True}),
                "limits": (
                    "Give all its keys limits together",
                    {"limits": {"overall": {"dollars_per_month": "100"}}},
                ),
                "password": ("Give it another password", {"password": "correct-horse-battery"}),
            },
            parameters=("account-id",),
        )
    },
    "/api/keys": {
        "get": Operation(
            "listKeys",
            "Keys",
            "List the keys",
            "Revoked ones too. An admin sees those of every account.",
            _json(answers.KeyList, {"data": [_KEY]}),
        ),
        "post": Operation(
            "createKey",
            "Keys",
            "Create a key",
            "The key is shown in the answer and never again. It works at once at the router that answers, and"
            " within two seconds at the others. Whatever its limits are, those of its account hold too. An"
            f" account has at most {MOST_KEYS} keys that work.",
            _json(answers.CreatedKey, _KEY | {"key": "tk-4fQz81LmXw9vB2nR7tYk3PcD5sHj6gKa0eUi"}),
            (*OF_A_BODY, 404),
            201,
            bodies.NewKey,
            {
                "own": ("A key of one's own, without limits", {"name": "nightly jobs"}),
                "limited": (
                    "By an admin: for one model, with limits",
                    {
                        "name": "nightly jobs",
                        "models": [examples.MODEL_NAME],
                        "limits": {"overall": {"requests_per_minute": 60, "dollars_per_month": "25.5"}},
                    },
                ),
            },
        ),
    },
    "/api/keys/{id}": {
        "patch": Operation(
            "changeKey",
            "Keys",
            "Change a key",
            "Its name, and for admins what it may do. It holds everywhere within two seconds.",
            _json(answers.Key, _KEY),
            (*OF_A_BODY, 404),
            body=bodies.KeyChange,
            bodies={
                "name": ("Another name", {"name": "nightly jobs"}),
                "unlimited": ("All models, and no limits", {"models": None, "limits": None}),
            },
            parameters=("key-id",),
        ),
        "delete": Operation(
            "revokeKey",
            "Keys",
            "Revoke a key",
            "It works nowhere any more within two seconds, and never again. It stays in the list.",
            _json(answers.Key, _KEY | {"revoked": "2026-12-01T08:00:00.000000Z"}),
            (404,),
            parameters=("key-id",),
        ),
    },
    "/api/requests": {
        "get": Operation(
            "listRequests",
            "Usage",
            "List requests",
            "The newest first, a page at a time; those being answered too.",
            _json(answers.RequestPage, {"data": [_REQUEST], "next": None}),
            (404,),
            query=bodies.RequestsQuery,
        )
    },
    "/api/requests/{id}": {
        "get": Operation(
            "retrieveRequest",
            "Usage",
            "Retrieve a request",
            "One request, with what was asked and answered where the deployment keeps it.",
            _json(answers.RequestDetail, _REQUEST | {"asked": None, "answered": None}),
            (404,),
            parameters=("request-id",),
        )
    },
    "/api/export": {
        "get": Operation(
            "exportRequests",
            "Usage",
            "Export requests",
            "All of them, as a file. In a table, a text that a spreadsheet would take for a formula begins"
            " with an apostrophe. Where the file ends early, so does the connection.",
            {
                "application/json": Form(answers.RequestPage, {"data": [_REQUEST], "next": None}),
                "text/csv": Form(
                    None,
                    ",".join(_REQUEST)
                    + "\r\n"
                    + ",".join(str(value) for value in _REQUEST.values())
                    + "\r\n",
                ),
            },
            (404,),
            query=bodies.ExportQuery,
        )
    },
    "/api/usage": {
        "get": Operation(
            "usage",
            "Usage",
            "Sum what was used",
            "Requests, tokens and money, by day, model and key. Requests that are no longer listed count"
            " too.",
            _json(answers.UsageList, {"data": [_SUM]}),
            (404,),
            query=bodies.UsageQuery,
        )
    },
    "/api/speed": {
        "get": Operation(
            "speed",
            "Usage",
            "Tokens in a second",
            "What the router that answers passes on now, over the last five seconds.",
            _json(answers.Speed, {"data": {examples.MODEL_NAME: 130.4}}),
        )
    },
}


def operations() -> list[tuple[str, str, Operation]]:
    """Path, method and operation, of all of them."""
    return [(path, method, one) for path, methods in OPERATIONS.items() for method, one in methods.items()]
