"""The settings of accounts: where they are kept, and what holds while that place cannot be reached."""

from __future__ import annotations

import re
from decimal import Decimal
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, field_validator
from pydantic_core import PydanticCustomError

from router.accounts.money import NANO
from serving.settings import Settings

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")

WhenStoreIsDown = Literal["refuse", "serve"]
"""What new requests get while the store cannot be reached."""

MONEY_PLACES = 9
"""Decimals that money may have, in dollars: one nano-dollar is the least there is."""


def _network(value: object) -> object:
    try:
        return ip_network(value) if isinstance(value, str) else value
    except ValueError:
        raise ValueError("an IP address or a network such as 10.0.0.0/8") from None


def _decimal(value: object, places: int) -> Decimal | None:
    """Dollars as the configuration writes them, exactly: YAML's 0.15 is a float, and what it says is 0.15.
    None where they are not from 0 to 1000000, or have more decimals."""
    if not isinstance(value, int | float | str | Decimal) or isinstance(value, bool):
        return None
    try:
        dollars = Decimal(str(value))
        if not 0 <= dollars <= 1_000_000:
            return None
        rounded = dollars.quantize(Decimal(1).scaleb(-places))
    except (ArithmeticError, ValueError):  # it is no number, or one of thousands of digits
        return None
    # To add nothing makes 100 of 1E+2.
    return rounded.normalize() + 0 if rounded == dollars else None


def _price(value: object) -> Decimal:
    price = _decimal(value, 3)
    if price is None:
        raise ValueError("dollars for a million tokens, from 0 to 1000000 and with up to 3 decimals")
    return price


def _dollars(value: object) -> Decimal:
    dollars = _decimal(value, MONEY_PLACES)
    if dollars is None:
        raise ValueError(f"dollars from 0 to 1000000 with up to {MONEY_PLACES} decimals")
    return dollars


def _origin(origin: str) -> str:
    if not _ORIGIN.fullmatch(origin):
        raise ValueError("an origin such as https://chat.example.org, as browsers write it")
    return origin


Network = Annotated[IPv4Network | IPv6Network, BeforeValidator(_network)]
PerMillion = Annotated[Decimal, BeforeValidator(_price)]
Dollars = Annotated[Decimal, BeforeValidator(_dollars)]
Origin = Annotated[str, AfterValidator(_origin)]


def is_redis(url: SecretStr) -> bool:
    """Whether Redis could be at that URL."""
    return url.get_secret_value().startswith(("redis://", "rediss://", "unix://"))


class Price(Settings):
    """What a model's tokens cost, in dollars for a million of them."""

    prompt: PerMillion = Field(Decimal(0), description="A million tokens of prompts.")
    completion: PerMillion = Field(Decimal(0), description="A million generated tokens, over all choices.")

    def __str__(self) -> str:
        return f"${self.prompt:f} / 1M prompt tokens, ${self.completion:f} / 1M generated tokens"

    def of(self, prompt_tokens: int, completion_tokens: int) -> int:
        """What so many tokens cost, in nano-dollars."""
        # A dollar for a million tokens is a thousand nano-dollars for one.
        per_token = NANO // 1_000_000
        return (
            int(self.prompt * per_token) * prompt_tokens
            + int(self.completion * per_token) * completion_tokens
        )


class Limits(Settings):
    """What a key, an account or all who ask for a model may do; None does not bound it."""

    requests_per_minute: int | None = Field(
        None, ge=1, le=10**9, description="Requests in any 60 seconds, whatever became of them."
    )
    tokens_per_minute: int | None = Field(
        None,
        ge=1,
        le=10**12,
        description="Tokens, of prompts and generated, of the requests of any 60 seconds.",
    )
    dollars_per_month: Dollars | None = Field(
        None, description="The price of a calendar month's requests, by UTC."
    )
    concurrent_requests: int | None = Field(None, ge=1, le=10**6, description="Requests at one moment.")


class AccountsSettings(Settings):
    """Who may call, and what is kept of it."""

    enabled: bool = Field(
        True, description="Whether keys are asked for, and a ledger kept; false only on a loopback address."
    )
    store: SecretStr | None = Field(
        None,
        description="sqlite:///path or postgresql://user:password@host/database; left out, the variable"
        " TRUNKLINE_STORE, or else a file in TRUNKLINE_DATA.",
    )
    redis: SecretStr | None = Field(
        None,
        description="redis://host:port/database, where several routers count limits together; left out, the"
        " variable TRUNKLINE_REDIS.",
    )
    when_store_is_down: WhenStoreIsDown = Field(
        "refuse",
        description="refuse answers new requests with 503; serve goes on with the keys that are known, and"
        " keeps rows in a spool. Running answers end normally in both.",
    )
    folder: Annotated[Path, Field(strict=False)] | None = Field(
        None,
        description="Where the store's file and spools are; left out, the variable TRUNKLINE_DATA, or"
        " ~/.local/share/trunkline.",
    )
    spool_bytes: int = Field(
        64 * 1024 * 1024,
        ge=64 * 1024,
        le=1024**4,
        description="Bytes of rows that wait in a local file for the store, per router.",
    )
    keep_days: int | None = Field(
        None, ge=1, le=36_500, description="Days after which requests are forgotten; their sums are kept."
    )
    record_text: bool = Field(
        False, description="Whether the ledger keeps what was asked and answered, 64 KiB of each."
    )
    session_hours: int = Field(12, ge=1, le=8760, description="Hours until a log-in to the console ends.")
    secure_cookies: bool = Field(
        False, description="Whether browsers send the console's cookie over TLS alone; set it behind a proxy."
    )
    trusted_proxies: Annotated[tuple[Network, ...], Field(strict=False)] = Field(
        (), description="Networks whose X-Forwarded-For says who a client is."
    )
    cors_origins: Annotated[tuple[Origin, ...], Field(strict=False)] = Field(
        (), description="Origins whose pages may call /v1, such as https://chat.example.org."
    )

    @field_validator("store")
    @classmethod
    def _is_store(cls, store: SecretStr | None) -> SecretStr | None:
        if store is not None and not store.get_secret_value().startswith(("sqlite:///", "postgresql://")):
            raise PydanticCustomError("store_url", "")  # not shown: it may have a password in it
        return store

    @field_validator("redis")
    @classmethod
    def _is_redis(cls, redis: SecretStr | None) -> SecretStr | None:
        if redis is not None and not is_redis(redis):
            raise PydanticCustomError("redis_url", "")
        return redis

    @property
    def url(self) -> str:
        """The store's URL, once it is known where that is."""
        if self.store is None:
            raise ValueError("the store's URL has not been found out")
        return self.store.get_secret_value()

    @property
    def spools(self) -> Path:
        """The folder of spools, once it is known."""
        if self.folder is None:
            raise ValueError("the folder has not been found out")
        return self.folder / "spools"
