"""The tables of the store. Moments are microseconds since 1970 (`_us`), money is nano-dollars (`_nano`), ids
are 32 hexadecimal digits.

`requests` is the ledger. A row is opened before the first byte of an answer and settled before its last.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    text,
)

OPEN = "open"
"""The outcome of a request that is being answered."""

INTERRUPTED = "interrupted"
"""The outcome of a request whose router died."""

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

accounts = Table(
    "accounts",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("name", String(200), nullable=False, unique=True),
    Column("role", String(16), nullable=False),  # admin or member
    Column("password", String(200), nullable=False),  # argon2's own notation
    Column("disabled", Boolean, nullable=False),
    Column("limits", JSON, nullable=False),  # accounts.limits.KeyLimits, of all its keys together
    Column("created_us", BigInteger, nullable=False),
)

keys = Table(
    "keys",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("account_id", String(32), ForeignKey("accounts.id"), nullable=False, index=True),
    Column("name", String(200), nullable=False),
    Column("kind", String(16), nullable=False),  # api, or console: what an account does there
    Column("prefix", String(16), nullable=False),  # what is shown of it; empty for the console
    Column("digest", LargeBinary(32), nullable=False),  # SHA-256 of the whole key
    Column("models", JSON, nullable=True),  # names in the catalog's case; null: all
    Column("limits", JSON, nullable=False),  # accounts.limits.KeyLimits
    Column("created_us", BigInteger, nullable=False),
    Column("revoked_us", BigInteger, nullable=True),
)

sessions = Table(
    "sessions",
    metadata,
    Column("id", String(64), primary_key=True),  # SHA-256 of what the cookie holds
    Column("account_id", String(32), ForeignKey("accounts.id"), nullable=False, index=True),
    Column("created_us", BigInteger, nullable=False),
    Column("expires_us", BigInteger, nullable=False),
)

failures = Table(
    "failures",  # to log in, lately
    metadata,
    Column("subject", String(80), primary_key=True),
    Column("times", Integer, nullable=False),
    Column("last_us", BigInteger, nullable=False),
)

secrets = Table(
    "secrets",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("value", LargeBinary(64), nullable=False),
)

revisions = Table(
    "revisions",  # one row, "access": it grows with each change of accounts and keys
    metadata,
    Column("name", String(64), primary_key=True),
    Column("value", BigInteger, nullable=False),
)

routers = Table(
    "routers",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("began_us", BigInteger, nullable=False),
    Column("seen_us", BigInteger, nullable=False),
)

requests = Table(
    "requests",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("router", String(32), nullable=False),
    Column("account_id", String(32), nullable=False),
    Column("key_id", String(32), nullable=False),
    Column("request_id", String(128), nullable=False),  # the client's own, or again the id
    Column("path", String(64), nullable=False),
    Column("model", String(200), nullable=False),  # in the catalog's case, the alias where one was asked for
    Column("replica", String(200), nullable=False),
    Column("stream", Boolean, nullable=False),
    Column("status", Integer, nullable=False),
    Column("outcome", String(16), nullable=False),  # router.metrics.Outcome, OPEN or INTERRUPTED
    Column("error", String(64), nullable=False),  # its code
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("price_nano", BigInteger, nullable=False),
    Column("began_us", BigInteger, nullable=False),
    Column("first_us", BigInteger, nullable=True),  # from its beginning to the first bytes
    Column("duration_us", BigInteger, nullable=True),
    Column("user_agent", String(200), nullable=False),
    Index("ix_requests_began", "began_us"),
    Index("ix_requests_account_began", "account_id", "began_us"),
    Index("ix_requests_key_began", "key_id", "began_us"),
    Index(
        "ix_requests_open",
        "router",
        sqlite_where=text("outcome = 'open'"),
        postgresql_where=text("outcome = 'open'"),
    ),
)

texts = Table(
    "texts",  # only where the configuration asks for it
    metadata,
    Column("id", String(32), primary_key=True),
    Column("asked", Text, nullable=False),
    Column("answered", Text, nullable=False),
)

days = Table(
    "days",  # sums of requests that are no longer kept
    metadata,
    Column("day", String(10), primary_key=True),  # 2026-11-30, by UTC
    Column("account_id", String(32), primary_key=True),
    Column("key_id", String(32), primary_key=True),
    Column("model", String(200), primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("price_nano", BigInteger, nullable=False),
)
