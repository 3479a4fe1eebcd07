"""Addresses of services outside to which alerts and spans go: what their libraries would refuse, or never reach."""

from urllib.parse import urlsplit

# gRPC's own, which are not followed by a host.
_NAMING = ("dns", "ipv4", "ipv6", "unix", "unix-abstract", "xds")


def check_sentry(dsn: str) -> None:
    """Raises ValueError, without the DSN, which is a secret, for one that Sentry's client would not take."""
    from sentry_sdk.utils import Dsn

    try:
        Dsn(dsn)
    except ValueError:
        raise ValueError("is not a DSN as Sentry shows it, https://KEY@HOST/NUMBER") from None


def check_collector(endpoint: str) -> None:
    """Raises ValueError for what is no address of an OTLP/gRPC collector."""
    # gRPC takes a user for a part of the host's name, and says that name in the log.
    if "@" in endpoint:
        raise ValueError("a user or password in it does not work over gRPC: use OTEL_EXPORTER_OTLP_HEADERS")
    is_naming = "://" in endpoint or endpoint.startswith(("unix:", "unix-abstract:"))
    scheme, _, rest = endpoint.partition(":") if is_naming else ("", "", endpoint)
    if any(character.isspace() for character in endpoint) or not rest.strip("/"):
        raise ValueError("is not an address such as http://127.0.0.1:4317")
    if scheme not in ("", "http", "https", "grpc", *_NAMING):
        raise ValueError(f"begins with {scheme}://, and http://, https:// or host:port alone is known")
    try:
        url = urlsplit(endpoint if scheme else f"//{endpoint}")
        # The exporter reads it as a URL in any case.
        is_whole = scheme in _NAMING or (bool(url.hostname) and url.port != 0)
        # Without a scheme, gRPC takes all of it for the host and its port.
        is_whole = is_whole and (bool(scheme) or url.netloc == endpoint)
    except ValueError:
        is_whole = False
    if not is_whole:
        raise ValueError("is not an address such as http://127.0.0.1:4317")
