"""Which hosts media may be fetched from: names on a list, and addresses that are nobody's inside."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from nvila.errors import ConfigError

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

_HOST = re.compile(r"(?=.{1,253}\Z)(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9])?\.)*[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\Z")
# Names that only mean something inside: of a cluster, a cloud or a machine.
_INSIDE = ("cluster.local", "internal", "local", "localhost", "svc", "home.arpa", "localdomain")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRules:
    """Hosts that media may come from.

    Args:
        hosts: Names; `*.example.com` means every name under it. Empty: nothing is fetched.
        networks: Networks that are allowed although they are private, such as that of an own object store.

    Raises:
        ConfigError: A rule is no name or no network.
    """

    hosts: tuple[str, ...] = ()
    networks: tuple[Network, ...] = ()

    def __post_init__(self) -> None:
        for host in self.hosts:
            if not _HOST.match(host.removeprefix("*.")) or host != host.lower():
                raise ConfigError(f"media host '{host}' is no host name", "use cdn.example.com or *.example.com")

    def allows_name(self, host: str) -> bool:
        """Whether a name is on the list; addresses and names of the inside never are."""
        if is_address(host) or not _HOST.match(host):
            return False
        if any(host == name or host.endswith(f".{name}") for name in _INSIDE) and host not in self.hosts:
            return False
        return any(
            host.endswith(rule[1:]) if rule.startswith("*.") else host == rule  # "*.a.b" keeps its dot
            for rule in self.hosts
        )

    def allows_address(self, address: Address) -> bool:
        """Whether a connection to an address may be made."""
        meant = _meant(address)
        if any(meant in network for network in self.networks if network.version == meant.version):
            return True
        if isinstance(meant, ipaddress.IPv6Address) and meant.is_site_local:
            return False
        return meant.is_global and not (meant.is_multicast or meant.is_reserved or meant.is_unspecified)


def rules(hosts: Sequence[str], networks: Sequence[str]) -> HostRules:
    """Read rules as they are written on a command line.

    Raises:
        ConfigError: One is no name or no network.
    """
    try:
        return HostRules(hosts=tuple(hosts), networks=tuple(ipaddress.ip_network(one) for one in networks))
    except ValueError as e:
        raise ConfigError(f"media network: {e}", "use 10.1.0.0/16") from e


def is_address(host: str) -> bool:
    """Whether a host is an address in any spelling that a resolver would take, such as 127.1 or 0x7f000001."""
    try:
        ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        last = host.rstrip(".").rpartition(".")[2]
        return bool(re.fullmatch(r"\d+|0x[0-9a-f]*", last))
    return True


def _meant(address: Address) -> Address:
    """Return the IPv4 address that an IPv6 one stands for."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address.sixtofour is not None:
            return address.sixtofour
        if address.teredo is not None:
            return address.teredo[1]
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


__all__ = ["Address", "HostRules", "Network", "is_address", "rules"]
