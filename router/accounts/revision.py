"""Which version of the tables this code works with. `router.accounts.upgrade` brings a store there; a router
that finds it there need not load what that takes."""

from __future__ import annotations

from sqlalchemy import inspect, text

from router.accounts.store import Store, translated

REVISION = "0001"
"""The newest of the migrations."""


def is_current(store: Store) -> bool:
    """Whether the store's tables are of this version. Raises StoreDown where it does not answer."""
    with translated(), store.ledger_engine.connect() as connection:
        if not inspect(connection).has_table("alembic_version"):
            return False
        return connection.scalars(text("SELECT version_num FROM alembic_version")).all() == [REVISION]
