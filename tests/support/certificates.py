"""Certificate files for tests."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme


class Authority:
    """A certificate authority with its files in a folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name
        self._made = 0
        self._ca = trustme.CA()
        self.file = folder / f"{name}.pem"
        self._ca.cert_pem.write_to_path(self.file)

    def issue(self, *names: str, is_expired: bool = False) -> tuple[Path, Path]:
        """Issues a certificate for this host, or for other names, usable by servers and clients.

        Returns certificate and key.
        """
        now = datetime.now(UTC)
        days = (-3, -1) if is_expired else (-1, 1)
        made = self._ca.issue_cert(
            *(names or ("127.0.0.1", "localhost")),
            not_before=now + timedelta(days[0]),
            not_after=now + timedelta(days[1]),
        )
        self._made += 1
        certificate, key = (self._folder / f"{self._name}-{self._made}.{kind}" for kind in ("crt", "key"))
        certificate.write_bytes(b"".join(pem.bytes() for pem in made.cert_chain_pems))
        key.touch(0o600)
        key.write_bytes(made.private_key_pem.bytes())
        return certificate, key


def replace(old: tuple[Path, Path], new: tuple[Path, Path]) -> None:
    """Replaces certificate and key one after the other, as renewal tools do."""
    for there, made in zip(old, new, strict=True):
        copy = there.with_suffix(f"{there.suffix}.new")
        copy.touch(0o600)
        copy.write_bytes(made.read_bytes())
        copy.replace(there)
