"""Bearer tokens: a secret is known to its holder alone, the server has its hash. Pure."""

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from service.errors import ApiError
from service.roles import Role

TOKEN_MISSING = "TOKEN_MISSING"
TOKEN_WRONG = "TOKEN_WRONG"

_LINE = re.compile(r"([A-Za-z0-9_.-]{1,64}) +(read|submit|operate) +([0-9a-f]{64})")


@dataclass(frozen=True)
class Token:
    """One line of the file of tokens: `name role hash`."""

    name: str
    role: Role
    digest: bytes

    def line(self) -> str:
        """As it stands in the file."""
        return f"{self.name} {self.role} {self.digest.hex()}"


def new(name: str, role: Role) -> tuple[str, Token]:
    """A new secret of 256 random bits, and what the server is to know of it."""
    secret = f"vbt_{secrets.token_urlsafe(32)}"
    return secret, Token(name, role, digest(secret))


def digest(secret: str) -> bytes:
    """SHA-256. A slow hash protects what can be guessed, which 256 random bits cannot."""
    return hashlib.sha256(secret.encode()).digest()


def parse(text: str) -> tuple[Token, ...]:
    """The tokens of a file. Raises ValueError that names a wrong line, without what is in it: it may be a secret."""
    found: dict[str, Token] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise ValueError(f"line {number} is not `name role hash`, with the role read, submit or operate")
        name, role, hexadecimal = match.groups()
        if name in found:
            raise ValueError(f"line {number}: there is another token called {name}")
        found[name] = Token(name, Role(role), bytes.fromhex(hexadecimal))
    return tuple(found.values())


def identify(tokens: Sequence[Token], metadata: Iterable[tuple[str, Any]]) -> Token:
    """The token that a call shows as `authorization: Bearer TOKEN`. Raises UNAUTHENTICATED."""
    shown = [value for key, value in metadata if key == "authorization"]
    if not shown:
        message = "a token is needed: metadata `authorization: Bearer TOKEN`; vllm-batch reads it from BATCH_TOKEN"
        raise ApiError(grpc.StatusCode.UNAUTHENTICATED, message, TOKEN_MISSING)
    scheme, _, secret = str(shown[0]).partition(" ")
    asked, found = digest(secret.strip()), None
    # All of them, each in constant time: how long it takes tells nothing about which is how close.
    for token in tokens:
        if hmac.compare_digest(token.digest, asked):
            found = token
    if found is None or len(shown) > 1 or scheme.lower() != "bearer":
        raise ApiError(grpc.StatusCode.UNAUTHENTICATED, "the token is not known here", TOKEN_WRONG)
    return found
