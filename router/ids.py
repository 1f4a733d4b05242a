"""Ids of our own making."""

from __future__ import annotations

import os
import time


def new_id() -> str:
    """32 hexadecimal digits that nobody has had before. Later ones sort behind earlier ones, so that an index
    of them grows at its end."""
    return f"{time.time_ns() // 1000:014x}{os.urandom(9).hex()}"
