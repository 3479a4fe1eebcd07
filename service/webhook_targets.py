"""Where webhooks may go: URLs, and the addresses behind them. Pure."""

import ipaddress
from collections.abc import Sequence
from typing import TypeAlias
from urllib.parse import SplitResult, urlsplit

from service import addresses

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Networks: TypeAlias = Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network]

MAX_URL = 2048
# Translated to IPv4 somewhere on the way (RFC 6052, RFC 8215).
_TRANSLATED = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("64:ff9b:1::/48"))


def networks(text: str) -> Networks:
    """The networks in a list with commas. Raises ValueError that names the wrong one."""
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            found.append(ipaddress.ip_network(part))
        except ValueError:
            raise ValueError(f"{part!r} is not a network such as 10.0.0.0/8") from None
    return found


def is_allowed(address: str, allowed: Networks) -> bool:
    """True if a webhook may be sent to this address: a public one, or one in a network that is allowed."""
    found: Address = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
        found = found.ipv4_mapped
    if is_listed(str(found), allowed):
        return True
    if isinstance(found, ipaddress.IPv6Address):
        # What carries an IPv4 address is as public as that.
        inner = [found.sixtofour, *(found.teredo or ())]
        if any(found in network for network in _TRANSLATED):
            inner.append(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF))
        if any(one is not None and not _is_public(one) for one in inner):
            return False
    return _is_public(found)


def is_listed(address: str, allowed: Networks) -> bool:
    """True for an address in one of the networks that are allowed although they are not public."""
    found = ipaddress.ip_address(address.partition("%")[0])
    return any(found.version == network.version and found in network for network in allowed)


def _is_public(address: Address) -> bool:
    return address.is_global and not address.is_multicast and not address.is_reserved


def split(url: str) -> SplitResult:
    """The parts of a URL. Raises ValueError for one that no webhook can be sent to, whatever is allowed."""
    if len(url) > MAX_URL:
        raise ValueError(f"has more than {MAX_URL} characters")
    if not (url.isascii() and url.isprintable()) or " " in url or "\\" in url:
        raise ValueError("must be printable ASCII without spaces or backslashes")
    try:
        parts = urlsplit(url)
        is_whole = bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_whole = False
    if not is_whole or parts.scheme not in ("https", "http"):
        raise ValueError("must be a URL such as https://example.com/hook")
    if "@" in parts.netloc or "#" in url:
        raise ValueError("must have neither a user nor a fragment")
    if problem := addresses.problem(parts.hostname or ""):
        raise ValueError(problem)
    return parts


def problem(url: str, allowed: Networks) -> str:
    """Why webhooks are not sent to a URL, as far as the URL itself tells; empty if they may be."""
    try:
        parts = split(url)
    except ValueError as error:
        return str(error)
    if parts.scheme == "http" and not allowed:
        return "must begin with https://"
    if addresses.parsed(parts.hostname or "") is not None and not is_allowed(parts.hostname or "", allowed):
        return "has an address that is not public"
    return ""


def origin(url: str) -> str:
    """Scheme, host and port: what rests when deliveries to it fail, and all of a URL that logs have."""
    scheme, _, rest = url.partition("//")
    return f"{scheme}//{rest.partition('/')[0].partition('?')[0]}"
