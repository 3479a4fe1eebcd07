"""Keeps other sites from using a visitor's browser against this server. Pure: looks at the headers of a request.

A site can make a browser send requests here (CSRF), and can have its own name resolve to this machine's address (DNS
rebinding), after which the browser takes the two for one site. Programs that are no browsers send none of these
headers, and name this machine by a name that it has.
"""

import contextlib
from collections.abc import Mapping, Set
from urllib.parse import urlsplit

from service import addresses

SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
# What a browser says of requests of the page itself, and of an address that was typed.
OWN = frozenset({"same-origin", "none"})


def wrong_host(header: str, names: Set[str]) -> str:
    """Why the header Host names another server than this one; empty for an address and for one of its `names`."""
    try:
        host = urlsplit(f"//{header}").hostname or ""
    except ValueError:
        host = ""
    if not host:
        return "it names no server in the header Host"
    # With a dot behind it, a name is the same, complete.
    host = host.removesuffix(".")
    if addresses.parsed(host) is not None or host == "localhost" or host in names:
        return ""
    return f"this server has no name {header[:100]!r}"


def foreign(method: str, headers: Mapping[str, str]) -> str:
    """Why a request comes from another site; empty if it does not."""
    site = headers.get("sec-fetch-site")
    if site is not None:
        return "" if site in OWN else f"it comes from a page of another site (sec-fetch-site: {site[:20]})"
    origin = headers.get("origin")
    if origin is None or method in SAFE:
        return ""
    with contextlib.suppress(ValueError):
        if urlsplit(origin).netloc == headers.get("host"):
            return ""
    return f"it comes from a page of another site ({origin[:100]})"
