"""Bodies on their way through the router, up to what crosses the trunk, without a server or a replica."""

from __future__ import annotations

import json
from typing import Any

import pytest

from router.errors import InvalidRequest
from router.protocol import model_name, read_json
from router.reading import read_chat, read_text
from router.settings import ModelLimits, ModelSettings
from serving.messages import Chat, Text

HELLO = [{"role": "user", "content": "hello"}]


def parse(body: bytes | dict[str, Any], **settings: Any) -> Chat:
    """A body's way through the router, up to what crosses the trunk, to a model with these settings."""
    data = read_json(body if isinstance(body, bytes) else json.dumps(body).encode())
    model = ModelSettings(name="m", limits=ModelLimits(messages=16), **settings)
    return read_chat(data, model, "chatcmpl-key", model_name(data), 1_700_000_000)


def chat(**parameters: Any) -> Chat:
    """A small conversation with these parameters."""
    return parse({"model": "m", "messages": HELLO, **parameters})


def refusal(body: bytes | dict[str, Any]) -> InvalidRequest:
    """How a body is refused."""
    with pytest.raises(InvalidRequest) as caught:
        parse(body)
    assert caught.value.status == 400
    return caught.value


def refused(**parameters: Any) -> InvalidRequest:
    """How these parameters of a small conversation are refused."""
    return refusal({"model": "m", "messages": HELLO, **parameters})


def parse_as_text(body: bytes | dict[str, Any], **settings: Any) -> Text:
    """The same for a text completion."""
    data = read_json(body if isinstance(body, bytes) else json.dumps(body).encode())
    return read_text(data, ModelSettings(name="m", **settings), "cmpl-key", model_name(data), 1_700_000_000)


def text(**parameters: Any) -> Text:
    """A text completion of "hello" with these parameters."""
    return parse_as_text({"model": "m", "prompt": "hello", **parameters})


def text_refused(**parameters: Any) -> InvalidRequest:
    """How these parameters of a text completion are refused."""
    with pytest.raises(InvalidRequest) as caught:
        text(**parameters)
    assert caught.value.status == 400
    return caught.value
