"""Where servers listen and how they are called: IPv4, IPv6 with and without brackets and zones, names of hosts."""

import ipaddress
import re
import socket

# RFC 1123, and the underscore that container networks allow.
_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")
# Names of interfaces may have more, which nobody uses and gRPC's targets cannot have.
_ZONE = re.compile(r"[A-Za-z0-9_.:@-]{1,15}")
# What gRPC takes for the beginning of another kind of target: https://github.com/grpc/grpc/blob/master/doc/naming.md
_SCHEMES = frozenset({"dns", "unix", "unix-abstract", "vsock", "ipv4", "ipv6", "xds", "google-c2p"})


def bare(host: str) -> str:
    """The host without the brackets that IPv6 addresses have in `[address]:port`."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def joined(host: str, port: int) -> str:
    """`host:port` as gRPC takes it."""
    host = bare(host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parsed(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address; None for a name."""
    try:
        return ipaddress.ip_address(bare(host))
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    """True for an address that other machines cannot reach."""
    address = parsed(host)
    return host == "localhost" if address is None else address.is_loopback


def loopback_here(name: str) -> str:
    """The loopback address for which a name stands on this machine; "" if it stands for any other, or for none.

    Debian's installer gives the machine's own name 127.0.1.1 in /etc/hosts, and others find another address for it.
    """
    try:
        found = [str(address[0]) for *_, address in socket.getaddrinfo(bare(name), None, type=socket.SOCK_STREAM)]
    except (socket.gaierror, UnicodeError):
        return ""
    return found[0] if found and all(map(is_loopback, found)) else ""


def is_any(host: str) -> bool:
    """True for the wildcard addresses 0.0.0.0 and `::`, which cannot be called."""
    address = parsed(host)
    return address is not None and address.is_unspecified


def problem(host: str) -> str:
    """Why a host is invalid; empty for a valid address or name, whether or not the name resolves."""
    shown = repr(host[:100])
    if "://" in host:
        return f"{shown} is a URL, not a host: leave out what stands before and after it"
    if parsed(host) is not None:
        # The parser takes anything for a zone.
        zone = re.search("%(.*)", bare(host), re.DOTALL)
        if zone is not None and not _ZONE.fullmatch(zone[1]):
            return f"{shown} has a zone that is not the name or number of a network interface"
        # Brackets are for IPv6, in pairs.
        return f"{shown} is not an IPv6 address" if host.startswith("[") and ":" not in host else ""
    if re.fullmatch(r"(\[[^\]]*\]|[^:]*):\d*", host):
        return f"{shown} has a port: ports have settings of their own"
    if ":" in host or "[" in host or "]" in host:
        return f"{shown} is not an IPv6 address"
    # Forms that the C library accepts as an address: 127.1, 0, 0x7f.1.
    labels = host.removesuffix(".").split(".")
    if re.fullmatch(r"\d+|0x[0-9a-fA-F]*", labels[-1]):
        return f"{shown} is not an IPv4 address: four numbers from 0 to 255"
    if len(host) > 253 or not all(_NAME.fullmatch(label) for label in labels):
        return f"{shown} is neither an IP address nor the name of a host"
    if host.lower() in _SCHEMES:
        return f"{shown} is a scheme of gRPC, so it cannot be called by that name: use its IP address or full name"
    return ""


def cannot_listen(host: str) -> str:
    """Why this machine cannot listen at a valid host; empty when it can. Resolves names."""
    try:
        found = socket.getaddrinfo(bare(host), 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        return f"{host} cannot be resolved: {error.strerror if isinstance(error, OSError) else error}"
    reasons = []
    for family, kind, _, _, address in found:
        try:
            with socket.socket(family, kind) as one:
                one.bind(address)
        except OSError as error:
            reasons.append(str(error.strerror))
        else:
            return ""
    return f"{host} is not an address of this machine ({reasons[0]})" if reasons else f"{host} has no address"
