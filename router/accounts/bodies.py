"""What the requests to /api say, in their bodies and behind the question mark, and how it is read.

As with completions, the types are at once the check, the document and the text of every refusal. Here nothing
is ignored: a field or a parameter that nobody knows is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any, Final, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import ErrorDetails

from router.accounts.limits import KeyLimits
from router.accounts.people import LEAST_PASSWORD, LONGEST_PASSWORD, Role
from router.accounts.settings import MONEY_PLACES, Dollars, Limits
from router.accounts.usage import DAY_US, By, Cursor, Filter, Span, start_us
from router.errors import InvalidRequest, shown
from router.metrics import Outcome
from router.refusals import Refusals

MOST_PER_PAGE = 500
"""Requests of one page."""

LONGEST_NAME = 200
"""Characters of a key's or a model's name."""

MOST_MODELS = 1000
"""Models that one key names."""

# ---- parts --------------------------------------------------------------------------------------------


def _is_name(name: str) -> str:
    # A name stands in terminals and tables: what moves the cursor has no place in it.
    if not name.isprintable() or name != name.strip() or not 1 <= len(name) <= LONGEST_NAME:
        raise ValueError
    return name


def _is_password(password: str) -> str:
    if not LEAST_PASSWORD <= len(password) <= LONGEST_PASSWORD:
        raise ValueError
    return password


def _is_text(text: str) -> str:
    # No database can look for anything else.
    if not text.isprintable() or not text:
        raise ValueError
    return text


Name = Annotated[
    str,
    AfterValidator(_is_name),
    Field(title=f"a string of 1 to {LONGEST_NAME} characters that can be seen, none at its ends a space"),
]
Password = Annotated[
    str,
    AfterValidator(_is_password),
    Field(title=f"a string of {LEAST_PASSWORD} to {LONGEST_PASSWORD} characters"),
]
ModelName = Annotated[str, Field(title="a model's name", min_length=1, max_length=LONGEST_NAME)]
AccountId = Annotated[str, AfterValidator(_is_text), Field(title="an account's id")]
KeyId = Annotated[str, AfterValidator(_is_text), Field(title="a key's id")]

SECRETS = frozenset({"password", "old", "new"})
"""Fields whose values no refusal repeats."""

MONEY = WithJsonSchema(
    {
        "type": "string",
        "pattern": rf"^[0-9]{{1,7}}(\.[0-9]{{1,{MONEY_PLACES}}})?$",
        "title": f"dollars from 0 to 1000000 with up to {MONEY_PLACES} decimals, as a string",
    }
)


class Body(BaseModel):
    """No value is turned into another type, and nothing is ignored."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


# ---- bodies -------------------------------------------------------------------------------------------


class PasswordChange(Body):
    """The body of POST /api/me/password."""

    old: str = Field(description="The password until now.", examples=["what-it-was-before"])
    new: Password = Field(description="The one from now on.", examples=["correct-horse-battery"])


class NewLimits(Limits):
    """What is let in. What is left out or null is not bounded."""

    dollars_per_month: Annotated[Dollars, MONEY] | None = Field(
        None, description="The price of a calendar month's requests, by UTC.", examples=["25.5"]
    )


class NewKeyLimits(Body):
    """The limits of a key, or of all keys of an account together."""

    overall: NewLimits = Field(
        NewLimits(), description="Of all their requests.", examples=[{"requests_per_minute": 60}]
    )
    models: Annotated[
        dict[Annotated[str, Field(pattern=r"^.+$")], NewLimits], Field(max_length=MOST_MODELS)
    ] = Field(
        {},
        description="Beside that, of their requests for a model, by one of the model's names.",
        examples=[{"smollm2-135m-instruct": {"tokens_per_minute": 100_000}}],
    )

    def settings(self, canonical: Mapping[str, str]) -> KeyLimits:
        """The same under the names that models have in the catalog."""
        return KeyLimits(
            overall=_plain(self.overall),
            models={canonical[name]: _plain(limits) for name, limits in self.models.items()},
        )


class NewAccount(Body):
    """The body of POST /api/accounts."""

    name: str = Field(
        description="What its holder logs in with: letters, digits and ._@+-, in any case.", examples=["ada"]
    )
    role: Role = Field(
        "member",
        description="An admin sees and changes everything, a member what is its own.",
        examples=["member"],
    )
    password: Password | None = Field(
        None,
        description="Left out, one is made up, and shown in the answer.",
        examples=["correct-horse-battery"],
    )
    limits: NewKeyLimits | None = Field(
        None,
        description="How much all its keys together may use; left out or null, it is without limits.",
        examples=[{"overall": {"dollars_per_month": "100"}}],
    )


class AccountChange(Body):
    """The body of PATCH /api/accounts/{id}. What is left out stays as it is."""

    role: Role | None = Field(None, description="What it may see and change.", examples=["admin"])
    disabled: bool | None = Field(
        None,
        description="Whether it can do nothing any more: its sessions end, and its keys do not work.",
        examples=[True],
    )
    password: Password | None = Field(
        None,
        description="A new password; the account's sessions end.",
        examples=["correct-horse-battery"],
    )
    limits: NewKeyLimits | None = Field(
        None,
        description="How much all its keys together may use; null is without limits.",
        examples=[{"overall": {"dollars_per_month": "100"}}],
    )


ModelNames = Annotated[list[ModelName], Field(min_length=1, max_length=MOST_MODELS, fail_fast=True)]


class KeyChange(Body):
    """The body of PATCH /api/keys/{id}. What is left out stays as it is."""

    name: Name | None = Field(
        None, description="What people tell it apart by; it need not be unique.", examples=["nightly jobs"]
    )
    models: ModelNames | None = Field(
        None,
        description="The models that it may use, by any of their names in any case; null allows all. For"
        " admins to say.",
        examples=[["smollm2-135m-instruct"]],
    )
    limits: NewKeyLimits | None = Field(
        None,
        description="How much it may use; null is without limits. For admins to say.",
        examples=[{"overall": {"requests_per_minute": 60, "dollars_per_month": "25.5"}}],
    )


class NewKey(KeyChange):
    """The body of POST /api/keys."""

    name: Name = Field(
        description="What people tell it apart by; it need not be unique.", examples=["nightly jobs"]
    )
    account_id: AccountId | None = Field(
        None,
        description="Whose it is; left out, the caller's own. For admins to say.",
        examples=["0b9d5f3ae0a04c1d8f4f7d1e6c2b3a49"],
    )


def _plain(limits: NewLimits) -> Limits:
    return Limits.model_validate(limits.model_dump())


# ---- behind the question mark -------------------------------------------------------------------------

_DAY = re.compile(r"\d{4}-\d\d-\d\d")
_MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d(:\d\d(\.\d{1,6})?)?(Z|[+-]\d\d:\d\d)?")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _moment_us(text: str) -> int:
    if not _MOMENT.fullmatch(text):
        raise ValueError
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return (moment - _EPOCH) // timedelta(microseconds=1)


def _since(text: Any) -> int:
    return start_us(_is_day(text)) if _DAY.fullmatch(text) else _moment_us(text)


def _until(text: Any) -> int:
    return start_us(_is_day(text)) + DAY_US if _DAY.fullmatch(text) else _moment_us(text)


def _is_day(text: Any) -> date:
    if not _DAY.fullmatch(text):
        raise ValueError
    return date.fromisoformat(text)


def _is_cursor(text: Any) -> Cursor:
    began, _, identifier = text.partition("-")
    if not re.fullmatch(r"[0-9]{1,18}", began, re.ASCII) or not re.fullmatch(r"[0-9a-f]{32}", identifier):
        raise ValueError
    return Cursor(int(began), identifier)


def _is_by(text: Any) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= set(get_args(By)):
        raise ValueError
    return names


def _text(title: str, check: Any) -> tuple[BeforeValidator, WithJsonSchema]:
    """A parameter that is a text to its sender."""
    return BeforeValidator(check), WithJsonSchema({"type": "string", "title": title})


_MOMENTS: Final = "a day such as 2026-11-30, or a moment such as 2026-11-30T09:41:00Z"
_DAYS: Final = "a day such as 2026-11-30"

Since = Annotated[int, *_text(_MOMENTS, _since)]
Until = Annotated[int, *_text(_MOMENTS, _until)]
Day = Annotated[date, *_text(_DAYS, _is_day)]
Place = Annotated[Cursor, *_text("what next was in the answer before", _is_cursor)]
Apart = Annotated[tuple[By, ...], *_text("some of day, model and key with commas between them", _is_by)]
AnyOutcome = Literal[Outcome, "open", "interrupted"]
Model = Annotated[str, AfterValidator(_is_text), Field(title="a model's name")]


class Query(BaseModel):
    """Parameters are texts, out of which a type makes what it can."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Whose(Query):
    """What both lists of requests and sums of them can be bounded to."""

    model: Model | None = Field(
        None, description="Requests that asked for it by this name, in any case.", examples=["gpt-4o"]
    )
    key_id: KeyId | None = Field(
        None, description="Those of a key.", examples=["7c1c8f1de5a54f6cb0f3c2a9d4e5b617"]
    )
    account_id: AccountId | None = Field(
        None,
        description="Those of an account; a member's are its own.",
        examples=["0b9d5f3ae0a04c1d8f4f7d1e6c2b3a49"],
    )


class Chosen(Whose):
    """Which requests."""

    outcome: AnyOutcome | None = Field(
        None,
        description="Those that ended so; open is one that is being answered, interrupted one whose router"
        " was lost.",
        examples=["completed"],
    )
    status: Annotated[int, Field(ge=100, le=599)] | None = Field(
        None, description="Those that were answered with this status.", examples=[200]
    )
    since: Since | None = Field(
        None, description="Those that began then or later, by UTC.", examples=["2026-11-01"]
    )
    until: Until | None = Field(
        None,
        description="Those that began before then; of a day, those that began before its end.",
        examples=["2026-11-30T09:41:00Z"],
    )

    def filter(self) -> Filter:
        """As the ledger is asked."""
        return Filter(
            self.account_id,
            self.key_id,
            _only(self.model),
            self.outcome,
            self.status,
            self.since,
            self.until,
        )


class RequestsQuery(Chosen):
    """What GET /api/requests takes."""

    before: Place | None = Field(
        None,
        description="Where the page begins: `next` of the page before.",
        examples=["1796031660123456-6f1d2c9ab4e84a0f9b1d0f5c3e7a8b21"],
    )
    limit: Annotated[int, Field(ge=1, le=MOST_PER_PAGE)] = Field(
        50, description="Requests of a page, at most.", examples=[100]
    )


class ExportQuery(Chosen):
    """What GET /api/export takes."""

    format: Literal["csv", "json"] = Field(
        "csv",
        description="A table with a line of titles, or what GET /api/requests answers, of one page.",
        examples=["json"],
    )


class UsageQuery(Whose):
    """What GET /api/usage takes."""

    since: Day | None = Field(None, description="The first day, by UTC.", examples=["2026-11-01"])
    until: Day | None = Field(None, description="The last day.", examples=["2026-11-30"])
    by: Apart = Field(
        (),
        description="What the sums are told apart by; left out, there is one of all.",
        examples=["day,key"],
    )

    @property
    def span(self) -> Span:
        """The days."""
        return Span(self.since, self.until)

    def filter(self) -> Filter:
        """As the ledger is asked."""
        return Filter(self.account_id, self.key_id, _only(self.model))


def _only(model: str | None) -> tuple[str] | None:
    return None if model is None else (model,)


# ---- reading ------------------------------------------------------------------------------------------

R = TypeVar("R", bound=BaseModel)

_READ: tuple[type[BaseModel], ...] = (
    PasswordChange,
    NewAccount,
    AccountChange,
    NewKey,
    KeyChange,
    RequestsQuery,
    ExportQuery,
    UsageQuery,
)

_REFUSALS = {kind: Refusals(kind.model_json_schema()) for kind in _READ}


def read(kind: type[R], given: Mapping[str, Any]) -> R:
    """What a JSON object or the parameters of an address say.

    Raises InvalidRequest, which names the first field that is wrong, its value unless it is secret, and what
    was expected.
    """
    try:
        return kind.model_validate(dict(given))
    except ValidationError as error:
        raise _refusal(kind, error.errors(include_url=False, include_context=False)) from None


def _refusal(kind: type[BaseModel], errors: list[ErrorDetails]) -> InvalidRequest:
    for error in errors:
        path = ".".join(map(str, error["loc"]))
        if error["type"] == "extra_forbidden":
            return InvalidRequest(f"{path} is not known here", param=path, code="unknown_parameter")
        if error["loc"][-1:] == ("[key]",):
            path = path.removesuffix(f".{error['loc'][-2]}.[key]")
            return InvalidRequest(
                f"{path} must have models' names as its keys, not {shown(error['input'])}", param=path
            )
        if error["loc"][0] in SECRETS and error["type"] != "missing":
            field = str(error["loc"][0])
            expected = _REFUSALS[kind].expected(field)
            return InvalidRequest(f"{field} must be {expected}", param=field)
    return _REFUSALS[kind].of(errors)
