"""Files of keys, certificates and token hashes: checks them, and reloads them when they change."""

import base64
import binascii
import os
import re
import ssl
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from service import tenants
from service.auth import tokens
from service.auth.tokens import Token
from service.telemetry import logs
from service.tenants import Quotas
from vllm_batch import small_files

T = TypeVar("T")

# As the Standard Webhooks ask for.
LEAST_SECRET_BYTES, MOST_SECRET_BYTES = 24, 64
_WEBHOOK_SECRET = re.compile(r"whsec_([A-Za-z0-9+/]+)={0,2}")

log = logs.get("key_files")


def check_private(path: Path) -> None:
    """Raises ValueError for no small file, or if anyone but its owner may access it, OSError if it does not exist.

    A file of root's may be readable to a group that root chose: so are Secrets in pods.
    """
    small_files.check(path)
    found = path.stat()
    mode = found.st_mode & 0o777
    is_given_by_root = found.st_uid == 0 and os.geteuid() != 0
    if mode & (0o037 if is_given_by_root else 0o077):
        raise ValueError(f"{path} has mode {mode:04o}: must be accessible to its owner only (chmod 600)")


def check_token(path: Path) -> None:
    """Raises ValueError or OSError unless the file is private and has a token, which it does not show."""
    check_private(path)
    secret = small_files.read(path).decode(errors="replace").strip()
    if not secret or not (secret.isascii() and secret.isprintable()) or " " in secret:
        raise ValueError(f"{path} must contain a token, alone, as python -m service.auth.new_token prints it")


def check_pair(certificate: Path, key: Path) -> None:
    """Raises ValueError or OSError unless both can be read and belong together."""
    check_private(key)
    small_files.check(certificate)
    try:
        # The empty password makes a key with a passphrase fail: nobody is there to type it.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except ssl.SSLError as error:
        raise ValueError(f"{certificate} and {key} are not a certificate and its key: {error.reason}") from None


def check_authorities(path: Path) -> None:
    """Raises ValueError if the file has no certificate, OSError if it cannot be read."""
    small_files.check(path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError as error:
        raise ValueError(f"{path} contains no PEM certificate: {error.reason}") from None


def read_tokens(path: Path) -> tuple[Token, ...]:
    """The tokens in a private file. Raises ValueError or OSError."""
    check_private(path)
    content = small_files.read(path)
    try:
        return tokens.parse(content.decode())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_webhook_secrets(path: Path) -> tuple[str, ...]:
    """The secrets in a private file, one a line: `whsec_` and base64. Several while receivers change to a new one.

    Raises ValueError, which shows none of them, or OSError.
    """
    check_private(path)
    lines = [line.strip() for line in small_files.read(path).decode(errors="replace").splitlines()]
    found = tuple(line for line in lines if line and not line.startswith("#"))
    if not found:
        raise ValueError(f"{path} has no secret")
    for number, secret in enumerate(found, 1):
        match = _WEBHOOK_SECRET.fullmatch(secret)
        try:
            size = len(base64.b64decode(match[1] + "=" * (-len(match[1]) % 4), validate=True)) if match else 0
        except binascii.Error:
            size = 0
        if not LEAST_SECRET_BYTES <= size <= MOST_SECRET_BYTES:
            sizes = f"{LEAST_SECRET_BYTES} to {MOST_SECRET_BYTES} bytes"
            raise ValueError(f"{path}: secret {number} must be whsec_ and {sizes} in base64")
    return found


def check_webhook_secrets(quotas: Quotas) -> None:
    """Raises ValueError unless the secret files of all tenants can be used."""
    for name, quota in quotas.named.items():
        if quota.webhook is not None:
            try:
                read_webhook_secrets(Path(quota.webhook.secret_file))
            except (OSError, ValueError) as error:
                raise ValueError(f"tenants.{name}.webhook.secret_file: {error}") from None


def read_quotas(path: Path) -> Quotas:
    """The quotas of tenants in a file. Raises ValueError or OSError."""
    content = small_files.read(path)
    try:
        return tenants.parse(content.decode(), path.parent)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def quotas(path: Path | None) -> Callable[[], Quotas]:
    """The quotas in a file, read again when it changes; none without a file. Raises ValueError or OSError."""
    return Quotas if path is None else Reloaded([path], lambda: read_quotas(path)).get


def signature(paths: Sequence[Path]) -> tuple[tuple[int, int, int], ...] | None:
    """A value that changes when one of the files does; None if one is missing."""
    try:
        found = [path.stat() for path in paths]
    except OSError:
        return None
    return tuple((stat.st_mtime_ns, stat.st_ino, stat.st_size) for stat in found)


class Reloaded(Generic[T]):
    """What `read` returns for some files, read again when they change.

    A change that cannot be read is logged and the previous value stays: files are replaced one after the other.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], T]) -> None:
        """Raises what `read` raises."""
        self._paths = paths
        self._read = read
        self._lock = threading.Lock()
        # Taken before reading, so that a change in between is read next time.
        self._seen = signature(paths)
        self._value = read()

    def get(self) -> T:
        """The latest value that could be read. Thread-safe."""
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
