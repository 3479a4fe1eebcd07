"""Files with keys, certificates and hashes of tokens: private ones must be, and a change is noticed while running."""

import ssl
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from service import logs, tokens
from service.tokens import Token

T = TypeVar("T")

log = logs.get("key_files")


def check_private(path: Path) -> None:
    """Raises ValueError for a file that others than its owner may read or write, OSError for one that is not there."""
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise ValueError(f"{path} has mode {mode:04o}: nobody but its owner may have access, as with chmod 600")


def check_pair(certificate: Path, key: Path) -> None:
    """Raises ValueError or OSError unless the two can be read and belong together."""
    check_private(key)
    try:
        # A key with a passphrase is refused: nobody is there to type it.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except ssl.SSLError as error:
        raise ValueError(f"{certificate} and {key} are not a certificate and its key: {error.reason}") from None


def check_authorities(path: Path) -> None:
    """Raises ValueError or OSError for a file without certificates."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError as error:
        raise ValueError(f"{path} has no certificate in PEM: {error.reason}") from None


def read_tokens(path: Path) -> tuple[Token, ...]:
    """The tokens of a private file. Raises ValueError or OSError."""
    check_private(path)
    try:
        return tokens.parse(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def signature(paths: Sequence[Path]) -> tuple[tuple[int, int, int], ...] | None:
    """What changes when one of the files does; None when one is not there."""
    try:
        found = [path.stat() for path in paths]
    except OSError:
        return None
    return tuple((stat.st_mtime_ns, stat.st_ino, stat.st_size) for stat in found)


class Reloaded(Generic[T]):
    """What `read` makes of some files, made again after a change.

    A change that cannot be read is logged, and what was there before stays: files are not replaced all at once.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], T]) -> None:
        """Raises what `read` raises."""
        self._paths = paths
        self._read = read
        self._lock = threading.Lock()
        # Before reading: a change in between is read once more.
        self._seen = signature(paths)
        self._value = read()

    def get(self) -> T:
        """The newest that could be read. May be called from any thread."""
        with self._lock:
            now = signature(self._paths)
            if now is None or now == self._seen:
                return self._value
            self._seen = now
            names = [str(path) for path in self._paths]
            try:
                self._value = self._read()
            except (OSError, ValueError) as error:
                log.error("change_refused", files=names, cause=str(error))
            else:
                log.info("change_taken", files=names)
            return self._value
