from __future__ import annotations

import asyncio
import signal

from tests.end_to_end.client import asking, chat
from tests.end_to_end.server import Server
from tests.end_to_end.smollm import SMOLLM


async def test_sigterm_lets_a_stream_end(server: Server) -> None:
    """SIGTERM to the command alone lets a running stream of the real engine end, then ends every process of
    the deployment, engine and workers too."""
    body = chat(SMOLLM, "Tell me a long story.", max_tokens=60, ignore_eos=True, stream=True)
    async with asking(server, body) as stream:
        await stream.first()
        await asyncio.to_thread(server.stop, signal.SIGTERM)
        await stream.end()
    assert stream.done
    assert stream.finish_reason() == "length"
