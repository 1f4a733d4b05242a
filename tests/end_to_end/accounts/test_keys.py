from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from tests.end_to_end.accounts import CLOSED, ECHO
from tests.end_to_end.accounts.office import Issued, Office, bearer, ledger
from tests.end_to_end.client import ask, chat
from tests.end_to_end.conftest import Report
from tests.end_to_end.server import Server

PROMISED_S = 2.0

CLIENTS = 8

REFUSALS = 20
"""After so many in a row a client believes it."""

Undo = Callable[[Office, Issued, str], object]

WAYS: dict[str, tuple[Undo, int]] = {
    "the key is revoked": (lambda office, key, _: office.revoke(key), 401),
    "its account is disabled": (
        lambda office, _, account: office.ask("PATCH", f"/api/accounts/{account}", {"disabled": True}),
        401,
    ),
    "the model is taken from it": (
        lambda office, key, _: office.ask("PATCH", f"/api/keys/{key.id}", {"models": [CLOSED]}),
        403,
    ),
}


@pytest.mark.parametrize("way", WAYS)
async def test_what_is_taken_from_a_key_is_taken_everywhere(
    server: Server, office: Office, store: str, report: Report, way: str
) -> None:
    """Two seconds after a key was revoked, or its account disabled, or a model forbidden to it, no router
    lets it in any more."""
    undo, refusal = WAYS[way]
    account = office.account(f"holder-{[*WAYS].index(way)}")
    key = office.key("to be taken", account=account)
    answered: list[tuple[float, str]] = []
    enough = asyncio.Event()

    async def client(number: int) -> None:
        refused = 0
        while refused < REFUSALS:
            name = f"{number}-{len(answered)}"
            sent_at = time.perf_counter()
            answer = await ask(server, chat(ECHO, "hi", max_tokens=1), bearer(key.secret, x_request_id=name))
            if answer.status == 200:
                answered.append((sent_at, name))
                refused = 0
                if len(answered) > 100:
                    enough.set()
            else:
                assert answer.status == refusal, answer.body
                refused += 1

    async with asyncio.TaskGroup() as tasks:
        for number in range(CLIENTS):
            tasks.create_task(client(number))
        await enough.wait()
        await asyncio.to_thread(undo, office, key, account)
        undone_at = time.perf_counter()

    routers = {row.request_id: row.router for row in ledger(store, [key.id]) if row.status == 200}
    latest = dict.fromkeys(routers.values(), 0.0)
    for sent_at, name in answered:
        latest[routers[name]] = max(latest[routers[name]], sent_at - undone_at)
    assert len(latest) == 2
    assert max(latest.values()) < 5 * PROMISED_S
    seen = ", ".join(f"{seconds:.2f}" for seconds in sorted(latest.values()))
    report(f"{way}: let in until", f"{seen} s after (promised: {PROMISED_S:g})")


async def test_a_key_that_was_made_is_known_everywhere(server: Server, office: Office) -> None:
    """Whoever has a new key may use it at once, at any router; also after wrong ones were tried."""
    for _ in range(5):
        key = office.key("new")
        body = chat(ECHO, "hi", max_tokens=1)
        secrets = [key.secret, "tk-nobodys", key.secret, f"{key.secret}!"] * 5
        answers = await asyncio.gather(*(ask(server, body, bearer(secret)) for secret in secrets))
        expected = [200 if secret == key.secret else 401 for secret in secrets]
        assert [answer.status for answer in answers] == expected
