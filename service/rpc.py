"""What the gRPC servers of gateway and worker have in common: options, health, reflection, errors."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from service import calls, logs, ports, roles
from service.access import Access
from service.config import Settings
from service.db.connection import Unreachable, is_without_schema
from service.errors import ApiError, Violation, database_unavailable, invalid
from service.handlers import Handler, behaviour, replace
from service.health import NOT_SERVING, SERVING, Health

MAX_MESSAGE_BYTES = 64 << 20

SERVER_OPTIONS = (
    *ports.OPTIONS,
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Calls that come together are begun one after the other; of more than 1,000 some would be cancelled instead.
    ("grpc.server.max_pending_requests", 20_000),
    ("grpc.server.max_pending_requests_hard_limit", 40_000),
    # A client that vanished or is frozen would keep what its streams hold for ever.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.http2.ping_timeout_ms", 20_000),
)
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # With these a frozen peer is noticed within about 5 s; keepalive alone takes its 60 s default.
    ("grpc.keepalive_time_ms", 2_500),
    ("grpc.http2.ping_timeout_ms", 2_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # After two pings without data gRPC would wait for a minute between them, and a frozen peer be noticed that late.
    ("grpc.http2.max_pings_without_data", 0),
    # A worker that is back is reached within a second.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)

Context = grpc.aio.ServicerContext[Any, Any]

log = logs.get("rpc")


@dataclass(frozen=True)
class Server:
    """A gRPC server with its health; the named services start as NOT_SERVING."""

    grpc_server: grpc.aio.Server
    health: Health
    address: str

    async def set_health(self, name: str, is_serving: bool) -> None:
        """Says SERVING or NOT_SERVING for a health name."""
        self.health.set(name, SERVING if is_serving else NOT_SERVING)

    async def end(self, grace_s: float) -> None:
        """Says NOT_SERVING, takes no more calls, and lets those under way finish for `grace_s`."""
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

    Health of `""` and of each service says NOT_SERVING from the start. `socket` is the address of a Unix socket that is
    served too, for its owner alone, always without TLS.
    Raises RuntimeError when the port cannot be had.
    """
    server = grpc.aio.server(interceptors=[Interceptor(access)], options=SERVER_OPTIONS)
    health = Health(("", *service_names))
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    add_services(server)
    names = (*service_names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
    if settings.reflection:
        reflection.enable_server_reflection(names, server)
    bound = ports.open(server, settings, port)
    if socket:
        ports.open_socket(server, socket)
    await server.start()
    return Server(server, health, f"{settings.advertised_host}:{bound}")


class Interceptor(grpc.aio.ServerInterceptor):
    """What is around every call but those of health: rights and rate, errors, and what is known of each call.

    One for all of it, since gRPC goes through each interceptor at each call.
    """

    def __init__(self, access: Access) -> None:
        self._access = access
        self._wrapped: dict[str, Handler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The handler of this call; of one that is refused not even the request is read."""
        handler, method = await continuation(handler_call_details), handler_call_details.method
        if handler is None or roles.is_open(method):
            return handler
        metadata: Any = handler_call_details.invocation_metadata or ()
        call = calls.begin(method, metadata)
        try:
            call.caller = self._access.caller(method, metadata)
        except ApiError as refusal:
            return _served(self._access, method, _refusing(method, refusal))
        if method not in self._wrapped:
            self._wrapped[method] = _served(self._access, method, handler)
        return self._wrapped[method]


def _served(access: Access, method: str, handler: Handler) -> Handler:
    """The handler, for as many calls as its caller may make, each counted and in the logs, but for reflection.

    Its errors end the call with their code and details, as do those of its request's parser. Those that are our fault
    are logged.
    """
    inner = behaviour(handler)
    deserialize: Any = handler.request_deserializer
    is_counted = not method.startswith("/grpc.")

    def serving(context: Context) -> contextlib.AbstractContextManager[None]:
        return calls.current().served(context) if is_counted else contextlib.nullcontext()

    def parse(data: bytes) -> Any:
        try:
            return deserialize(data) if deserialize else data
        except Exception:  # noqa: BLE001 - told to the client; gRPC would call it our fault
            return invalid([Violation("message", f"is not what {method} takes")])

    def enter(request: Any, context: Context) -> Any:
        access.count(method, calls.current().caller, context.peer())
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


def _refusing(method: str, refusal: ApiError) -> Handler:
    async def refuse(_: Any, context: Context) -> AsyncIterator[Any]:
        log.warning("call_refused", method=method, peer=context.peer(), reason=refusal.reason)
        raise refusal
        yield

    return grpc.stream_stream_rpc_method_handler(refuse)


async def _checked(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """A client's stream, as far as its messages can be read."""
    async for request in requests:
        if isinstance(request, ApiError):
            raise request
        yield request


async def _abort(context: Context, method: str, error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, Unreachable) or is_without_schema(error):
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        log.warning("call_without_database", method=method, cause=cause)
        error = database_unavailable(cause)
    if not isinstance(error, ApiError):
        log.error("call_failed", method=method, exc_info=error)
        error = ApiError(grpc.StatusCode.INTERNAL, f"{method} failed: {type(error).__name__}")
    await context.abort(error.code, error.message, error.trailing_metadata)
