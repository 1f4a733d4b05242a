from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tests.end_to_end.client import asking, chat
from tests.end_to_end.echoes import ECHO, LONE
from tests.end_to_end.server import Server, http

BODY_BYTES = 262_144
MESSAGES = 64
CHAT = "/v1/chat/completions"
GOOD = chat(ECHO, "one two three")
TEXT = " ".join(["one two three"] * 8)


@dataclass(frozen=True)
class Bad:
    """A request that has to be refused, and how."""

    status: int
    param: str | None = None
    code: str = "invalid_value"
    body: Any = field(default_factory=dict)
    """JSON, or bytes, or pieces of bytes that are sent one by one."""
    method: str = "POST"
    path: str = CHAT
    content_type: str | None = "application/json"


def wrong(param: str, code: str = "invalid_value", **parameters: Any) -> Bad:
    """A body with something in it that is a 400."""
    return Bad(400, param, code, GOOD | parameters)


def message(param: str, code: str = "invalid_value", **fields: Any) -> Bad:
    """A body whose only message is wrong."""
    return wrong(param, code, messages=[{"role": "user", "content": "hi"} | fields])


# A parameter → the ends of its range, and one step past each.
ENDS: dict[str, tuple[list[Any], list[Any]]] = {
    "max_tokens": ([1], [0, -1]),
    "max_completion_tokens": ([1], [0]),
    "temperature": ([0, 2], [-0.001, 2.001]),
    "top_p": ([0, 1], [-0.001, 1.001]),
    "frequency_penalty": ([-2, 2], [-2.001, 2.001]),
    "presence_penalty": ([-2, 2], [-2.001, 2.001]),
    "repetition_penalty": ([-2, 2], [-2.001, 2.001]),
    "logit_bias": ([{"5": -100}, {"5": 100}, {}], [{"5": -100.001}, {"5": 100.001}, {"-1": 1}]),
    "n": ([1, 128], [0, 129]),
    "seed": ([-(2**63), 2**63 - 1], [-(2**63) - 1, 2**63]),
    "stop": (["x", ["x"] * 4, []], ["", ["x"] * 5, [""]]),
    "top_k": ([-1], [-2]),
    "min_p": ([0, 1], [-0.001, 1.001]),
    "min_tokens": ([0, 24], [-1, 25]),
    "stop_token_ids": ([[0] * 64], [[0] * 65, [-1]]),
}

# A string is not a number, a number is not a boolean, and a fraction is not a whole number.
MISTYPED: list[tuple[str, Any]] = [
    ("model", 5),
    ("messages", "hi"),
    ("messages", {"role": "user", "content": "hi"}),
    ("max_tokens", "24"),
    ("max_tokens", 24.5),
    ("max_tokens", True),
    ("stream", "true"),
    ("stream", 1),
    ("temperature", "1"),
    ("temperature", [1]),
    ("top_p", "1"),
    ("frequency_penalty", "0"),
    ("presence_penalty", "0"),
    ("repetition_penalty", "0"),
    ("logit_bias", [5]),
    ("logit_bias", {"5": "1"}),
    ("logit_bias", {"five": 1}),
    ("n", "1"),
    ("n", 1.5),
    ("seed", "7"),
    ("seed", 7.5),
    ("stop", 5),
    ("stop", [5]),
    ("stop", {"0": "x"}),
    ("user", 5),
    ("metadata", "x"),
    ("ignore_eos", "yes"),
]


def parameters() -> Iterator[tuple[str, Bad]]:
    """Every parameter one past each end of its range, and every one of another type."""
    for param, (_, outside) in ENDS.items():
        for value in outside:
            yield f"{param}={str(value)[:24]}", wrong(param, **{param: value})
    for param, value in MISTYPED:
        yield f"{param}:{value!r:.24}", wrong(param, **{param: value})


REFUSED: dict[str, Bad] = {
    **dict(parameters()),
    # The body as a whole.
    "not JSON": Bad(400, None, "invalid_json", b'{"model": "echo",'),
    "nothing": Bad(400, None, "invalid_json", b""),
    "a list": Bad(400, body=b"[]"),
    "not UTF-8": Bad(400, None, "invalid_json", b'{"model": "\xff"}'),
    "not a number": Bad(400, None, "invalid_json", b'{"model": "echo", "temperature": NaN}'),
    "nested without end": Bad(400, None, "invalid_json", b"[" * 10_000),
    "form data": Bad(415, None, "unsupported_media_type", b"model=echo", content_type="text/plain"),
    "no content type": Bad(415, None, "unsupported_media_type", GOOD, content_type=None),
    "too long": Bad(413, None, "body_too_large", b" " * (BODY_BYTES + 1)),
    "too long, in pieces": Bad(413, None, "body_too_large", [b" " * 65_536] * 5),
    # The model and the messages.
    "no model": Bad(400, "model", "missing_required_parameter", {"messages": GOOD["messages"]}),
    "an empty model": wrong("model", model=""),
    "an unknown model": Bad(404, "model", "model_not_found", GOOD | {"model": "nobody"}),
    "no messages": Bad(400, "messages", "missing_required_parameter", {"model": ECHO}),
    "empty messages": wrong("messages", messages=[]),
    "too many messages": wrong("messages", messages=GOOD["messages"] * (MESSAGES + 1)),
    "a message that is a text": wrong("messages[0]", messages=["hi"]),
    "an unknown role": message("messages[0].role", role="robot"),
    "no role": wrong("messages[0].role", "missing_required_parameter", messages=[{"content": "hi"}]),
    "null content": message("messages[0].content", content=None),
    "a number for content": message("messages[0].content", content=5),
    "an image": message("messages[0].content[0].type", content=[{"type": "image_url", "image_url": {}}]),
    "a prompt longer than the context": Bad(
        400, "messages", "context_length_exceeded", chat(ECHO, "word " * 1024)
    ),
    # Parameters together, and those that would change the answer.
    "two lengths": wrong("max_completion_tokens", max_completion_tokens=5, max_tokens=6),
    "stream_options without a stream": wrong("stream_options", stream_options={"include_usage": True}),
    "functions": wrong("functions", "unsupported_parameter", functions=[{"name": "f"}]),
    # Paths and methods.
    "an unknown path": Bad(404, None, "unknown_url", GOOD, path="/chat/completions"),
    "an endpoint that is not served": Bad(404, None, "unknown_url", GOOD, path="/v1/embeddings"),
    "a path below the endpoint": Bad(404, None, "unknown_url", GOOD, path=f"{CHAT}/"),
    "GET": Bad(405, None, "method_not_allowed", b"", method="GET"),
    "DELETE": Bad(405, None, "method_not_allowed", b"", method="DELETE"),
    "POST of models": Bad(405, None, "method_not_allowed", b"", path="/v1/models"),
    "an unknown model's card": Bad(
        404, "model", "model_not_found", b"", method="GET", path="/v1/models/no/body"
    ),
    "an unknown scope": Bad(400, "scope", body=b"", method="GET", path="/metrics?scope=all"),
}


def send(client: httpx.Client, bad: Bad) -> httpx.Response:
    """The answer to a bad request."""
    content = json.dumps(bad.body).encode() if isinstance(bad.body, dict) else bad.body
    if isinstance(content, list):
        content = iter(content)  # without a length, so that it is sent in chunks
    headers = {"content-type": bad.content_type} if bad.content_type else {}
    return client.request(bad.method, bad.path, content=content, headers=headers)


@pytest.mark.parametrize("fault", REFUSED)
def test_bad_input_is_refused_in_words(server: Server, fault: str) -> None:
    """Each bad request gets its status and the error envelope, with the field that is wrong; a good one that
    follows is answered."""
    bad = REFUSED[fault]
    with http(server) as client:
        refused = send(client, bad)
        good = client.post(CHAT, json=GOOD)
    assert refused.status_code == bad.status, refused.text
    error = refused.json()["error"]
    assert list(refused.json()) == ["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["code"] == bad.code
    # A wrong item is named with its place: stop[0] for stop.
    assert error["param"] == bad.param or error["param"].startswith((f"{bad.param}[", f"{bad.param}."))
    assert not bad.param or bad.param in error["message"]
    assert refused.headers["content-type"] == "application/json"
    assert refused.headers["x-request-id"]
    assert good.json()["choices"][0]["message"]["content"] == TEXT


@pytest.mark.parametrize(
    ("param", "value"),
    [
        pytest.param(param, value, id=f"{param}={str(value)[:24]}")
        for param, (inside, _) in ENDS.items()
        for value in inside
    ],
)
def test_the_ends_of_a_range_are_good(server: Server, param: str, value: Any) -> None:
    """The last values within each range are accepted."""
    with http(server) as client:
        assert client.post(CHAT, json=GOOD | {param: value}).status_code == 200


def test_a_wrong_method_says_which_are_right(server: Server) -> None:
    """A 405 names the methods that the path takes."""
    with http(server) as client:
        assert client.get(CHAT).headers["allow"] == "POST"


async def test_bad_requests_disturb_nobody(server: Server) -> None:
    """A stream that runs while every kind of bad request comes in is complete and in order."""

    def send_all() -> None:
        with http(server) as client:
            for bad in REFUSED.values():
                send(client, bad)

    async with asking(server, chat(LONE, "a b c d", max_tokens=80, stream=True)) as stream:
        await stream.first()
        await asyncio.to_thread(send_all)
        await stream.end()
    assert stream.done
    assert stream.text() == " ".join(["a b c d"] * 20)
