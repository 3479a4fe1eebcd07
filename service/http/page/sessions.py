"""Who uses the page: whoever has signed in with a token, for a while and until they sign out.

The browser keeps a random secret in a cookie that scripts cannot read; Postgres keeps its hash and that of the token.
So any of these processes knows the session, and it ends when the token is taken out of the file.
"""

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

import grpc
from starlette.requests import cookie_parser

from service.auth import roles, tokens
from service.auth.callers import ANYBODY, Caller
from service.auth.tokens import Token
from service.db import page_sessions
from service.db.connection import Database
from service.errors import ApiError
from service.rpc.access import Access

COOKIE = "vllm_batch_session"
PATH = "/page/"
LASTS_S = 12 * 3600.0
# Other sites cannot set it, and without a session it is enough that it is there.
HEADER = "x-csrf-token"
NO_TOKENS = "no-tokens"

SESSION_ENDED = "SESSION_ENDED"
REQUEST_FOREIGN = "REQUEST_FOREIGN"


@dataclass(frozen=True)
class Sessions:
    """The sessions on the page, as Postgres has them."""

    database: Database
    access: Access

    @property
    def are_needed(self) -> bool:
        """False: no token is required."""
        return self.access.tokens is not None

    async def begin(self, token: str) -> tuple[str, Caller]:
        """Begins a session. Returns the secret for the cookie. Raises UNAUTHENTICATED, also for a certificate's."""
        known = self.access.tokens() if self.access.tokens is not None else ()
        found = tokens.identify(known, [("authorization", f"Bearer {token}")])
        assert found is not None
        assert found.digest is not None
        secret = secrets.token_urlsafe(32)
        session = _digest(secret), found.digest, LASTS_S
        await self.database.run_idempotent(page_sessions.begin, *session)
        return secret, found.caller

    async def end(self, headers: Mapping[str, str]) -> None:
        """Ends the session of a request."""
        await self.database.run_idempotent(page_sessions.end, _digest(secret_of(headers)))

    async def caller(self, method: str, headers: Mapping[str, str]) -> Caller:
        """Who makes a request, by its cookie. Raises UNAUTHENTICATED or PERMISSION_DENIED."""
        if self.access.tokens is None:
            return ANYBODY
        token = await self._token(secret_of(headers))
        if token is None:
            raise ApiError(grpc.StatusCode.UNAUTHENTICATED, "sign in first, or again", SESSION_ENDED)
        roles.check(token.caller.role, method)
        return token.caller

    async def _token(self, secret: str) -> Token | None:
        digest = await self.database.read(page_sessions.token_of, _digest(secret)) if secret else None
        known = self.access.tokens() if self.access.tokens is not None else ()
        return next((token for token in known if token.role and digest and token.digest == digest), None)

    def proof(self, headers: Mapping[str, str]) -> str:
        """What changes must bring in HEADER: only scripts of the page can read it."""
        return _digest(f"csrf {secret_of(headers)}").hex() if self.are_needed else NO_TOKENS

    def check(self, headers: Mapping[str, str]) -> None:
        """Raises PERMISSION_DENIED for a change that does not bring the proof."""
        if not secrets.compare_digest(headers.get(HEADER, "").encode(), self.proof(headers).encode()):
            raise ApiError(grpc.StatusCode.PERMISSION_DENIED, f"the header {HEADER} is missing", REQUEST_FOREIGN)


def secret_of(headers: Mapping[str, str]) -> str:
    """The secret in a request's cookie; empty if there is none."""
    # Not http.cookies, which finds none where another program of this host has set one that is not as the RFC wants it.
    return cookie_parser(headers.get("cookie", "")).get(COOKIE, "")


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
