"""Which replica takes a request. Pure: it looks at loads and decides."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol, TypeVar
from zlib import crc32

from serving.messages import Chat, Load, Request

PREFIX_CHARACTERS = 1024
"""How much of a conversation's beginning decides its affinity."""

KV_PRESSURE = 6.0
"""Weight of a KV cache that is more than half full: work that waits there waits longer. vLLM balances its
data-parallel engines by the same rule."""


SPREAD = 0x9E37_79B1
"""An odd number without a pattern: 2**32 over the golden ratio."""


class Candidate(Protocol):
    """A replica as far as the choice needs to know it."""

    @property
    def replica(self) -> str: ...
    @property
    def load(self) -> Load: ...
    @property
    def unreported(self) -> int: ...


C = TypeVar("C", bound=Candidate)


def expected_work(candidate: Candidate) -> float:
    """Sequences that a new one would share the replica with, those it has not yet told of included."""
    load = candidate.load
    pressure = KV_PRESSURE * max(0.0, load.kv_used - 0.5)
    return load.running + load.waiting * (1 + pressure) + candidate.unreported


def pick(candidates: Collection[C], request: Request) -> C | None:
    """The candidate with the least expected work; among equals, the one that this conversation's beginning
    has always gone to, whose prefix cache may hold it. None where there is no candidate.

    Looks at every candidate: with more than a few hundred replicas a router should hold a subset.
    """
    if len(candidates) < 2:
        return next(iter(candidates), None)
    least = min(map(expected_work, candidates))
    equals = [candidate for candidate in candidates if expected_work(candidate) == least]
    if len(equals) == 1:
        return equals[0]
    prefix = crc32(_beginning(request).encode())
    return max(equals, key=lambda candidate: _affinity(prefix, candidate.replica))


def _beginning(request: Request) -> str:
    """What requests that share a prefix cache have in common, as far as no tokenizer is needed to tell."""
    if isinstance(request, Chat):
        return (request.messages[0].content or "")[:PREFIX_CHARACTERS]
    prompt = request.prompts[0]
    if isinstance(prompt, str):
        return prompt[:PREFIX_CHARACTERS]
    return " ".join(map(str, prompt[: PREFIX_CHARACTERS // 4]))


def _affinity(prefix: int, replica: str) -> int:
    """How much a replica is the one for a prefix, the same in every router: 32 bits that look random."""
    # Two checksums differ by the same bits whatever the prefix: compared as they are, one replica of four
    # could get half of all conversations.
    return crc32(replica.encode(), prefix) * SPREAD & 0xFFFF_FFFF
