"""Sends one request to a target: to addresses that were checked, within a deadline, without following redirects."""

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpcore

from service import webhook_targets
from service.db.webhooks import Outcome
from service.webhook_targets import Networks

# For resolving, connecting and the answer's first line together.
DEADLINE_S = 10.0
# For one of several addresses.
CONNECT_S = 4.0
USER_AGENT = "vllm-batch"
# What an error says goes into a table and a log.
MAX_ERROR = 200

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

# Threads of its own, made when needed: a name server that does not answer must not hold up others. As many as there can
# be lookups: one takes up to half a minute, and goes on when the try that asked for it has ended.
LOOKUPS = 128
_resolving = ThreadPoolExecutor(LOOKUPS, thread_name_prefix="resolve")


class RefusedError(Exception):
    """The target is not one to which webhooks are sent."""


async def resolve(host: str, port: int) -> Sequence[str]:
    """The addresses of a host. Raises OSError or UnicodeError."""
    loop = asyncio.get_running_loop()
    found = await loop.run_in_executor(_resolving, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    # A zone belongs to an address of this link.
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class _Checked(httpcore.AsyncNetworkBackend):
    """Connects only to addresses that are allowed. What is checked is what is connected to: a name may change."""

    def __init__(self, allowed: Networks, is_plain: bool, resolve: Resolve) -> None:
        self._allowed = allowed
        self._is_plain = is_plain
        self._resolve = resolve
        self._real = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  # httpcore's
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            found = await self._resolve(host, port)
        except (OSError, UnicodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else None
            raise RefusedError(f"its name cannot be resolved: {reason or error}") from None
        # One that is not allowed is reason enough: which one is tried first is not ours to know.
        if not found or not all(webhook_targets.is_allowed(address, self._allowed) for address in found):
            raise RefusedError("its address is not public, nor in BATCH_WEBHOOK_NETWORKS")
        if self._is_plain and not all(webhook_targets.is_listed(address, self._allowed) for address in found):
            raise RefusedError("must begin with https:// outside BATCH_WEBHOOK_NETWORKS")
        for address in found[:-1]:
            try:
                return await self._real.connect_tcp(address, port, timeout=CONNECT_S)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
        return await self._real.connect_tcp(found[-1], port, timeout=CONNECT_S)


class Sender:
    """Sends to what `allowed` and the Internet have. TLS certificates are those that this machine trusts."""

    def __init__(self, allowed: Networks, resolve: Resolve = resolve) -> None:
        self._allowed = allowed
        self._resolve = resolve
        self._context = ssl.create_default_context()

    async def post(self, url: str, headers: Mapping[str, str], body: str) -> Outcome:
        """Posts a body. Raises nothing: what goes wrong is the outcome, told without the URL's path."""
        problem = webhook_targets.problem(url, self._allowed)
        if problem:
            return Outcome(None, f"the URL {problem}")
        try:
            async with asyncio.timeout(DEADLINE_S):
                status = await self._post(url, headers, body)
        except TimeoutError:
            return Outcome(None, f"no answer within {DEADLINE_S:.0f} s")
        except RefusedError as error:
            return Outcome(None, str(error)[:MAX_ERROR])
        except (OSError, ssl.SSLError, httpcore.NetworkError, httpcore.TimeoutException) as error:
            return Outcome(None, f"cannot be reached: {str(error) or type(error).__name__}"[:MAX_ERROR])
        except (httpcore.ProtocolError, httpcore.UnsupportedProtocol):
            return Outcome(None, "the answer is not HTTP")
        if 200 <= status < 300:
            return Outcome(status)
        followed = "; redirects are not followed" if 300 <= status < 400 else ""
        return Outcome(status, f"answered {status}{followed}")

    async def _post(self, url: str, headers: Mapping[str, str], body: str) -> int:
        parts = webhook_targets.split(url)
        backend = _Checked(self._allowed, parts.scheme == "http", self._resolve)
        target = f"{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}"
        address = httpcore.URL(scheme=parts.scheme, host=parts.hostname or "", port=parts.port, target=target)
        given = {"Host": parts.netloc, "Content-Type": "application/json", "User-Agent": USER_AGENT, **headers}
        # A pool for each, and no connection is kept: each was checked for this request alone.
        async with (
            httpcore.AsyncConnectionPool(self._context, network_backend=backend, max_keepalive_connections=0) as pool,
            pool.stream("POST", address, headers=list(given.items()), content=body.encode()) as answer,
        ):
            # Whatever its body says, nobody reads it.
            return int(answer.status)
