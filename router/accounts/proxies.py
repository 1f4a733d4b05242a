"""Where a request comes from, also behind proxies that are trusted to say so."""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

from router.headers import Header

UNKNOWN = "unknown"

_WITH_PORT = re.compile(r"([0-9.]+):\d+|\[([^\]]*)\](?::\d+)?")
"""As some proxies write an address."""


def client_address(
    peer: str | None, headers: Sequence[Header], trusted: Sequence[IPv4Network | IPv6Network]
) -> str:
    """The address of the client: the peer's, or where that is a trusted proxy, the last one that such a proxy
    was called by and that is no trusted proxy itself. What stands before it anybody may have written."""
    address = _address(peer)
    named = b",".join(value for name, value in headers if name == b"x-forwarded-for").decode("latin-1")
    for before in reversed(named.split(",")):
        if address is None or not any(address in network for network in trusted):
            break
        forwarded = _address(before.strip())
        if forwarded is None:
            break
        address = forwarded
    return UNKNOWN if address is None else str(address)


def _address(text: str | None) -> IPv4Address | IPv6Address | None:
    """The address that a text is, with or without a port; None where it is none."""
    bare = _WITH_PORT.fullmatch(text or "")
    try:
        address = ip_address((bare[1] or bare[2]) if bare else text or "")
    except ValueError:
        return None
    # An IPv4 client of a socket that takes both.
    return getattr(address, "ipv4_mapped", None) or address
