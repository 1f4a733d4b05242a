"""What a stream and a whole answer of one request have in common: everything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.end_to_end.bodies import seeded
from tests.end_to_end.client import Exchange, ask_all
from tests.end_to_end.server import Server

STREAM = {"stream": True, "stream_options": {"include_usage": True}}


async def assert_streams_are_whole(server: Server, model: str, *, requests: int, longest: int) -> None:
    """So many requests of every kind have the same texts, finish_reasons, logprobs and usage both ways."""
    bodies = [seeded(number, model, longest) for number in range(requests)]
    whole = await ask_all(server, bodies)
    streamed = await ask_all(server, [body | STREAM for body in bodies])
    for body, one, other in zip(bodies, whole, streamed, strict=True):
        assert one.status == other.status == 200, (body, one.body, other.body)
        assert _said(one) == _said(other), body


def _said(answer: Exchange) -> dict[str, Any]:
    """What an answer says, without what one of equal requests may have found in a cache."""
    usage: Mapping[str, Any] = answer.usage
    return {
        "choices": [
            (answer.text(choice), answer.finish_reason(choice), answer.logprobs(choice))
            for choice in range(answer.choices)
        ],
        "usage": {name: count for name, count in usage.items() if name.endswith("_tokens")},
    }
