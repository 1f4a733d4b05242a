"""Which routers live, by the store's own clock: one that has been silent for LEASE_S seconds is dead, and
what it had open is interrupted. Whoever was taken for dead and lives says so with its next beat, and what it
settles then counts.
"""

from __future__ import annotations

from time import monotonic

from sqlalchemy import BigInteger, Connection, cast, delete, extract, func, literal, select, update
from sqlalchemy.sql import ColumnElement

from router.accounts.schema import INTERRUPTED, OPEN, requests, routers
from router.accounts.store import insert_into, now_us

BEAT_S = 2.0
"""Seconds between two signs of life."""

LEASE_S = 10.0
"""Seconds of silence after which a router is dead."""


class Router:
    """One router, as the others see it. Its methods run in the ledger's thread."""

    def __init__(self, identity: str, name: str) -> None:
        """`identity`: of this process alone. `name` is for people."""
        self.identity = identity
        self._name = name
        self._alive_since = monotonic()
        self._beaten = monotonic()

    def beat(self, connection: Connection) -> None:
        """Say that this router lives."""
        now = monotonic()
        if now - self._beaten > LEASE_S:
            self._alive_since = now
        moment = _now(connection)
        insert = insert_into(connection.dialect, routers).values(
            id=self.identity, name=self._name, began_us=moment, seen_us=moment
        )
        connection.execute(
            insert.on_conflict_do_update(index_elements=[routers.c.id], set_={"seen_us": moment})
        )
        self._beaten = now

    def live(self, connection: Connection) -> int:
        """Say so, and interrupt what dead routers have left open; how many requests that were."""
        self.beat(connection)
        if monotonic() - self._alive_since < LEASE_S:
            return 0  # where the store was away, the others get the time to come back to it
        horizon = _now(connection) - literal(int(LEASE_S * 1_000_000), BigInteger)
        connection.execute(delete(routers).where(routers.c.seen_us < horizon))
        interrupted = connection.execute(
            update(requests)
            .where(requests.c.outcome == OPEN, requests.c.router.not_in(select(routers.c.id)))
            .values(outcome=INTERRUPTED)
        )
        return interrupted.rowcount

    def leave(self, connection: Connection) -> None:
        """Say goodbye: whatever is open now will not be settled."""
        connection.execute(delete(routers).where(routers.c.id == self.identity))
        connection.execute(
            update(requests)
            .where(requests.c.outcome == OPEN, requests.c.router == self.identity)
            .values(outcome=INTERRUPTED)
        )


def _now(connection: Connection) -> ColumnElement[int]:
    """The moment by the store's clock, which all routers share; a file is on one machine."""
    if connection.dialect.name == "postgresql":
        return cast(extract("epoch", func.clock_timestamp()) * 1_000_000, BigInteger)
    return literal(now_us(), BigInteger)
