"""Ids of our own making."""

from __future__ import annotations

import os


def new_id() -> str:
    """32 hexadecimal digits that nobody has had before."""
    return os.urandom(16).hex()
