"""How the two ends of a trunk prove to each other that they know the deployment's secret.

Each sends a nonce and gets back an HMAC-SHA256 over its role and both nonces. The secret itself never
crosses the wire, and a proof of one role, or of one connection, is worth nothing in another.
"""

from __future__ import annotations

import hmac
import secrets
from typing import Literal

from serving.messages import PROTOCOL

NONCE_BYTES = 32


class HandshakeFailed(Exception):
    """The peer does not know the secret, or speaks another protocol."""


def nonce() -> bytes:
    """A fresh challenge."""
    return secrets.token_bytes(NONCE_BYTES)


def prove(secret: bytes, role: Literal["router", "replica"], theirs: bytes, ours: bytes) -> bytes:
    """The proof of `role` for the peer's nonce `theirs`, bound to our own."""
    return hmac.digest(secret, b"trunkline %d %b %b%b" % (PROTOCOL, role.encode(), theirs, ours), "sha256")


def verify(
    secret: bytes, role: Literal["router", "replica"], proof: bytes, theirs: bytes, ours: bytes
) -> None:
    """Raises HandshakeFailed unless `proof` is the peer's, who has `role`, for our nonce `ours`."""
    if len(theirs) != NONCE_BYTES or not hmac.compare_digest(proof, prove(secret, role, ours, theirs)):
        raise HandshakeFailed(f"the {role} does not know this deployment's secret")
