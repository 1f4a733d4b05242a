"""What a stream and a whole answer of one request have in common: everything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.end_to_end.bodies import seeded
from tests.end_to_end.client import Exchange, ask_all
from tests.end_to_end.server import Server

STREAM = {"stream": True, "stream_options": {"include_usage": True}}


async def assert_streams_are_whole(
    server: Server, model: str, *, requests: int, longest: int, at_once: int
) -> None:
    """So many requests of every kind have the same texts, finish_reasons, tokens and usage both ways, when so
    many are asked at once: what shares a batch may change a real model's numbers in their last digits."""
    bodies = [seeded(number, model, longest) for number in range(requests)]
    for begin in range(0, requests, at_once):
        asked = bodies[begin : begin + at_once]
        whole = await ask_all(server, asked)
        streamed = await ask_all(server, [body | STREAM for body in asked])
        for body, one, other in zip(asked, whole, streamed, strict=True):
            assert one.status == other.status == 200, (body, one.body, other.body)
            assert _said(one) == _said(other), body


def _said(answer: Exchange) -> dict[str, Any]:
    """What an answer says, without what one of equal requests may have found in a cache."""
    usage: Mapping[str, Any] = answer.usage
    return {
        "choices": [
            (answer.text(choice), answer.finish_reason(choice), _tokens(answer.logprobs(choice)))
            for choice in range(answer.choices)
        ],
        "usage": {name: count for name, count in usage.items() if name.endswith("_tokens")},
    }


def _tokens(logprobs: list[Any]) -> list[str]:
    return [row["token"] if isinstance(row, dict) else row[0] for row in logprobs]
