"""TLS to Postgres: the system's CAs, and why a server's certificate was rejected, which libpq does not report."""

import os
import re
import socket
import ssl
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# All that libpq reports, whether the certificate has expired, has an unknown issuer or is malformed.
_REFUSED = re.compile(
    r'(connection to server at "([^"]*)"(?: \(([^)]*)\))?, port (\d+) failed: )SSL error: certificate verify failed'
)
SSL_REQUEST = struct.pack("!ii", 8, 80877103)
SYSTEM = "system"

# OpenSSL's numbers of what can be wrong with a certificate.
_EXPIRED = (10,)
_NOT_YET_VALID = (9,)
_UNKNOWN_ISSUER = (2, 18, 19, 20, 21)


def with_system_authorities(given: Mapping[str, str]) -> dict[str, str]:
    """Returns libpq's parameters with `sslrootcert=system` replaced by the file of the system's CAs, if known.

    The libpq in psycopg2's wheel would look for them in a folder of the machine that built it.
    """
    file = ssl.get_default_verify_paths().cafile
    if given.get("sslrootcert") != SYSTEM or file is None:
        return dict(given)
    # `system` implies verify-full; libpq rejects anything weaker.
    return {**given, "sslrootcert": file, "sslmode": "verify-full"}


def explained(told: str, given: Mapping[str, Any], timeout_s: float) -> str:
    """Returns libpq's message with the reason why it rejected the certificate; "" for any other message.

    Connects once more to get the certificate; each step may take `timeout_s`.
    """
    found = _REFUSED.search(told)
    if found is None:
        return ""
    where, host, address, port = found.groups()
    # The message has the address instead of the name where `hostaddr` is given; servers choose by name.
    name = host if "," in given.get("host", ",") else given["host"]
    authorities = given.get("sslrootcert") or os.environ.get("PGSSLROOTCERT") or "~/.postgresql/root.crt"
    why = _reason(name, (address or host, int(port)), Path(authorities).expanduser(), timeout_s)
    return f"{where}its TLS certificate {why}" if why else ""


def _reason(name: str, address: tuple[str, int], authorities: Path, timeout_s: float) -> str:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # libpq's message about a wrong host name is complete.
    context.check_hostname = False
    try:
        context.load_verify_locations(authorities)
        with socket.create_connection(address, timeout_s) as connection:
            connection.sendall(SSL_REQUEST)
            if connection.recv(1) == b"S":
                context.wrap_socket(connection, server_hostname=name).close()
    except ssl.SSLCertVerificationError as error:
        return _words(error, authorities)
    except (OSError, ValueError):
        # The server is gone by now, or the CA file is one that only libpq can read.
        pass
    return ""


def _words(error: ssl.SSLCertVerificationError, authorities: Path) -> str:
    if error.verify_code in _EXPIRED:
        return "has expired: renew it on the server"
    if error.verify_code in _NOT_YET_VALID:
        return "is not valid yet: compare the clocks of both machines"
    if error.verify_code in _UNKNOWN_ISSUER:
        return f"was not issued by a CA in {authorities}: set sslrootcert to a file with the CA that issued it"
    return f"cannot be verified with {authorities}: {error.verify_message}"
