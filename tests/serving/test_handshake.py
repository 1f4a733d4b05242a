from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from serving.handshake import NONCE_BYTES, HandshakeFailed, nonce, prove, verify

Role = Literal["router", "replica"]

roles: st.SearchStrategy[Role] = st.sampled_from(["router", "replica"])
nonces = st.binary(min_size=NONCE_BYTES, max_size=NONCE_BYTES)
secrets = st.binary(min_size=1, max_size=64)


@given(secrets, roles, nonces, nonces)
def test_whoever_knows_the_secret_is_believed(secret: bytes, role: Role, mine: bytes, peers: bytes) -> None:
    """A proof holds for the role, the secret and the two nonces that it was made with."""
    proof = prove(secret, role, theirs=mine, ours=peers)
    verify(secret, role, proof, theirs=peers, ours=mine)


@given(secrets, secrets, roles, nonces, nonces)
def test_whoever_knows_another_secret_is_refused(
    secret: bytes, other: bytes, role: Role, mine: bytes, peers: bytes
) -> None:
    """A proof made with another secret is worth nothing."""
    # HMAC pads its key with zeros, so secrets that differ in those alone are the same one.
    assume(secret.rstrip(b"\0") != other.rstrip(b"\0"))
    with pytest.raises(HandshakeFailed):
        verify(secret, role, prove(other, role, theirs=mine, ours=peers), theirs=peers, ours=mine)


@given(secrets, nonces, nonces, nonces)
def test_a_proof_is_worth_nothing_elsewhere(secret: bytes, mine: bytes, peers: bytes, other: bytes) -> None:
    """A proof of the one role does not serve the other, and one of this connection no other connection."""
    assume(other not in {mine, peers})
    proof = prove(secret, "router", theirs=mine, ours=peers)
    for role, theirs, ours in (("replica", peers, mine), ("router", peers, other), ("router", other, mine)):
        with pytest.raises(HandshakeFailed):
            verify(secret, role, proof, theirs, ours)  # type: ignore[arg-type]


@given(secrets, st.binary(max_size=80), nonces)
def test_a_nonce_of_another_length_is_refused(secret: bytes, peers: bytes, mine: bytes) -> None:
    """Nonces have one length: what is proven cannot be cut in two places."""
    assume(len(peers) != NONCE_BYTES)
    with pytest.raises(HandshakeFailed):
        verify(secret, "router", prove(secret, "router", theirs=mine, ours=peers), theirs=peers, ours=mine)


def test_no_two_challenges_are_equal() -> None:
    """Every connection has a challenge of its own."""
    assert len({nonce() for _ in range(1000)}) == 1000
