"""What an admin does over the API of a running server, and what stands in its store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import httpx
from sqlalchemy import func, select

from router.accounts.row import COLUMNS, Row
from router.accounts.schema import OPEN, requests
from router.accounts.store import Store
from tests.end_to_end.accounts import ADMIN_KEY, PRICES
from tests.end_to_end.server import Server


class Issued(NamedTuple):
    """A key, and what its holder sends."""

    id: str
    secret: str


class Office:
    """Somebody with an admin's key. Each question has a connection of its own, to any of the routers."""

    def __init__(self, server: Server, key: str = ADMIN_KEY) -> None:
        self._url = server.url
        self._headers = bearer(key)

    def ask(self, method: str, path: str, body: Any = None, **query: Any) -> httpx.Response:
        """What comes back, whatever its status."""
        with httpx.Client(base_url=self._url, timeout=60, trust_env=False, headers=self._headers) as client:
            return client.request(method, path, json=body, params=query)

    def get(self, path: str, **query: Any) -> Any:
        """What is told. It has to be told."""
        return self._good(self.ask("GET", path, **query))

    def account(self, name: str) -> str:
        """The id of a new member."""
        return str(self._good(self.ask("POST", "/api/accounts", {"name": name}))["id"])

    def key(
        self,
        name: str,
        *,
        account: str | None = None,
        models: Sequence[str] | None = None,
        limits: Mapping[str, Any] | None = None,
    ) -> Issued:
        """A new key of that account, or of the admin's own."""
        given = {"account_id": account, "models": models, "limits": limits}
        body = {"name": name} | {field: value for field, value in given.items() if value is not None}
        made = self._good(self.ask("POST", "/api/keys", body))
        return Issued(made["id"], made["key"])

    def revoke(self, key: Issued) -> None:
        """It is to work no more."""
        self._good(self.ask("DELETE", f"/api/keys/{key.id}"))

    def _good(self, answer: httpx.Response) -> Any:
        assert answer.status_code < 300, answer.text
        return answer.json()


def bearer(key: str, **headers: str) -> dict[str, str]:
    """The headers of a request with that key; `x_request_id` is x-request-id."""
    own = {name.replace("_", "-"): value for name, value in headers.items()}
    return {"authorization": f"Bearer {key}", **own}


def ledger(url: str, key_ids: Iterable[str]) -> list[Row]:
    """The rows of those keys' requests."""
    store = Store(url)
    try:
        with store.connect_ledger() as connection:
            query = select(*(requests.c[name] for name in COLUMNS)).where(requests.c.key_id.in_([*key_ids]))
            return [Row(**row) for row in connection.execute(query).mappings()]
    finally:
        store.ledger_engine.dispose()


def is_settled(url: str) -> bool:
    """Whether the store has no row of a request that is being answered."""
    store = Store(url)
    try:
        with store.connect_ledger() as connection:
            query = select(func.count()).select_from(requests).where(requests.c.outcome == OPEN)
            return not connection.execute(query).scalar_one()
    finally:
        store.ledger_engine.dispose()


def price(model: str, prompt_tokens: int, completion_tokens: int) -> int:
    """What so many tokens of a model cost, in nano-dollars."""
    for_prompt, for_completion = PRICES[model]
    return for_prompt * prompt_tokens + for_completion * completion_tokens
