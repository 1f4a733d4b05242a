from __future__ import annotations

from tests.end_to_end.echoes import ECHO
from tests.end_to_end.same import assert_streams_are_whole
from tests.end_to_end.server import Server


async def test_streams_are_whole(server: Server) -> None:
    """200 requests of every kind, each with a seed, have the same texts, finish_reasons, tokens and usage
    streamed and whole."""
    await assert_streams_are_whole(server, ECHO, requests=200, longest=64, at_once=200)
