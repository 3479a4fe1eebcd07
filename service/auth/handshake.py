"""Whether certificates that belong together do so: a TLS handshake within this process."""

import ssl
from pathlib import Path

from vllm_batch import small_files

# More than any handshake has.
_ROUNDS = 10


def problem(
    server: tuple[Path, Path],
    authorities: Path,
    name: str = "",
    client: tuple[Path, Path] | None = None,
    client_authorities: Path | None = None,
) -> str:
    """Why a client that trusts `authorities` does not reach the server, or is refused by it; empty when it does.

    `server` and `client` are certificate and key; `client` is asked for one if there are `client_authorities`. `name`:
    which the server's certificate has to have; empty: any. Raises OSError, ssl.SSLError or ValueError for files that
    cannot be read.
    """
    for path in (*server, authorities, *(client or ()), client_authorities):
        if path is not None:
            small_files.check(path)
    ours, theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    ours.load_cert_chain(*server, password="")
    theirs.load_verify_locations(authorities)
    theirs.check_hostname = bool(name)
    if client is not None:
        theirs.load_cert_chain(*client, password="")
    if client_authorities is not None:
        ours.verify_mode = ssl.CERT_REQUIRED
        ours.load_verify_locations(client_authorities)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = {
        "server": theirs.wrap_bio(back, there, server_hostname=name or None),
        "client": ours.wrap_bio(there, back, server_side=True),
    }
    for _ in range(_ROUNDS):
        for judged, end in ends.items():
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError as error:
                return f"the {judged}'s certificate is refused: {error.verify_message}"
            except ssl.SSLError as error:
                return f"the {judged}'s certificate is refused: {error.reason}"
    return ""
