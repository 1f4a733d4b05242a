from __future__ import annotations

import time
from statistics import mean

import pytest

from tests.end_to_end.client import ask, ask_all, chat
from tests.end_to_end.conftest import Report
from tests.end_to_end.server import Server
from tests.end_to_end.smollm import ECHO, SMOLLM

STREAMS = 32
TOKENS = {ECHO: 10, SMOLLM: 16}
"""Of each stream; every text is made once alone, so that more of them would take minutes."""

ALIKE = {ECHO: STREAMS, SMOLLM: STREAMS - 2}
"""How many texts must be those of the stream alone: batching may flip a near tie of a real model's logits."""


@pytest.mark.parametrize("model", ALIKE)
async def test_streams_share_the_engine(server: Server, model: str, report: Report) -> None:
    """32 streams at once take less than 8 times as long as one, and each has the text that it has alone."""
    requests = [
        chat(
            model,
            f"Write a long story that begins in the year {1850 + number}.",
            max_tokens=TOKENS[model],
            temperature=0,
            stream=True,
            ignore_eos=True,
        )
        for number in range(STREAMS)
    ]
    alone = [await ask(server, request) for request in requests]
    began = time.perf_counter()
    together = await ask_all(server, requests)
    took = time.perf_counter() - began

    assert all(answer.done and answer.finish_reason() == "length" for answer in (*alone, *together))
    one = mean(answer.seconds for answer in alone)
    alike = sum(a.text() == b.text() for a, b in zip(alone, together, strict=True))
    report(
        f"{model}: 32 streams at once",
        f"{took:.1f} s, {took / one:.1f} times one alone (promised: under 8), {alike} texts alike",
    )
    assert took < 8 * one
    assert alike >= ALIKE[model]
