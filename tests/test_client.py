"""The client's address: believed only from trusted proxies, and kept only as far as the site says."""

from ipaddress import ip_address, ip_network
from typing import Any, Literal

import pytest

from appliance.collect.client import (
    client_address,
    is_local,
    is_unnamed_proxy,
    kept_address,
    limited_as,
    parse_address,
    rate_key,
)

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
    "with a port": ("172.16.0.1", "198.51.100.7:50123", "198.51.100.7"),
    "IPv6 with a port": ("172.16.0.1", "[2001:db8::7]:50123", "2001:db8::7"),
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
    assert address_of(peer, forwarded_for=forwarded) == client


def address_of(
    peer: str | None, *, forwarded_for: str | None = None, forwarded: str | None = None, trusted: Any = TRUSTED
) -> str | None:
    found = client_address(peer, forwarded_for=forwarded_for, forwarded=forwarded, trusted=trusted)
    return str(found) if found else None


def test_nobody_is_trusted_unless_configured() -> None:
    assert address_of("127.0.0.1", forwarded_for="198.51.100.7", trusted=[]) == "127.0.0.1"


RFC_7239: dict[str, tuple[str, str]] = {
    "an address": ("for=198.51.100.7", "198.51.100.7"),
    "in any case, with other parameters": ("By=203.0.113.43;FOR=198.51.100.7;proto=https", "198.51.100.7"),
    "IPv6 with a port": ('for="[2001:db8::17]:4711"', "2001:db8::17"),
    "a chain": ("for=203.0.113.9, for=198.51.100.7;proto=http, for=10.0.0.1", "198.51.100.7"),
    "hidden": ("for=_hidden", "172.16.0.1"),
    "unknown": ("for=unknown", "172.16.0.1"),
    "no for": ("proto=https", "172.16.0.1"),
    "not-for": ("xfor=198.51.100.7", "172.16.0.1"),
    "garbage": (";;;,=,", "172.16.0.1"),
    "what a visitor has put into Host": ('for=198.51.100.7;host="x,for=203.0.113.6"', "198.51.100.7"),
    "the same before it": ('host="x;for=203.0.113.6";for=198.51.100.7', "198.51.100.7"),
    "an escaped quote": ('host="x\\",for=203.0.113.6";for=198.51.100.7', "198.51.100.7"),
    "a quote without an end": ('for=198.51.100.7;host="x,for=203.0.113.6', "172.16.0.1"),
    "spaces": (" for = 198.51.100.7 ; proto=https ", "198.51.100.7"),
}


@pytest.mark.parametrize(("forwarded", "client"), RFC_7239.values(), ids=RFC_7239)
def test_forwarded_is_read_like_x_forwarded_for(forwarded: str, client: str) -> None:
    assert address_of("172.16.0.1", forwarded=forwarded) == client
    assert address_of("192.0.2.1", forwarded=forwarded) == "192.0.2.1"


def test_x_forwarded_for_goes_before_what_a_client_may_have_written_into_forwarded() -> None:
    assert address_of("172.16.0.1", forwarded_for="198.51.100.7", forwarded="for=203.0.113.9") == "198.51.100.7"


LOCAL = ["127.0.0.1", "10.1.2.3", "172.20.0.1", "192.168.1.1", "169.254.1.1", "::1", "fe80::1", "fd12::1"]
VISITORS = ["192.0.2.1", "172.32.0.1", "11.0.0.1", "100.64.0.1", "2001:db8::1"]


@pytest.mark.parametrize("address", LOCAL)
def test_addresses_of_private_networks_are_local(address: str) -> None:
    assert is_local(ip_address(address))


@pytest.mark.parametrize("address", VISITORS)
def test_addresses_of_visitors_are_not_local(address: str) -> None:
    assert not is_local(ip_address(address))


PROXIES: dict[str, tuple[str, str | None, str | None, bool]] = {
    "a local peer that passes others on": ("192.168.0.9", "198.51.100.7", None, True),
    "a local peer that passes others on, by RFC 7239": ("192.168.0.9", None, "for=198.51.100.7;proto=https", True),
    "one that hides them": ("192.168.0.9", None, "for=_hidden", True),
    "one between a trusted proxy and the visitor": ("192.168.0.9", "198.51.100.7, 192.168.0.9, 10.0.0.1", None, True),
    "a local visitor behind a trusted proxy": ("192.168.0.9", "192.168.0.9", None, False),
    "a local visitor behind two": ("192.168.0.9", "192.168.0.9, 10.0.0.1", None, False),
    "a trusted proxy's own request": ("10.0.0.1", "10.0.0.1", None, False),
    "a trusted proxy that hides its visitor": ("10.0.0.1", "unknown", None, False),
    "a local peer for itself": ("192.168.0.9", None, None, False),
    "an empty header": ("192.168.0.9", "", "", False),
    "a visitor who claims to be a proxy": ("198.51.100.7", "203.0.113.9", None, False),
}


@pytest.mark.parametrize(("address", "forwarded_for", "forwarded", "unnamed"), PROXIES.values(), ids=PROXIES)
def test_a_proxy_that_is_not_configured_is_told_from_a_local_visitor(
    address: str, forwarded_for: str | None, forwarded: str | None, *, unnamed: bool
) -> None:
    found = is_unnamed_proxy(ip_address(address), forwarded_for=forwarded_for, forwarded=forwarded, trusted=TRUSTED)
    assert found is unnamed


def test_limits_count_a_household_of_ipv6_as_one() -> None:
    assert rate_key(ip_address("2001:db8:1:2:3::4")) == rate_key(ip_address("2001:db8:1:2:ffff::"))
    assert rate_key(ip_address("2001:db8:1:3::")) != rate_key(ip_address("2001:db8:1:2::"))
    assert rate_key(ip_address("192.0.2.1")) != rate_key(ip_address("192.0.2.2"))


PEERS: dict[str, tuple[str | None, str | None]] = {
    "a visitor": ("198.51.100.7", "198.51.100.7"),
    "a visitor, at a listener for IPv6": ("::ffff:198.51.100.7", "198.51.100.7"),
    "a visitor by IPv6": ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
    "a local peer": ("192.168.0.9", None),
    "this machine, at a listener for IPv6": ("::ffff:127.0.0.1", None),
    "a neighbour": ("fe80::1%eth0", None),
    "a trusted proxy with a public address": ("203.0.113.5", None),
    "that one, at a listener for IPv6": ("::ffff:203.0.113.5", None),
    "a socket without an address": (None, None),
}


@pytest.mark.parametrize(("peer", "key"), PEERS.values(), ids=PEERS)
def test_connections_are_limited_by_visitors_and_not_by_proxies(peer: str | None, key: str | None) -> None:
    assert limited_as(peer, (ip_network("203.0.113.0/24"),)) == key


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
    assert kept_address(parse_address(address), policy) == kept
