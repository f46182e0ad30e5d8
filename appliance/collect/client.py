"""Who is speaking: the client's address, behind trusted proxies only, and as much of it as the site keeps. Pure."""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, Literal, TypeAlias

Network: TypeAlias = IPv4Network | IPv6Network
Address: TypeAlias = IPv4Address | IPv6Address


# Loopback, link-local and private networks (RFC 1122, 3927, 1918, 4291, 4193).
_LOCAL = tuple(
    ip_network(text)
    for text in (
        "127.0.0.0/8",
        "169.254.0.0/16",
        "10.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "::1/128",
        "fe80::/10",
        "fc00::/7",
    )
)
# The same visitors send again and again.
_REMEMBERED_ADDRESSES = 4_096
# RFC 7239: Forwarded: for=192.0.2.43, for="[2001:db8::17]:4711";proto=https
# Commas, semicolons and "for=" within quotes mean nothing: a visitor's own Host may stand there.
_FORWARDED_PAIR = re.compile(
    r"""\s*(?:(?P<name>[^\s=;,"]+)\s*=\s*(?P<value>"(?:[^"\\]|\\.)*"|[^\s;,"]*)\s*)?(?P<end>[;,]|$)"""
)
_PORT = re.compile(r":[0-9]{1,5}$")


def client_address(
    peer: str | None, *, forwarded_for: str | None, forwarded: str | None, trusted: Sequence[Network]
) -> Address | None:
    """Return the address of the client, or None where the peer has none (a Unix socket).

    The headers count only when the peer is a trusted proxy, and are read from the right up to the first address that is
    not one: what stands left of that, anyone can have written. X-Forwarded-For goes before Forwarded, which most
    proxies pass on as it came.
    """
    address = parse_address(peer)
    for hop in reversed(_hops(forwarded_for, forwarded)):
        if address is None or not _is_in(address, trusted):
            break
        following = parse_address(hop)
        if following is None:
            break
        address = following
    return address


def said_by_proxies(environ: Mapping[str, Any]) -> dict[str, str | None]:
    """Return what proxies have written into a WSGI request, as the functions here take it."""
    return {"forwarded_for": environ.get("HTTP_X_FORWARDED_FOR"), "forwarded": environ.get("HTTP_FORWARDED")}


def sender_address(environ: Mapping[str, Any], trusted: Sequence[Network]) -> Address | None:
    """Return the address of the client of a WSGI request."""
    return client_address(environ.get("REMOTE_ADDR"), **said_by_proxies(environ), trusted=trusted)


def is_unnamed_proxy(
    address: Address, *, forwarded_for: str | None, forwarded: str | None, trusted: Sequence[Network]
) -> bool:
    """Return whether a local address that nobody trusts passes on what others send: its headers begin with another."""
    if not (forwarded_for or forwarded) or not is_local(address) or _is_in(address, trusted):
        return False
    return parse_address(_hops(forwarded_for, forwarded)[0]) != address


def kept_address(address: Address | None, policy: Literal["keep", "truncate", "drop"]) -> str | None:
    """Return what a site keeps of an address: all of it, its /24 or /48 network, or nothing."""
    if address is None or policy == "drop":
        return None
    if policy == "keep":
        return str(address)
    bits = 24 if address.version == 4 else 48  # noqa: PLR2004 - IPv4
    return str(ip_network((address, bits), strict=False).network_address)


def rate_key(address: Address) -> str:
    """Return what limits count an address as: a household has a whole /64 of IPv6."""
    return str(address) if address.version == 4 else str(ip_network((address, 64), strict=False))  # noqa: PLR2004


def limited_as(peer: str | None, trusted: Sequence[Network]) -> str | None:
    """Return what limits count the other end of a connection as; None where it is no visitor's, and has none.

    A local peer is a proxy that nobody configured, or the owner of the machine; a trusted one brings many visitors.
    """
    address = parse_address(peer)
    if address is None or is_local(address) or _is_in(address, trusted):
        return None
    return rate_key(address)


@lru_cache(_REMEMBERED_ADDRESSES)
def is_local(address: Address) -> bool:
    """Return whether an address is no visitor's: of this machine or of a private network, so most likely a proxy."""
    return _is_in(address, _LOCAL)


@lru_cache(_REMEMBERED_ADDRESSES)
def parse_address(text: str | None) -> Address | None:
    """Read an address as proxies write it, in brackets and with a port perhaps; None where it is none."""
    bare = (text or "").strip()
    if bare.startswith("["):
        bare = bare[1:].partition("]")[0]
    elif bare.count(":") == 1:
        bare = _PORT.sub("", bare)
    try:
        address = ip_address(bare)
    except ValueError:
        return None
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped:
            return address.ipv4_mapped
        # A zone ("%eth0") names an interface of this machine and is no part of an INET.
        return IPv6Address(int(address))
    return address


def _hops(forwarded_for: str | None, forwarded: str | None) -> list[str]:
    if forwarded_for:
        return forwarded_for.split(",")
    return _hops_of_forwarded(forwarded or "")


def _hops_of_forwarded(text: str) -> list[str]:
    """Return what each element says of `for`; one empty text where the header is none, for nobody can be believed."""
    hops = [""]
    position = 0
    while position < len(text):
        pair = _FORWARDED_PAIR.match(text, position)
        if pair is None:
            return [""]
        if (pair["name"] or "").lower() == "for":
            hops[-1] = pair["value"].strip('"')
        if pair["end"] == ",":
            hops.append("")
        position = pair.end()
    return hops


def _is_in(address: Address, networks: Sequence[Network]) -> bool:
    return any(address.version == network.version and address in network for network in networks)
