"""Who is speaking: the client's address, behind trusted proxies only, and as much of it as the site keeps. Pure."""

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Literal, TypeAlias

Network: TypeAlias = IPv4Network | IPv6Network
Address: TypeAlias = IPv4Address | IPv6Address


def client_address(peer: str | None, forwarded_for: str | None, trusted: Sequence[Network]) -> str | None:
    """Return the address of the client, or None where the peer has none (a Unix socket).

    X-Forwarded-For counts only when the peer is a trusted proxy, and is read from the right up to the first address
    that is not one: what stands left of that, anyone can have written.
    """
    address = _parse(peer)
    for hop in reversed((forwarded_for or "").split(",")):
        if address is None or not _is_trusted(address, trusted):
            break
        following = _parse(hop.strip())
        if following is None:
            break
        address = following
    return str(address) if address else None


def kept_address(address: str | None, policy: Literal["keep", "truncate", "drop"]) -> str | None:
    """Return what a site keeps of an address: all of it, its /24 or /48 network, or nothing."""
    if address is None or policy == "drop":
        return None
    if policy == "keep":
        return address
    bits = 24 if ip_address(address).version == 4 else 48  # noqa: PLR2004 - IPv4
    return str(ip_network(f"{address}/{bits}", strict=False).network_address)


def _parse(text: str | None) -> Address | None:
    try:
        address = ip_address((text or "").strip("[]"))
    except ValueError:
        return None
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped:
            return address.ipv4_mapped
        # A zone ("%eth0") names an interface of this machine and is no part of an INET.
        return IPv6Address(int(address))
    return address


def _is_trusted(address: Address, trusted: Sequence[Network]) -> bool:
    return any(address.version == network.version and address in network for network in trusted)
