"""Money, in whole nano-dollars: sums of it are exact, and so are Redis's and Lua's, up to nine million
dollars."""

from __future__ import annotations

from decimal import Decimal

NANO = 1_000_000_000
"""Nano-dollars in a dollar."""


def nano(dollars: Decimal) -> int:
    """Dollars in nano-dollars, rounded down."""
    return int(dollars * NANO)


def dollars(nano_dollars: int) -> str:
    """Nano-dollars as decimal dollars without an exponent, to the last digit: `0.00042`."""
    return f"{Decimal(nano_dollars).scaleb(-9).normalize():f}"
