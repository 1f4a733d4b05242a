from __future__ import annotations

from tests.end_to_end.same import assert_streams_are_whole
from tests.end_to_end.server import Server
from tests.end_to_end.smollm import SMOLLM


async def test_streams_are_whole(server: Server) -> None:
    """20 requests of every kind, each with a seed, have the same texts, finish_reasons, tokens and usage
    streamed and whole."""
    await assert_streams_are_whole(server, SMOLLM, requests=20, longest=12, at_once=1)
