"""The shapes of what /api answers, and how they are made of what the store has.

Requests are made without their type, which is the document's: an export has very many of them.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, Field

from router.accounts import keys, people, usage
from router.accounts.bodies import AnyOutcome
from router.accounts.limits import KeyLimits
from router.accounts.money import dollars, nano
from router.accounts.people import Role
from router.accounts.settings import Limits
from router.accounts.usage import Record

_MOMENT = "2026-11-30T09:41:00.123456Z"
_ID = "6f1d2c9ab4e84a0f9b1d0f5c3e7a8b21"

# ---- limits -------------------------------------------------------------------------------------------


class LimitsShown(BaseModel):
    """How much; null is not bounded."""

    requests_per_minute: int | None = Field(description="Requests in any 60 seconds.", examples=[60])
    tokens_per_minute: int | None = Field(
        description="Tokens, of prompts and generated, of the requests of any 60 seconds.", examples=[100_000]
    )
    dollars_per_month: str | None = Field(
        description="The price of a calendar month's requests, by UTC.", examples=["25.5"]
    )
    concurrent_requests: int | None = Field(description="Requests at one moment.", examples=[8])


class KeyLimitsShown(BaseModel):
    """The limits of a key, or of all keys of an account together."""

    overall: LimitsShown = Field(description="Of all their requests.")
    models: dict[str, LimitsShown] = Field(
        description="Beside that, of their requests for a model, by the model's name."
    )


def key_limits(found: KeyLimits) -> dict[str, Any]:
    """The limits of a key or an account as their type has them."""
    models = {name: _limits(one) for name, one in sorted(found.models.items())}
    return {"overall": _limits(found.overall), "models": models}


def _limits(found: Limits) -> dict[str, Any]:
    price = found.dollars_per_month
    return found.model_dump() | {"dollars_per_month": None if price is None else dollars(nano(price))}


# ---- accounts -----------------------------------------------------------------------------------------


class Account(BaseModel):
    """A person, or a team, who logs in to the console and holds keys."""

    id: str = Field(description="Ours, unique.", examples=[_ID])
    name: str = Field(description="What its holder logs in with.", examples=["ada"])
    role: Role = Field(description="An admin sees and changes everything, a member what is its own.")
    disabled: bool = Field(description="Whether it can do nothing any more.", examples=[False])
    limits: KeyLimitsShown = Field(description="How much all its keys together may use, the console too.")
    created: str = Field(description="When it was made.", examples=[_MOMENT])


class CreatedAccount(Account):
    """A new account."""

    password: str | None = Field(
        None, description="Its password, where it was made up: it is shown here and never again."
    )


class AccountList(BaseModel):
    """The accounts, by name."""

    data: list[Account] = Field(description="All of them.")


class Me(BaseModel):
    """Who asks."""

    account: Account = Field(description="The account that the key or the log-in belongs to.")
    csrf: str | None = Field(
        None, description="What comes along in X-CSRF-Token; only where the console's cookie was sent."
    )


def account(found: people.Account) -> dict[str, Any]:
    """An account as its type has it."""
    return {
        "id": found.id,
        "name": found.name,
        "role": found.role,
        "disabled": found.disabled,
        "limits": key_limits(found.limits),
        "created": moment(found.created_us),
    }


# ---- keys ---------------------------------------------------------------------------------------------


class Key(BaseModel):
    """A key, without itself."""

    id: str = Field(description="Ours, unique; not a secret.", examples=[_ID])
    name: str = Field(description="What people tell it apart by.", examples=["nightly jobs"])
    account: str = Field(description="The name of the account whose it is.", examples=["ada"])
    account_id: str = Field(description="That account's id.", examples=[_ID])
    kind: Literal["api", "console"] = Field(
        description="console stands for what the account does in the console, and nobody can send it."
    )
    prefix: str = Field(description="What the key begins with.", examples=["tk-6f1d2c9a"])
    models: list[str] | None = Field(description="The models that it may use; null is all.")
    limits: KeyLimitsShown = Field(description="How much it may use; its account's limits hold beside them.")
    created: str = Field(description="When it was made.", examples=[_MOMENT])
    revoked: str | None = Field(description="Since when it has not worked any more; null where it does.")


class CreatedKey(Key):
    """A new key."""

    key: str = Field(
        description="What clients send. It is shown here and never again.",
        examples=["tk-6f1d2c9ab4e84a0f9b1d0f5c3e7a8b216f1d2c9a"],
    )


class KeyList(BaseModel):
    """Keys, the newest first."""

    data: list[Key] = Field(description="All of them; of a member, its own.")


def key(found: keys.Key) -> dict[str, Any]:
    """A key as its type has it."""
    return {
        "id": found.id,
        "name": found.name,
        "account": found.account,
        "account_id": found.account_id,
        "kind": found.kind,
        "prefix": found.prefix,
        "models": None if found.models is None else sorted(found.models),
        "limits": key_limits(found.limits),
        "created": moment(found.created_us),
        "revoked": None if found.revoked_us is None else moment(found.revoked_us),
    }


# ---- requests -----------------------------------------------------------------------------------------


class LoggedRequest(BaseModel):
    """What the ledger has of a request. Its numbers are final once its outcome is not open."""

    id: str = Field(description="Ours, unique.", examples=[_ID])
    request_id: str = Field(description="The caller's own x-request-id, or again the id.", examples=["job-7"])
    began: str = Field(description="When it came.", examples=[_MOMENT])
    account_id: str = Field(description="Who sent it.", examples=[_ID])
    account: str = Field(description="That account's name.", examples=["ada"])
    key_id: str = Field(description="With which key.", examples=[_ID])
    key: str = Field(description="That key's name.", examples=["nightly jobs"])
    path: str = Field(description="Where it was sent.", examples=["/v1/chat/completions"])
    model: str = Field(
        description="The model by the name that was asked for; empty where that was not known."
    )
    replica: str = Field(description="What answered; empty where nothing did.")
    stream: bool = Field(description="Whether the answer came piece by piece.")
    status: int = Field(
        description="The answer's status: 0 until it is known, 499 where the client left.", examples=[200]
    )
    outcome: AnyOutcome = Field(
        description="How it ended; open while it is being answered, interrupted where its router was lost."
    )
    error: str = Field(description="The error's code; empty without one.")
    prompt_tokens: int = Field(description="Tokens of the prompt.", examples=[12])
    completion_tokens: int = Field(description="Generated tokens, over all choices.", examples=[24])
    price: str = Field(description="In dollars, to the last digit.", examples=["0.00042"])
    first_ms: float | None = Field(
        description="Milliseconds until the first bytes of the answer; null without any.", examples=[34.2]
    )
    duration_ms: float | None = Field(
        description="Milliseconds until its end; null until then.", examples=[412.7]
    )
    tokens_per_second: float | None = Field(
        description="Generated tokens in a second, from its beginning to its end; null until then.",
        examples=[58.2],
    )
    user_agent: str = Field(description="What the client said that it is.", examples=["curl/8.5.0"])
    router: str = Field(description="The router that took it.")


class RequestDetail(LoggedRequest):
    """One request, with its texts where the deployment keeps them."""

    asked: str | None = Field(description="What was asked, from its beginning; null where it is not kept.")
    answered: str | None = Field(description="What was answered, the same way.")


class RequestPage(BaseModel):
    """Requests, the newest first."""

    data: list[LoggedRequest] = Field(description="As many as were asked for, or as there are.")
    next: str | None = Field(
        description="What `before` takes for the next page; null where there is none.",
        examples=[f"1796031660123456-{_ID}"],
    )


REQUEST_FIELDS = tuple(LoggedRequest.model_fields)


def request(found: Record) -> dict[str, Any]:
    """A request as its type has it, its fields in the type's order."""
    duration_us = found.duration_us
    derived = {
        "began": moment(found.began_us),
        "price": dollars(found.price_nano),
        "first_ms": _ms(found.first_us),
        "duration_ms": _ms(duration_us),
        "tokens_per_second": round(found.completion_tokens * 1e6 / duration_us, 3) if duration_us else None,
    }
    return {name: derived[name] if name in derived else getattr(found, name) for name in REQUEST_FIELDS}


# ---- sums ---------------------------------------------------------------------------------------------


class UsageSum(BaseModel):
    """What requests used together. What they were not told apart by is left out."""

    day: str | None = Field(None, description="Their day, by UTC.", examples=["2026-11-30"])
    model: str | None = Field(None, description="Their model, by the name that was asked for.")
    key_id: str | None = Field(None, description="Their key's id.", examples=[_ID])
    key: str | None = Field(None, description="Their key's name.", examples=["nightly jobs"])
    requests: int = Field(description="How many there were, those of every outcome.", examples=[7])
    prompt_tokens: int = Field(description="Tokens of their prompts.", examples=[84])
    completion_tokens: int = Field(description="Generated tokens.", examples=[168])
    price: str = Field(description="In dollars, to the last digit.", examples=["0.00294"])


class UsageList(BaseModel):
    """Sums, by day, then by model, then by the key's name."""

    data: list[UsageSum] = Field(description="One for all that have the same in common.")


class Speed(BaseModel):
    """What this router passes on now."""

    data: dict[str, float] = Field(description="Tokens in a second, by model.")


def usage_sum(found: usage.Sum) -> dict[str, Any]:
    """A sum as its type has it."""
    apart = {name: getattr(found, name) for name in ("day", "model", "key_id", "key")}
    return {
        **{name: value for name, value in apart.items() if value is not None},
        "requests": found.requests,
        "prompt_tokens": found.prompt_tokens,
        "completion_tokens": found.completion_tokens,
        "price": dollars(found.price_nano),
    }


def moment(moment_us: int) -> str:
    """ISO 8601 by UTC, with microseconds: `2026-11-30T09:41:00.123456Z`."""
    seconds, microseconds = divmod(moment_us, 1_000_000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{microseconds:06}Z"


def _ms(microseconds: int | None) -> float | None:
    return None if microseconds is None else microseconds / 1000
