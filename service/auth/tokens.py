"""Bearer tokens: only the holder has the secret; the server has its hash. Pure."""

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from service.auth.callers import Caller
from service.auth.roles import Role
from service.errors import ApiError
from service.tenants import NAME

TOKEN_MISSING = "TOKEN_MISSING"
TOKEN_WRONG = "TOKEN_WRONG"

_CERTIFICATE = "certificate"
_GATEWAY = "gateway"
_LINE = re.compile(
    rf"({NAME}) +(?:(read|submit|operate) +([0-9a-f]{{64}}|{_CERTIFICATE})(?: +({NAME}))?|{_GATEWAY} +{_CERTIFICATE})"
)
_FORM = "must be `name role hash [tenant]`, with the role read, submit or operate, or `name role certificate [tenant]`"

# How the gateway names to a worker who calls it with a certificate.
CALLER_HEADER = "vllm-batch-caller"


@dataclass(frozen=True)
class Token:
    """One line of the token file: `name role hash [tenant]`. Without a tenant it has its own, of its name.

    With `certificate` in the place of the hash (`digest` None), a client certificate with that name takes the place of
    the secret. `name gateway certificate` (`role` None) is that of a gateway, which may say who calls it.
    """

    name: str
    role: Role | None
    digest: bytes | None
    tenant: str = ""

    @property
    def caller(self) -> Caller:
        """Who calls with this token."""
        assert self.role is not None
        return Caller(self.name, self.tenant or self.name, self.role)

    def line(self) -> str:
        """The token's line in the file."""
        shown = _CERTIFICATE if self.digest is None else self.digest.hex()
        return f"{self.name} {self.role or _GATEWAY} {shown} {self.tenant}".rstrip()


def new(name: str, role: Role, tenant: str = "") -> tuple[str, Token]:
    """A new secret of 256 random bits, and the token that the server keeps of it."""
    secret = f"vbt_{secrets.token_urlsafe(32)}"
    return secret, Token(name, role, digest(secret), tenant)


def digest(secret: str) -> bytes:
    """SHA-256. Slow hashes are for secrets that can be guessed; 256 random bits cannot."""
    return hashlib.sha256(secret.encode()).digest()


def parse(text: str) -> tuple[Token, ...]:
    """The tokens in a file's text. Raises ValueError that names the line but does not quote it: it may be a secret."""
    found: dict[str, Token] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise ValueError(f"line {number}: {_FORM}")
        name, role, shown, tenant = match.groups()
        if name in found:
            raise ValueError(f"line {number}: another token has the name {name}")
        digest = None if shown in (None, _CERTIFICATE) else bytes.fromhex(shown)
        found[name] = Token(name, Role(role) if role else None, digest, tenant or "")
    return tuple(found.values())


def identify(tokens: Sequence[Token], metadata: Iterable[tuple[str, Any]]) -> Token | None:
    """The token that a call sends as `authorization: Bearer TOKEN`. Raises UNAUTHENTICATED.

    None: it sends none, and may be known by its certificate.
    """
    shown = [value for key, value in metadata if key == "authorization"]
    if not shown:
        if any(token.digest is None for token in tokens):
            return None
        raise _missing()
    scheme, _, secret = str(shown[0]).partition(" ")
    asked, found = digest(secret.strip()), None
    # Compares all tokens, each in constant time, so that timing reveals nothing.
    for token in tokens:
        if token.digest is not None and hmac.compare_digest(token.digest, asked):
            found = token
    if found is None or len(shown) > 1 or scheme.lower() != "bearer":
        raise ApiError(
            grpc.StatusCode.UNAUTHENTICATED, "the token is unknown, or not sent as one `Bearer TOKEN`", TOKEN_WRONG
        )
    return found


def identify_certificate(
    tokens: Sequence[Token], identities: Iterable[bytes], metadata: Iterable[tuple[str, Any]]
) -> Token:
    """The token of the first line that names one of the identities in a client's certificate. Raises UNAUTHENTICATED.

    For a call that a gateway forwards it is that of the caller whom the gateway names: nobody else is asked.
    """
    names = {identity.decode(errors="replace") for identity in identities}
    known = [token for token in tokens if token.digest is None]
    found = next((token for token in known if token.name in names), None)
    if found is not None and found.role is None:
        named = [value for key, value in metadata if key == CALLER_HEADER]
        found = next((token for token in known if token.role is not None and named == [token.name]), None)
    if found is None:
        raise _missing()
    return found


def _missing() -> ApiError:
    message = (
        "a token is required, as the header or metadata `authorization: Bearer TOKEN`: vllm-batch reads it from"
        " BATCH_TOKEN, OpenAI's clients have it as their API key"
    )
    return ApiError(grpc.StatusCode.UNAUTHENTICATED, message, TOKEN_MISSING)
