from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.accounts.proxies import UNKNOWN, client_address

TRUSTED = [ip_network(network) for network in ("10.0.0.0/8", "192.0.2.7", "2001:db8::/32")]
CLIENT = "203.0.113.9"
STRANGER = "198.51.100.4"


def address(peer: str | None, *forwarded: str) -> str:
    """Whom a request comes from, by its peer and its headers X-Forwarded-For."""
    headers = [(b"host", b"h"), *((b"x-forwarded-for", each.encode("latin-1")) for each in forwarded)]
    return client_address(peer, headers, TRUSTED)


@pytest.mark.parametrize("forwarded", [[], [CLIENT], ["10.0.0.1"], ["nonsense"]])
def test_whoever_is_not_trusted_is_the_client(forwarded: list[str]) -> None:
    """What a stranger says of where it comes from counts for nothing."""
    assert address(STRANGER, *forwarded) == STRANGER


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        # A proxy tells, and nothing before its client counts.
        ("10.1.2.3", [CLIENT], CLIENT),
        ("10.1.2.3", [f"{STRANGER}, {CLIENT}"], CLIENT),
        ("10.1.2.3", [STRANGER, CLIENT], CLIENT),
        ("10.1.2.3", [f"10.9.9.9, {CLIENT}"], CLIENT),
        # A chain of proxies.
        ("10.1.2.3", [f"{CLIENT}, 192.0.2.7,10.0.0.1"], CLIENT),
        ("2001:db8::1", ["2001:db9::5"], "2001:db9::5"),
        # Nobody but proxies.
        ("10.1.2.3", [], "10.1.2.3"),
        ("10.1.2.3", ["10.0.0.1"], "10.0.0.1"),
        # What is no address.
        ("10.1.2.3", [""], "10.1.2.3"),
        ("10.1.2.3", ["unknown"], "10.1.2.3"),
        ("10.1.2.3", [f"{CLIENT}, _hidden"], "10.1.2.3"),
        ("10.1.2.3", [f"{CLIENT}, <script>, 10.0.0.1"], "10.0.0.1"),
        # With a port.
        ("10.1.2.3", [f"{CLIENT}:4711"], CLIENT),
        ("10.1.2.3", ["[2001:db9::5]:4711"], "2001:db9::5"),
        ("10.1.2.3", ["[2001:db9::5]"], "2001:db9::5"),
        # Of a socket that takes both.
        ("::ffff:10.1.2.3", [CLIENT], CLIENT),
        ("10.1.2.3", [f"::ffff:{CLIENT}"], CLIENT),
        (f"::ffff:{STRANGER}", [CLIENT], STRANGER),
        # Of a socket that has none.
        (None, [CLIENT], UNKNOWN),
        ("", [CLIENT], UNKNOWN),
        ("/run/socket", [CLIENT], UNKNOWN),
    ],
)
def test_a_trusted_proxy_says_whom_it_was_called_by(
    peer: str | None, forwarded: list[str], client: str
) -> None:
    """The client is the last one that a trusted proxy names and that is none itself."""
    assert address(peer, *forwarded) == client


def test_without_trusted_proxies_the_peer_is_the_client() -> None:
    """Unless the configuration names one, nobody is believed, this machine neither."""
    assert client_address("127.0.0.1", [(b"x-forwarded-for", CLIENT.encode())], ()) == "127.0.0.1"


@given(st.text(max_size=30), st.lists(st.binary(max_size=60), max_size=3))
def test_whatever_comes_is_an_address_or_unknown(peer: str, forwarded: list[bytes]) -> None:
    """No text of a stranger's gets any further than this."""
    for called in (peer, "10.1.2.3"):
        found = client_address(called, [(b"x-forwarded-for", each) for each in forwarded], TRUSTED)
        assert found == UNKNOWN or ip_address(found)
