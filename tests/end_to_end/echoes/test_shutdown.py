from __future__ import annotations

import asyncio

from tests.end_to_end.client import ask, asking, chat
from tests.end_to_end.echoes import LONE, PAIR
from tests.end_to_end.server import Server


async def test_ctrl_c_lets_answers_end(server: Server) -> None:
    """Ctrl-C, which a terminal sends to every process of its foreground, lets the answers that have begun
    end, streamed and whole, then ends every process."""
    story = chat(PAIR, "a b c d", max_tokens=100)
    async with asyncio.TaskGroup() as tasks, asking(server, story | {"stream": True}) as stream:
        whole = tasks.create_task(ask(server, chat(LONE, "a b c d", max_tokens=120)))
        await stream.first()
        await asyncio.to_thread(server.stop)
        await stream.end()
    assert stream.done
    assert stream.text() == " ".join(["a b c d"] * 25)
    assert whole.result().text() == " ".join(["a b c d"] * 30)
