"""Who may call, and how often: tokens, roles and the rate limit, for the servers of all processes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from service.auth import roles, tokens
from service.auth.callers import ANYBODY, Caller
from service.auth.key_files import Reloaded, quotas, read_tokens
from service.auth.tokens import Token
from service.clock import Clock
from service.config import Settings
from service.errors import ApiError
from service.rpc.rate_limit import RateLimit
from service.tenants import Quotas

RATE_LIMITED = "RATE_LIMITED"


@dataclass(frozen=True)
class Access:
    """Authorizes calls and counts them. `tokens` None: no token is required.

    Calls are limited to `rate_per_s` of each client (0: no limit), and for each tenant to the rate of its quota.
    """

    tokens: Callable[[], Sequence[Token]] | None
    clock: Clock
    rate_per_s: float = 0
    quotas: Callable[[], Quotas] = Quotas
    _of_clients: RateLimit = field(default_factory=RateLimit)
    _of_tenants: RateLimit = field(default_factory=RateLimit)

    def caller(self, method: str, metadata: Iterable[tuple[str, Any]]) -> Caller | None:
        """Who calls, by its token; None if its certificate says so. Raises UNAUTHENTICATED or PERMISSION_DENIED."""
        if self.tokens is None or roles.is_open(method):
            return ANYBODY
        token = tokens.identify(self.tokens(), metadata)
        return None if token is None else _allowed(token, method)

    def certified(self, method: str, identities: Iterable[bytes], metadata: Iterable[tuple[str, Any]]) -> Caller:
        """Who calls, by the identities in its certificate. Raises UNAUTHENTICATED or PERMISSION_DENIED."""
        known = self.tokens() if self.tokens is not None else ()
        return _allowed(tokens.identify_certificate(known, identities, metadata), method)

    def count(self, method: str, caller: Caller, peer: str) -> None:
        """Counts the call against the caller, or else the address of `peer`, and against its tenant.

        Raises RESOURCE_EXHAUSTED over a limit. `peer` is in gRPC's form: `ipv4:127.0.0.1:41000`.
        """
        if roles.is_open(method):
            return
        now_s = self.clock.monotonic()
        if self.rate_per_s:
            client = caller.name or peer.rpartition(":")[0]
            wait_s = self._of_clients.take(client, self.rate_per_s, now_s)
            if wait_s:
                raise _too_many(f"from {client}", self.rate_per_s, wait_s)
        # Nobody is identified yet, so there is no tenant either.
        rate_per_s = self.quotas().of(caller.tenant).calls_per_s if caller.tenant else None
        if rate_per_s is not None:
            wait_s = self._of_tenants.take(caller.tenant, rate_per_s, now_s)
            if wait_s:
                raise _too_many(f"of tenant {caller.tenant}", rate_per_s, wait_s, {"tenant": caller.tenant})


def of(settings: Settings, clock: Clock, *, is_limited: bool = True) -> Access:
    """Access according to the settings. Raises ValueError or OSError if a file of them is invalid."""
    path = settings.token_hashes
    source = None if path is None else Reloaded([path], lambda: read_tokens(path)).get
    if not is_limited:
        return Access(source, clock)
    return Access(source, clock, settings.rate_limit_per_s, quotas(settings.tenants_file))


def _allowed(token: Token, method: str) -> Caller:
    caller = token.caller
    roles.check(caller.role, method)
    return caller


def _too_many(whose: str, rate_per_s: float, wait_s: float, metadata: Mapping[str, str] | None = None) -> ApiError:
    """RESOURCE_EXHAUSTED for a call that comes too early."""
    return ApiError(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        f"too many calls {whose}: at most {rate_per_s:g} a second are allowed, 0 left",
        RATE_LIMITED,
        {"limit": f"{rate_per_s:g}", "left": "0", "name": "calls_per_s", **(metadata or {})},
        wait_s,
    )
