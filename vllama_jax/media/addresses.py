"""Decide whether an IP address belongs to a public host."""

from __future__ import annotations

import ipaddress

# Not public, by IANA's registries of special-purpose addresses. Those of `ipaddress` differ between patch releases:
# in Python 3.11.7, 192.0.0.192 is public, which is the metadata service of Oracle's cloud.
_SPECIAL_IPV4 = (
    "0.0.0.0/8",  # this network; 0.0.0.0 is this machine
    "10.0.0.0/8",  # private
    "100.64.0.0/10",  # carrier-grade NAT; also the metadata service of Alibaba's cloud
    "127.0.0.0/8",  # loopback
    "168.63.129.16/32",  # services of Azure's virtual machines, in a public range
    "169.254.0.0/16",  # link-local; also the metadata service of most clouds
    "172.16.0.0/12",  # private
    "192.0.0.0/24",  # protocol assignments
    "192.0.2.0/24",  # documentation
    "192.88.99.0/24",  # relays of 6to4
    "192.168.0.0/16",  # private
    "198.18.0.0/15",  # benchmarks
    "198.51.100.0/24",  # documentation
    "203.0.113.0/24",  # documentation
    "224.0.0.0/4",  # multicast
    "240.0.0.0/4",  # reserved, and broadcast
)
_GLOBAL_UNICAST_IPV6 = ipaddress.IPv6Network("2000::/3")  # all other IPv6 addresses are special or not assigned
_SPECIAL_IPV6 = (
    "2001::/23",  # protocol assignments, such as Teredo
    "2001:db8::/32",  # documentation
    "3fff::/20",  # documentation
)
# IPv6 networks whose addresses stand for an IPv4 address: network, and the number of bits after the IPv4 address.
_EMBEDDING_IPV6 = (
    ("::ffff:0:0/96", 0),  # IPv4-mapped
    ("64:ff9b::/96", 0),  # NAT64
    ("2002::/16", 80),  # 6to4
)

_IPV4_NETWORKS = tuple(ipaddress.IPv4Network(network) for network in _SPECIAL_IPV4)
_IPV6_NETWORKS = tuple(ipaddress.IPv6Network(network) for network in _SPECIAL_IPV6)
_EMBEDDING_NETWORKS = tuple((ipaddress.IPv6Network(network), shift) for network, shift in _EMBEDDING_IPV6)


def is_public(address: str) -> bool:
    """Return whether an address belongs to a public host.

    An IPv6 address that stands for an IPv4 address (IPv4-mapped, NAT64, 6to4) is public if that is.

    Args:
        address: An IPv4 or IPv6 address, as `socket.getaddrinfo` returns it.

    Returns:
        False for addresses of this machine, of its network, and of no single host.

    Raises:
        ValueError: It is not an address.
    """
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        for network, shift in _EMBEDDING_NETWORKS:
            if parsed in network:
                return is_public(str(ipaddress.IPv4Address(int(parsed) >> shift & 0xFFFFFFFF)))
        return parsed in _GLOBAL_UNICAST_IPV6 and not any(parsed in network for network in _IPV6_NETWORKS)
    return not any(parsed in network for network in _IPV4_NETWORKS)
