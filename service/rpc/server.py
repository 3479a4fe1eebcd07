"""The gRPC server that gateway, worker and watchdog share: options, health, reflection, errors."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from service.auth import roles
from service.auth.callers import NOBODY, Caller
from service.config import Settings
from service.db.availability import DatabaseAwayError, Meaning, first_line, meaning_of
from service.errors import ApiError, Violation, database_unavailable, invalid
from service.rpc import call_context, ports
from service.rpc.access import Access
from service.rpc.handlers import Context, Handler, behaviour, replace
from service.rpc.health import NOT_SERVING, SERVING, HealthServicer
from service.telemetry import logs
from vllm_batch.channel import MAX_MESSAGE_BYTES

SERVER_OPTIONS = (
    *ports.OPTIONS,
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Calls that arrive together wait their turn; by default some of more than 1,000 would be cancelled.
    ("grpc.server.max_pending_requests", 20_000),
    ("grpc.server.max_pending_requests_hard_limit", 40_000),
    # Otherwise the streams of a client that vanished or froze would hold their resources for ever.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.http2.ping_timeout_ms", 20_000),
)
CHANNEL_OPTIONS = (
    # A proxy in the environment is for the outside world, and may not reach a worker.
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Together they detect a frozen peer within about 5 s; by default a ping times out only after 60 s.
    ("grpc.keepalive_time_ms", 2_500),
    ("grpc.http2.ping_timeout_ms", 2_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # By default gRPC pings only once a minute after two pings without data, and notices a frozen peer that late.
    ("grpc.http2.max_pings_without_data", 0),
    # Reconnects to a restarted worker within a second.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # The name may stand for another address by then; gRPC asks only every 30 s.
    ("grpc.dns_min_time_between_resolutions_ms", 1_000),
)

log = logs.get("rpc")


@dataclass(frozen=True)
class Server:
    """A gRPC server that is running, with its health and its address."""

    grpc_server: grpc.aio.Server
    health: HealthServicer
    address: str

    async def set_health(self, name: str, is_serving: bool) -> None:
        """Sets a health name to SERVING or NOT_SERVING."""
        self.health.set(name, SERVING if is_serving else NOT_SERVING)

    async def end(self, grace_s: float) -> None:
        """Sets health to NOT_SERVING, accepts no more calls, and gives those under way `grace_s` to finish."""
        self.health.end()
        await self.grpc_server.stop(grace_s)


async def serve(
    settings: Settings,
    port: int,
    add_services: Callable[[grpc.aio.Server], None],
    service_names: tuple[str, ...],
    access: Access,
    *,
    socket: str = "",
) -> Server:
    """Starts a server with health and, unless switched off, reflection; with TLS if the settings have a certificate.

    The health of `""` and of each service starts as NOT_SERVING. `socket` is the address of a Unix socket to serve as
    well, for its owner only and without TLS.
    Raises RuntimeError if the port cannot be bound, ValueError or OSError if a key file is invalid.
    """
    server = grpc.aio.server(interceptors=[Interceptor(access)], options=SERVER_OPTIONS)
    health = HealthServicer(("", *service_names))
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    add_services(server)
    names = (*service_names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
    if settings.reflection:
        reflection.enable_server_reflection(names, server)
    bound = ports.open(server, settings, port)
    if socket:
        ports.open_socket(server, socket)
    await server.start()
    return Server(server, health, settings.advertised_address(bound))


async def serve_health(socket: str) -> Server:
    """Starts a server with health alone at a Unix socket, for its owner only: for programs that serve no gRPC.

    The health of `""` starts as NOT_SERVING. Raises RuntimeError if the socket cannot be bound.
    """
    server, health = grpc.aio.server(options=SERVER_OPTIONS), HealthServicer(("",))
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    ports.open_socket(server, socket)
    await server.start()
    return Server(server, health, socket)


class Interceptor(grpc.aio.ServerInterceptor):
    """Wraps every call except health checks: access, rate limit, errors, logs, metrics and trace.

    A single interceptor, because gRPC runs each one on every call.
    """

    def __init__(self, access: Access) -> None:
        self._access = access
        self._wrapped: dict[str, Handler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The handler of this call. If the call is refused, not even its request is read."""
        handler, method = await continuation(handler_call_details), handler_call_details.method
        if handler is None or roles.is_open(method):
            return handler
        metadata: Any = handler_call_details.invocation_metadata or ()
        call = call_context.begin(method, metadata)
        try:
            call.caller = self._access.caller(method, metadata) or NOBODY
        except ApiError as refusal:
            return _served(self._access, method, _refusing(method, refusal), is_refused=True)
        if method not in self._wrapped:
            self._wrapped[method] = _served(self._access, method, handler)
        return self._wrapped[method]


def _served(access: Access, method: str, handler: Handler, *, is_refused: bool = False) -> Handler:
    """The handler with its rate limit and, except for reflection, its metrics, logs and trace.

    Errors of the handler and of the request's parser end the call with their code and details. Those that are our
    fault are logged.
    """
    inner = behaviour(handler)
    deserialize: Any = handler.request_deserializer
    is_counted = not method.startswith("/grpc.")

    def serving(context: Context) -> contextlib.AbstractContextManager[None]:
        return call_context.current().served(context) if is_counted else contextlib.nullcontext()

    def parse(data: bytes) -> Any:
        try:
            return deserialize(data) if deserialize else data
        except Exception:  # noqa: BLE001 - the client's fault; gRPC would answer INTERNAL
            return invalid([Violation("message", f"is not a valid request of {method}")])

    def enter(request: Any, context: Context) -> Any:
        call = call_context.current()
        if call.caller is NOBODY and not is_refused:
            # Only the context has the certificate, and that comes after the request.
            call.identify(_certified(access, method, context))
        access.count(method, call.caller, context.peer())
        if isinstance(request, ApiError):
            raise request
        return _checked(request) if handler.request_streaming else request

    async def unary(request: Any, context: Context) -> Any:
        with serving(context):
            try:
                return await inner(enter(request, context), context)
            except Exception as error:  # noqa: BLE001 - every error ends the call with a status
                await _abort(context, method, error)

    async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
        with serving(context):
            try:
                async for response in inner(enter(request, context), context):
                    yield response
            except Exception as error:  # noqa: BLE001 - every error ends the call with a status
                await _abort(context, method, error)

    return replace(handler, unary, stream, parse)


def _certified(access: Access, method: str, context: Context) -> Caller:
    """Who calls with the certificate of this connection. Raises UNAUTHENTICATED or PERMISSION_DENIED."""
    metadata: Any = context.invocation_metadata() or ()
    try:
        return access.certified(method, context.peer_identities() or (), metadata)
    except ApiError as refusal:
        log.warning("call_refused", method=method, peer=context.peer(), reason=refusal.reason)
        raise


def _refusing(method: str, refusal: ApiError) -> Handler:
    async def refuse(_: Any, context: Context) -> AsyncIterator[Any]:
        log.warning("call_refused", method=method, peer=context.peer(), reason=refusal.reason)
        raise refusal
        yield

    return grpc.stream_stream_rpc_method_handler(refuse)


async def _checked(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """The client's stream. Raises the ApiError of a message that could not be parsed."""
    async for request in requests:
        if isinstance(request, ApiError):
            raise request
        yield request


async def _abort(context: Context, method: str, error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, DatabaseAwayError):
        log.warning("call_without_database", method=method, cause=str(error))
        error = database_unavailable(str(error))
    elif meaning_of(error) is Meaning.REFUSED:
        log.warning("call_refused_by_database", method=method, cause=first_line(error))
        error = ApiError(grpc.StatusCode.INVALID_ARGUMENT, f"Postgres refuses it: {first_line(error)}")
    if not isinstance(error, ApiError):
        log.error("call_failed", method=method, exc_info=error)
        error = ApiError(grpc.StatusCode.INTERNAL, f"{method} failed: {type(error).__name__}")
    await context.abort(error.code, error.details, error.trailing_metadata)
