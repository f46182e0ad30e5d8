"""The client's address: believed only from trusted proxies, and kept only as far as the site says."""

from ipaddress import ip_network
from typing import Literal

import pytest

from appliance.collect.client import client_address, kept_address

TRUSTED = [ip_network(text) for text in ("172.16.0.0/12", "10.0.0.1/32", "fd00::/8")]

FORWARDED: dict[str, tuple[str | None, str | None, str | None]] = {
    "no proxy": ("192.0.2.1", None, "192.0.2.1"),
    "a stranger's claim": ("192.0.2.1", "198.51.100.7", "192.0.2.1"),
    "a stranger's claim to be a proxy's client": ("192.0.2.1", "172.16.0.1, 10.0.0.1", "192.0.2.1"),
    "a trusted proxy's word": ("172.16.0.1", "198.51.100.7", "198.51.100.7"),
    "what the client wrote before its proxy": ("172.16.0.1", "203.0.113.9, 198.51.100.7", "198.51.100.7"),
    "a chain of trusted proxies": ("172.16.0.1", "198.51.100.7, 10.0.0.1, 172.31.255.255", "198.51.100.7"),
    "a stranger in the middle": ("172.16.0.1", "203.0.113.9, 10.0.0.2, 10.0.0.1", "10.0.0.2"),
    "proxies alone": ("172.16.0.1", "10.0.0.1, 172.16.0.9", "10.0.0.1"),
    "an empty header": ("172.16.0.1", "", "172.16.0.1"),
    "garbage": ("172.16.0.1", "unknown", "172.16.0.1"),
    "garbage behind a proxy": ("172.16.0.1", "198.51.100.7, _hidden, 10.0.0.1", "10.0.0.1"),
    "SQL": ("172.16.0.1", "'; DROP TABLE events_log; --", "172.16.0.1"),
    "commas": ("172.16.0.1", ",,,", "172.16.0.1"),
    "a thousand hops of garbage": ("172.16.0.1", "x," * 1000, "172.16.0.1"),
    "octal digits": ("172.16.0.1", "010.0.0.1", "172.16.0.1"),
    "a number": ("172.16.0.1", "3221225985", "172.16.0.1"),
    "IPv6": ("fd00::1", "2001:db8::7", "2001:db8::7"),
    "IPv6 in brackets": ("172.16.0.1", "[2001:db8::7]", "2001:db8::7"),
    "IPv6 with a zone": ("fe80::1%eth0", None, "fe80::1"),
    "IPv4 mapped into IPv6": ("::ffff:192.0.2.1", None, "192.0.2.1"),
    "a proxy mapped into IPv6": ("::ffff:172.16.0.1", "198.51.100.7", "198.51.100.7"),
    "a mapped client": ("172.16.0.1", "::ffff:198.51.100.7", "198.51.100.7"),
    "a Unix socket": ("", "198.51.100.7", None),
    "no peer": (None, None, None),
}


@pytest.mark.parametrize(("peer", "forwarded", "client"), FORWARDED.values(), ids=FORWARDED)
def test_only_trusted_proxies_are_believed(peer: str | None, forwarded: str | None, client: str | None) -> None:
    assert client_address(peer, forwarded, TRUSTED) == client


def test_nobody_is_trusted_unless_configured() -> None:
    assert client_address("127.0.0.1", "198.51.100.7", []) == "127.0.0.1"


KEPT: dict[str, tuple[str | None, Literal["keep", "truncate", "drop"], str | None]] = {
    "keep": ("192.0.2.77", "keep", "192.0.2.77"),
    "keep IPv6": ("2001:db8:1:2::3", "keep", "2001:db8:1:2::3"),
    "truncate to /24": ("192.0.2.77", "truncate", "192.0.2.0"),
    "truncate to /48": ("2001:db8:1:2::3", "truncate", "2001:db8:1::"),
    "drop": ("192.0.2.77", "drop", None),
    "keep nothing": (None, "keep", None),
    "truncate nothing": (None, "truncate", None),
}


@pytest.mark.parametrize(("address", "policy", "kept"), KEPT.values(), ids=KEPT)
def test_a_site_keeps_as_much_of_an_address_as_it_says(
    address: str | None, policy: Literal["keep", "truncate", "drop"], kept: str | None
) -> None:
    assert kept_address(address, policy) == kept
