"""A single router on a store in a file: its first start, its deaths, and its second start."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import yaml

from router.accounts.row import Row
from router.ids import new_id
from tests.end_to_end.accounts import ECHO, PACED
from tests.end_to_end.accounts.conftest import paced, prices
from tests.end_to_end.accounts.office import Office, bearer, is_settled, ledger
from tests.end_to_end.accounts.told import STREAM, Told, assert_kept, hear, words
from tests.end_to_end.client import Exchange, chat
from tests.end_to_end.conftest import Report
from tests.end_to_end.server import TRUNKLINE, Server, free_port, http, serving, until

STREAMS = 100

MOMENTS = 4000
"""Pieces of answers that have come, at most, when a router dies: of the first streams and of later ones."""

CONFIG: Mapping[str, Any] = {
    "accounts": {},
    "models": [{"name": ECHO, "engine": "echo", "price": prices(ECHO)}, paced(30)],
}

SHOWN = re.compile(r"account +(\S+)\n +password +(\S+)\n +key +(tk-\S+)\n")


class Place(NamedTuple):
    """Where a server keeps what it has, and what it said at its first start."""

    folder: Path
    server: Server
    account: str
    password: str
    key: str

    @property
    def store(self) -> str:
        """The URL of its store."""
        return f"sqlite:///{self.folder}/data/trunkline.db"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A server that has been started for the first time."""
    folder = tmp_path_factory.mktemp("one-router")
    with serving(CONFIG, folder) as server:
        (shown,) = SHOWN.findall(server.said)
        yield Place(folder, server, *shown)


# ---- the first start -----------------------------------------------------------------------------------


def test_the_first_start_shows_an_account_and_a_key(place: Place) -> None:
    """The account, its password and the key that a first start shows are good, and it shows them once; the
    curl line that it ends with gets an answer."""
    office = Office(place.server, place.key)
    assert office.get("/api/me")["account"]["name"] == place.account
    change = {"old": place.password, "new": place.password}
    assert office.ask("POST", "/api/me/password", change).status_code == 200
    assert place.server.said.count(place.password) == 1
    assert answer_of(curl_line(place.server))["usage"]["completion_tokens"] > 0
    assert "shown this once" in place.server.said


def test_a_file_is_one_deployments(place: Place) -> None:
    """On the file of a running deployment no second one starts, and it says why."""
    refused = trunkline(
        "serve", place.folder / "config.yaml", "--port", str(free_port()), folder=place.folder
    )
    assert refused.returncode == 1
    assert f"accounts.store: another deployment runs on {place.folder}/data/trunkline.db" in refused.stderr
    assert "starting" not in refused.stdout
    assert "Traceback" not in refused.stderr


# ---- kill -9 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deaths", [2, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.timeout(1500)
async def test_what_a_client_saw_outlives_its_router(place: Place, report: Report, deaths: int) -> None:
    """When the router is killed amid a hundred streams, at any moment, the ledger has each stream whose end a
    client saw, with its exact usage, and every other one that had begun as interrupted; and a new router
    serves."""
    sums: Counter[str] = Counter()
    back_s = []
    for _ in range(deaths):
        streams = Streams(place)
        back_s.append(await streams.run_into_a_death())
        sums += streams.sums(ledger(place.store, [streams.key.id]))
    assert sums["interrupted"] > deaths * STREAMS / 2
    assert sums["completed"] > 0
    report(
        f"the router killed amid {STREAMS} streams, {deaths} times",
        f"{dict(sums)}; the next one serves after {min(back_s):.1f} to {max(back_s):.1f} s",
    )


class Streams:
    """Clients that stream, one answer after the other, until nobody answers."""

    def __init__(self, place: Place) -> None:
        self.key = Office(place.server, place.key).key("streams")
        self.told: list[Told] = []
        self._place = place
        self._chance = random.Random()  # noqa: S311 - another moment each time
        self._heard = 0
        self._moment = self._chance.randint(1, MOMENTS)
        self._now = asyncio.Event()

    async def run_into_a_death(self) -> float:
        """Kill the router at some moment; the seconds until another one serves. Then every row is settled."""
        server, store = self._place.server, self._place.store
        (router,) = server.routers().values()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(STREAMS):
                tasks.create_task(self._client())
            async with asyncio.timeout(60):
                await self._now.wait()
            router.kill()
        back_s = await asyncio.to_thread(until, lambda: answers(server), 60, "another router")
        async with asyncio.timeout(30):
            while not (told := await self._ask()).complete or not told.begun:
                pass
        await asyncio.to_thread(until, lambda: is_settled(store), 60, "the end of every request")
        return back_s

    async def _client(self) -> None:
        while (await self._ask()).status:
            if not (self.told[-1].complete or self.told[-1].left):
                return

    async def _ask(self) -> Told:
        chance = self._chance
        body = chat(PACED, "a b c", max_tokens=chance.randint(5, 40), n=chance.choice([1, 1, 2])) | STREAM
        if chance.random() < 0.05:
            body["n"] = 0
        few = chance.randint(1, 10) if chance.random() < 0.1 else 1000

        def enough(answer: Exchange) -> bool:
            self._heard += 1
            if self._heard >= self._moment:
                self._now.set()
            return few < 1000 and not answer.done and words(answer) > few

        told = await hear(self._place.server, body, bearer(self.key.secret, x_request_id=new_id()), enough)
        self.told.append(told)
        return told

    def sums(self, found: list[Row]) -> Counter[str]:
        """What became of them, each as it must have: `found` is what the ledger has of them."""
        rows = {row.request_id: row for row in found}
        assert len(rows) == len(found)
        assert rows.keys() <= {told.name for told in self.told}
        return Counter(became(told, rows.get(told.name)) for told in self.told)


def became(told: Told, row: Row | None) -> str:
    """What a request became, by its row."""
    if row is None:
        assert not told.status
        return "never began"
    if told.complete:
        assert_kept(row, told)
        return row.outcome
    if row.outcome == "cancelled":
        assert told.left
        assert told.completion_tokens <= row.completion_tokens <= told.most
    elif row.outcome == "completed":
        # The last bytes were on their way when the router died.
        assert not told.left
        assert row.completion_tokens == told.most
        return "completed, and its end unseen"
    else:
        assert row.outcome == ("refused" if told.most == 0 else "interrupted")
        assert (row.prompt_tokens, row.completion_tokens, row.price_nano) == (0, 0, 0)
    return row.outcome


def answers(server: Server) -> bool:
    """Whether there is anyone to ask."""
    try:
        with http(server) as client:
            return bool(client.get("/health").json()["models"][PACED] == "ready")
    except httpx.TransportError:
        return False


# ---- the second start ----------------------------------------------------------------------------------


def test_a_second_start_shows_nothing(place: Place) -> None:
    """A server that starts on a store with accounts shows no account and no key, and knows those that are
    there; its curl line takes the key from the environment."""
    before = len(Office(place.server, place.key).get("/api/requests", limit=500)["data"])
    assert before
    place.server.stop()
    with serving(CONFIG, place.folder) as server:
        assert not SHOWN.search(server.said)
        assert place.key not in server.said
        assert len(Office(server, place.key).get("/api/requests", limit=500)["data"]) == before
        answer = answer_of(curl_line(server), TRUNKLINE_KEY=place.key)
        assert answer["usage"]["completion_tokens"] > 0


def curl_line(server: Server) -> str:
    """What a server ends its start with."""
    (line,) = [line for line in server.said.splitlines() if line.startswith("curl ")]
    return line


def answer_of(line: str, **environment: str) -> Any:
    """What a person who copies that line into a shell sees."""
    shell = ["bash", "-c", f"{line} --silent --show-error --fail"]
    done = subprocess.run(
        shell, capture_output=True, text=True, timeout=60, env={**os.environ, **environment}, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# ---- what is refused before anything starts ------------------------------------------------------------


@pytest.mark.parametrize(
    ("accounts", "words"),
    [
        ({}, "accounts.store: a store in a file is for one router, and routers is 2"),
        (
            {"store": "postgresql://trunkline@127.0.0.1/trunkline"},
            "accounts.redis: 2 routers count limits together in Redis",
        ),
    ],
)
def test_several_routers_need_what_they_share(
    tmp_path: Path, accounts: Mapping[str, str], words: str
) -> None:
    """`trunkline check` refuses several routers on a store in a file, and several without Redis."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, "routers": 2, "accounts": accounts}))
    refused = trunkline("check", path, folder=tmp_path)
    assert refused.returncode == 2
    assert words in refused.stderr


def trunkline(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """What the command prints and how it ends. What it keeps is in `folder`."""
    return subprocess.run(
        [TRUNKLINE, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "TRUNKLINE_DATA": f"{folder}/data"},
        check=False,
    )
