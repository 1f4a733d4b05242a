"""What a body asks a model for, as a replica takes it.

Nearly every chat is roles and texts, under parameters that its client sends with each request: of those only
the messages are read, and what the parameters mean is remembered. A seed may be another one each time, so it
is put in afterwards. All else goes the whole way, through the types of `router.protocol`, which also say what
is refused and why.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec.structs import astuple, replace

from router.protocol import parse_chat, parse_text
from router.settings import ModelSettings
from serving.messages import Chat, Message, Sampling, Text

MAX_KNOWN = 256
"""Sets of parameters that are remembered; the one that was not used for longest is forgotten first."""

MAX_KNOWN_BYTES = 2048
"""Bytes of MessagePack that such a set may have."""

_ROLES = ("system", "developer", "user", "assistant")
"""Who may say nothing but a text."""

_BEFORE_PARAMETERS = Chat.__struct_fields__.index("messages") + 1

_IGNORED = ("safety_identifier", "prompt_cache_key")
"""What OpenAI's clients send in the place of `user`. Like all that nobody knows, it has no effect."""

_Written = tuple[bytes, int, str, str]
"""A set of parameters, and the model's settings that it is read under."""

known: dict[_Written, tuple[Sampling, tuple[Any, ...]]] = {}
"""What accepted sets of parameters mean: a Chat's sampling without its seed, and the fields behind it."""

_as_msgpack = msgspec.msgpack.Encoder().encode


def read_chat(
    data: dict[str, Any], settings: ModelSettings, identifier: str, model: str, created: int
) -> Chat:
    """The chat completion request that a JSON object describes, to a model with these settings.

    Raises InvalidRequest, which names the first field that is wrong, its value and what was expected.
    """
    plain = _plain(data, settings)
    if plain is not None:
        messages, written = plain
        meant = known.pop(written, None)
        if meant is not None:
            known[written] = meant  # the last to be forgotten now
            sampling, others = meant
            if (seed := data.get("seed")) is not None:
                sampling = replace(sampling, seed=seed)
            return Chat(identifier, model, created, messages, sampling, *others)
    role_in_every_chunk = settings.stream_role == "every"
    chat = parse_chat(data, settings).to_message(
        identifier, model, created, role_in_every_chunk=role_in_every_chunk
    )
    if plain is not None:
        _remember(plain[1], chat)
    return chat


def read_text(
    data: dict[str, Any], settings: ModelSettings, identifier: str, model: str, created: int
) -> Text:
    """The text completion request that a JSON object describes, to a model with these settings.

    Raises InvalidRequest, which names the first field that is wrong, its value and what was expected.
    """
    return parse_text(data, settings).to_message(identifier, model, created)


def _plain(data: dict[str, Any], settings: ModelSettings) -> tuple[tuple[Message, ...], _Written] | None:
    """Messages and parameters of a chat that may go the short way; None for any other."""
    messages = _messages(data.get("messages"), settings.limits.messages)
    written = None if messages is None else _parameters(data, settings)
    return None if messages is None or written is None else (messages, written)


def _messages(given: Any, limit: int) -> tuple[Message, ...] | None:
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
    """What every chat with these parameters has in common, in MessagePack, where 1 is neither 1.0 nor true;
    None where it is too long, a number in it is too large, or a field that is left out of it is wrong."""
    others = data.copy()
    del others["messages"]
    take = others.pop
    model, seed = take("model", None), take("seed", None)
    user, metadata = take("user", None), take("metadata", None)
    for name in _IGNORED:
        take(name, None)
    if not (
        (type(model) is str and model)
        and (seed is None or (type(seed) is int and -(2**63) <= seed < 2**63))
        and (user is None or type(user) is str)
        and (metadata is None or type(metadata) is dict)
    ):
        return None
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
    sampling, *others = astuple(chat)[_BEFORE_PARAMETERS:]
    known[written] = replace(sampling, seed=None), tuple(others)
