"""Who may make a call, and whether now: tokens, roles and the rate limit, for the servers of all processes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from service import roles, tokens
from service.clock import Clock
from service.config import Settings
from service.errors import ApiError
from service.key_files import Reloaded, read_tokens
from service.rate_limit import RateLimit
from service.tokens import Token

RATE_LIMITED = "RATE_LIMITED"


@dataclass(frozen=True)
class Access:
    """Decides on calls. `tokens` None: none are needed. `rate_limit` None: there is no limit."""

    tokens: Callable[[], Sequence[Token]] | None
    rate_limit: RateLimit | None
    clock: Clock

    def caller(self, method: str, metadata: Iterable[tuple[str, Any]]) -> str:
        """The name of the token that a call shows; empty where none is needed.

        Raises UNAUTHENTICATED or PERMISSION_DENIED.
        """
        if self.tokens is None or roles.is_open(method):
            return ""
        token = tokens.identify(self.tokens(), metadata)
        roles.check(token.role, method)
        return token.name

    def count(self, method: str, caller: str, peer: str) -> None:
        """Counts the call for the caller, or else for the address of `peer`. Raises RESOURCE_EXHAUSTED when too many.

        `peer` as gRPC has it: `ipv4:127.0.0.1:41000`.
        """
        if self.rate_limit is None or roles.is_open(method):
            return
        client = caller or peer.rpartition(":")[0]
        wait_s = self.rate_limit.take(client, self.clock.monotonic())
        if wait_s:
            raise ApiError(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"too many calls by {client}", RATE_LIMITED, retry_delay_s=wait_s
            )


def of(settings: Settings, clock: Clock, *, is_limited: bool = True) -> Access:
    """Access as the settings have it. Raises ValueError or OSError for a file of tokens that is wrong."""
    path = settings.token_hashes
    source = None if path is None else Reloaded([path], lambda: read_tokens(path)).get
    rate = settings.rate_limit_per_s if is_limited else 0
    return Access(source, RateLimit(rate) if rate else None, clock)
