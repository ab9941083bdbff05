"""The network interface by which this host reaches the others, found before the ranks connect.

gloo would take the one that the host's own name resolves to, which is 127.0.1.1 on Debian: it then waits for ranks
on other hosts for ever. The kernel knows better: it is asked how it would reach MASTER_ADDR.
"""

from __future__ import annotations

import ipaddress
import os
import socket

from ummim.errors import UserError

HOSTS = ("GROUP_WORLD_SIZE", "CROSS_SIZE")  # how many: from torchrun, from deepspeed
ANYWHERE = "203.0.113.1"  # an address that is nowhere (RFC 5737): asks for the default route; nothing is sent


def choose_interface() -> None:
    """Set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME for a run on several hosts, where they are not set.

    Raises UserError where MASTER_ADDR cannot be resolved or reached, or no interface can be told.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        return
    address = address_towards(os.environ["MASTER_ADDR"])
    if _is_loopback(address):
        if not any(int(os.environ.get(name, 1)) > 1 for name in HOSTS) or _is_local_name(os.environ["MASTER_ADDR"]):
            return  # one machine
        address = _outward()  # MASTER_ADDR is this host, whose name resolves to a loopback address here
    name = next((name for name, addresses in interfaces().items() if address in addresses), None)
    if name is None:
        raise _unclear(f"no network interface of {socket.gethostname()} has the address {address}")
    os.environ["GLOO_SOCKET_IFNAME"] = name
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")


def own_address() -> str:
    """The address at which the run's other ranks reach this one. Raises UserError."""
    name = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    if not name:
        return address_towards(os.environ["MASTER_ADDR"])
    addresses = interfaces().get(name, [])
    if not addresses:
        raise _unclear(f"GLOO_SOCKET_IFNAME={name}: {socket.gethostname()} has no such interface with an address")
    return addresses[0]


def address_towards(host: str) -> str:
    """This host's address on the way to ``host``; nothing is sent."""
    try:
        found = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR={host} cannot be resolved on {socket.gethostname()} ({error.strerror}): use an address, or "
            "add the name to /etc/hosts there"
        ) from None
    reason = ""
    for family, kind, protocol, _, target in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(target)
                return str(probe.getsockname()[0])
        except OSError as error:
            reason = error.strerror or str(error)
    raise _unclear(f"MASTER_ADDR={host} cannot be reached from {socket.gethostname()} ({reason})")


def interfaces() -> dict[str, list[str]]:
    """The addresses of each network interface that is up, IPv4 first, without link-local ones."""
    import psutil

    up = psutil.net_if_stats()
    found: dict[str, list[str]] = {}
    for name, addresses in psutil.net_if_addrs().items():
        ips = [a.address for a in addresses if a.family in (socket.AF_INET, socket.AF_INET6)]
        ips = [ip for ip in ips if "%" not in ip]
        if name in up and up[name].isup and ips:
            found[name] = sorted(ips, key=lambda ip: ":" in ip)
    return found


def _outward() -> str:
    """The address of the default route's interface, or of the only one that leaves this host."""
    try:
        return address_towards(ANYWHERE)
    except UserError:
        outward = [ips[0] for ips in interfaces().values() if not _is_loopback(ips[0])]
        if len(outward) == 1:
            return outward[0]
        host, master = socket.gethostname(), os.environ["MASTER_ADDR"]
        raise _unclear(
            f"on {host}, MASTER_ADDR={master} is a loopback address, and there is no default route"
        ) from None


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.split("%")[0]).is_loopback


def _is_local_name(host: str) -> bool:
    """A name or address that means this machine everywhere, as against a host's own name."""
    try:
        return _is_loopback(host)
    except ValueError:
        return host.split(".")[0] == "localhost"


def _unclear(problem: str) -> UserError:
    shown = ", ".join(f"{name} ({', '.join(ips)})" for name, ips in interfaces().items())
    return UserError(f"{problem}. Its interfaces are {shown}: name one by GLOO_SOCKET_IFNAME")
