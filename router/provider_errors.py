"""A provider's refusals, in our envelope and without a trace of the key that was used."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgspec
from pydantic import SecretStr

from router.errors import ProviderError

REFUSAL_BYTES = 65_536
"""How much of a refusal is looked at. Of a longer one only the status is told."""

LEAST_PART = 6
"""Characters of a key that are too many to be told."""

LONGEST_MESSAGE = 4096
"""Characters of a provider's message that are relayed."""

_WORD = re.compile(r"[^\s\"'`]+")
_MASK = "***"

_CODE = re.compile(r"[\w.:\[\]/-]{1,100}", re.ASCII)
_WAITS = ("retry-after", "retry-after-ms")
_WAIT = re.compile(r"\d{1,12}(\.\d{1,12})?|\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", re.ASCII)
"""A number or a date."""


class _Detail(msgspec.Struct):
    """What is wrong at one place of a request."""

    msg: str
    loc: tuple[str | int, ...] = ()


def provider_error(
    status: int, body: bytes, key: SecretStr, headers: Mapping[str, str] | None = None
) -> ProviderError:
    """The error that a provider's answer is to the client: in its own words, where the body has any."""
    told = _told(body[:REFUSAL_BYTES])

    def short(name: str) -> str | None:
        value = told.get(name)
        # The shape first: to look for the key takes its time with each character.
        fits = isinstance(value, str) and _CODE.fullmatch(value) and scrubbed(value, key) == value
        return value if fits else None

    message = told.get("message")
    if not isinstance(message, str) or not message.strip():
        message = f"the provider answered with status {status}"
    return ProviderError(
        status,
        scrubbed(message[:LONGEST_MESSAGE], key),
        kind=short("type"),
        param=short("param"),
        code=short("code"),
        headers={name: value for name in _WAITS if _WAIT.fullmatch(value := (headers or {}).get(name, ""))},
    )


def scrubbed(text: str, secret: SecretStr) -> str:
    """A text without the key, any part of it that says much, and any word that somebody has half masked."""
    key = secret.get_secret_value()
    size = min(LEAST_PART, len(key))
    parts = {key[start : start + size] for start in range(len(key) - size + 1)}
    letters = list(text)
    for start in range(len(text) - size + 1):
        if text[start : start + size] in parts:
            letters[start : start + size] = "*" * size
    return _WORD.sub(lambda word: _MASK if _MASK in word[0] else word[0], "".join(letters))


def _told(body: bytes) -> dict[str, Any]:
    """The error in a body, in one of the shapes that providers give it; empty where there is none."""
    try:
        content = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        return {}
    error = content.get("error", content) if isinstance(content, dict) else content
    if isinstance(error, str):
        return {"message": error}
    if not isinstance(error, dict):
        return {}
    return error if "message" in error else error | {"message": _from_detail(error.get("detail"))}


def _from_detail(detail: Any) -> str | None:
    """The message of servers made with FastAPI: a text, or a list of what is wrong, each with its place."""
    try:
        read = msgspec.convert(detail, str | list[_Detail])
    except msgspec.ValidationError:
        return None
    if isinstance(read, str):
        return read
    return "; ".join(": ".join(filter(None, (".".join(map(str, each.loc)), each.msg))) for each in read)
