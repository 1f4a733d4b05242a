"""Ids of our own making: 32 hexadecimal digits that nobody has had before."""

from __future__ import annotations

import os
import time


def new_id() -> str:
    """Any such id: its first digits tell it from others."""
    return os.urandom(16).hex()


def next_id() -> str:
    """One that sorts behind all earlier ones, so that an index of them grows at its end."""
    return f"{time.time_ns() // 1000:014x}{os.urandom(9).hex()}"
