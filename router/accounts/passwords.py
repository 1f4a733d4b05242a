"""Passwords that nobody has chosen."""

from __future__ import annotations

import secrets
import string
from typing import Final

_LENGTH: Final = 20

_ALPHABET = string.ascii_letters + string.digits


def make_password() -> str:
    """A password that nobody guesses and everybody can copy."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(_LENGTH))
