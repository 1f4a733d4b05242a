"""What a body asks a model for, as a replica takes it.

Nearly every chat is roles and texts, under parameters that its client sends with each request: of those only
the messages are read, and what the parameters mean is remembered. All else goes the whole way, through the
types of `router.protocol`, which also say what is refused and why.
"""

from __future__ import annotations

from typing import Any

import msgspec

from router.protocol import parse_chat, parse_text
from router.settings import ModelSettings
from serving.messages import Chat, Message, Text

MAX_KNOWN = 256
"""Sets of parameters that are remembered."""

MAX_KNOWN_BYTES = 2048
"""Bytes of MessagePack that such a set may have."""

_ROLES = ("system", "developer", "user", "assistant")
"""Who may say nothing but a text."""

_BEFORE_PARAMETERS = Chat.__struct_fields__.index("messages") + 1

_Written = tuple[bytes, int, str, str]
"""A set of parameters, and the model's settings that it is read under."""

known: dict[_Written, tuple[Any, ...]] = {}
"""What accepted sets of parameters mean: the fields of a Chat behind its messages."""

_as_msgpack = msgspec.msgpack.Encoder().encode


def read_chat(
    data: dict[str, Any], settings: ModelSettings, identifier: str, model: str, created: int
) -> Chat:
    """The chat completion request that a JSON object describes, to a model with these settings.

    Raises InvalidRequest, which names the first field that is wrong, its value and what was expected.
    """
    messages = _plain(data.get("messages"), settings.limits.messages)
    written = None if messages is None else _parameters(data, settings)
    if messages is not None and written in known:
        return Chat(identifier, model, created, messages, *known[written])
    role_in_every_chunk = settings.stream_role == "every"
    chat = parse_chat(data, settings).to_message(
        identifier, model, created, role_in_every_chunk=role_in_every_chunk
    )
    if written is not None:
        _remember(written, chat)
    return chat


def read_text(
    data: dict[str, Any], settings: ModelSettings, identifier: str, model: str, created: int
) -> Text:
    """The text completion request that a JSON object describes, to a model with these settings.

    Raises InvalidRequest, which names the first field that is wrong, its value and what was expected.
    """
    return parse_text(data, settings).to_message(identifier, model, created)


def _plain(given: Any, limit: int) -> tuple[Message, ...] | None:
    """Messages of nothing but a role and a text, up to so many of them; None where there are others."""
    if type(given) is not list or not 0 < len(given) <= limit:
        return None
    messages = []
    for each in given:
        if type(each) is not dict or len(each) != 2:
            return None
        role, content = each.get("role"), each.get("content")
        if role not in _ROLES or type(content) is not str:
            return None
        messages.append(Message(role, content))
    return tuple(messages)


def _parameters(data: dict[str, Any], settings: ModelSettings) -> _Written | None:
    """All but the messages, in MessagePack, where 1 is neither 1.0 nor true; None where they are too long, or
    a number in them is too large."""
    others = data.copy()
    del others["messages"]
    try:
        written = _as_msgpack(others)
    except OverflowError:
        return None
    if len(written) > MAX_KNOWN_BYTES:
        return None
    return written, settings.default_max_tokens, settings.stream_role, settings.repetition_penalty


def _remember(written: _Written, chat: Chat) -> None:
    if len(known) >= MAX_KNOWN:
        del known[next(iter(known))]
    known[written] = msgspec.structs.astuple(chat)[_BEFORE_PARAMETERS:]
