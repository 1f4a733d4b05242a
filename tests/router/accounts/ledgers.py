"""Rows of a ledger, as a router would have written them."""

from __future__ import annotations

from datetime import date
from typing import Any

from router.accounts.usage import start_us

MONDAY = start_us(date(2026, 11, 30))
"""The moment at which a day begins that is the last of its month."""


def row(number: int, **fields: Any) -> dict[str, Any]:
    """A row of `requests`, whose id is that number."""
    row = {
        "id": f"{number:032x}",
        "router": "r",
        "account_id": "ada",
        "key_id": "ada-1",
        "request_id": f"job-{number}",
        "path": "/v1/completions",
        "model": "echo",
        "replica": "echo-0",
        "stream": False,
        "status": 200,
        "outcome": "completed",
        "error": "",
        "prompt_tokens": 1,
        "completion_tokens": 2,
        "price_nano": 3,
        "began_us": MONDAY,
        "first_us": 1000,
        "duration_us": 2000,
        "user_agent": "curl",
    }
    return row | fields
