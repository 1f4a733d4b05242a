from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest

from router.accounts.schema import INTERRUPTED, OPEN
from tests.end_to_end.accounts import PACED
from tests.end_to_end.accounts.office import Issued, Office, bearer, is_settled, ledger
from tests.end_to_end.accounts.told import STREAM, Told, assert_kept, hear
from tests.end_to_end.client import chat
from tests.end_to_end.conftest import Report
from tests.end_to_end.server import Server, until

STREAMS = 40

LEASES_S = 60
"""Seconds within which what a dead router's requests held has to be free again."""


@pytest.mark.slow
async def test_a_router_dies_alone(server: Server, office: Office, store: str, report: Report) -> None:
    """When one of two routers is killed its open rows are interrupted, and only its: the other's streams end
    as ever, each in the ledger. What the dead one's requests held of a limit is free again after a while."""
    limits = {"models": {PACED: {"concurrent_requests": STREAMS}}}
    key = office.key("dying", limits=limits)
    streams = [asyncio.create_task(stream(server, key, f"dying-{number}", 400)) for number in range(STREAMS)]
    await asyncio.to_thread(until, lambda: len(ledger(store, [key.id])) == STREAMS, 30, "all rows")
    assert {row.outcome for row in ledger(store, [key.id])} == {OPEN}
    server.routers()[random.choice([*server.routers()])].kill()  # noqa: S311 - any of them
    told = {one.name: one for one in await asyncio.gather(*streams)}
    await asyncio.to_thread(until, lambda: is_settled(store), 60, "the end of every request")

    rows = ledger(store, [key.id])
    assert {row.request_id for row in rows} == told.keys()
    died = {row.router for row in rows if row.outcome == INTERRUPTED}
    assert len(died) == 1
    for row in rows:
        if row.router in died:
            assert not told[row.request_id].complete
        else:
            assert_kept(row, told[row.request_id])

    waited_s = await free_again(server, key)
    await asyncio.to_thread(until, lambda: len(server.routers()) == 2, 60, "another router")
    outcomes = dict(Counter(row.outcome for row in rows))
    report("one of two routers killed", f"{outcomes}, all places free again {waited_s:.0f} s later")


async def free_again(server: Server, key: Issued) -> float:
    """The seconds until as many may run at once as before."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with asyncio.timeout(LEASES_S):
        for round_ in range(10_000):
            names = [f"after-{round_}-{number}" for number in range(STREAMS)]
            tried = await asyncio.gather(*(stream(server, key, name, 100) for name in names))
            if all(one.complete and one.begun for one in tried):
                break
    return loop.time() - began


async def stream(server: Server, key: Issued, name: str, tokens: int) -> Told:
    """An answer of so many tokens, a hundred a second."""
    body = chat(PACED, "a b c", max_tokens=tokens) | STREAM
    return await hear(server, body, bearer(key.secret, x_request_id=name))
