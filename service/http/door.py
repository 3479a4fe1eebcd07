"""What every request passes: who may call and how often; its id, span and count; errors in OpenAI's form.

Around the application, so that a request that is refused is not even read.
"""

import contextlib
import re
from collections.abc import Mapping, Sequence, Set
from typing import Any

import grpc
import peewee
import psycopg2
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api import messages
from service.auth.callers import NOBODY, Caller
from service.db.availability import DatabaseAwayError, Meaning, first_line, meaning_of
from service.db.limits import FullError
from service.errors import ApiError, Violation, database_unavailable, invalid
from service.http import browsers, certified, errors, multipart
from service.http.page.sessions import REQUEST_FOREIGN, Sessions
from service.rpc import call_context
from service.rpc.access import Access
from service.telemetry import logs

# Of a body that is read as a whole; those of STREAMED are read as they arrive, up to limits of their own.
MAX_BODY_BYTES = 4 << 20
STREAMED = frozenset({"/openai/CreateFile", "/openai/AddUploadPart"})
# What the page asks for; all else is OpenAI's API.
PAGE = "/page/"
SIGN_IN = "/page/SignIn"
# What operations raise, beside what Starlette has answers for.
HANDLED = (ApiError, FullError, ClientDisconnect, DatabaseAwayError, psycopg2.Error, peewee.PeeweeException, Exception)

_SLASHES = re.compile("/+")

log = logs.get("http")


class _EndedError(Exception):
    """The request ended with an error that was sent already, or cannot be sent any more."""


class _Ending:
    """How a request ended, as call_context asks for it."""

    def __init__(self) -> None:
        self.status = 0

    def code(self) -> grpc.StatusCode:
        """As a gRPC code."""
        return errors.code_of(self.status or 500)


class Door:
    """An ASGI application around `app`, whose operations are the names of `routes`.

    `names` are those of this machine; `is_local`: no other one reaches it.
    """

    def __init__(
        self,
        app: ASGIApp,
        routes: Sequence[BaseRoute],
        access: Access,
        sessions: Sessions,
        names: Set[str],
        is_local: bool,
    ) -> None:
        self._app = app
        self._routes = routes
        self._access = access
        self._sessions = sessions
        self._names = names
        self._is_local = is_local

    @property
    def operations(self) -> set[str]:
        """The operations that need a token, where tokens are required."""
        found = {_method(route.name) for route in self._routes if isinstance(route, Route) and not route.name.islower()}
        return found - {SIGN_IN}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = {**scope, "path": plain_path(scope["path"])}
        operation = self._operation(scope)
        metadata = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        call = call_context.begin(operation or "", metadata)
        ending = _Ending()
        request_id = call.id.encode("latin-1", "replace")

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                ending.status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id)]}
            await send(message)

        if operation is None:
            await self._app(scope, receive, send_on)
            return
        with contextlib.suppress(_EndedError):
            refusal: Exception | None = None
            try:
                call.caller = await self._caller(operation, scope, metadata)
            except HANDLED as error:
                refusal = error
            with call.served(ending):  # type: ignore[arg-type]
                try:
                    if refusal is not None:
                        if isinstance(refusal, ApiError):
                            log.warning("call_refused", method=operation, peer=_peer(scope), reason=refusal.reason)
                        raise refusal
                    self._access.count(operation, call.caller, _peer(scope))
                    headers = dict(metadata)
                    if scope["method"] not in browsers.SAFE:
                        _check_coding(headers)
                    body = receive if operation in STREAMED else _limited(receive, headers)
                    await self._app(scope, body, send_on)
                except Exception as error:
                    if not ending.status and (error is refusal or isinstance(error, ApiError)):
                        answer = await on_error(Request(scope), error)
                        await answer(scope, receive, send_on)
                    elif ending.status < 400:
                        # In the middle of an answer: the connection ends, and the client sees that the rest is missing.
                        log.warning("answer_broken_off", method=operation, exc_info=True)
                        raise
                if ending.status >= 400:
                    raise _EndedError

    async def _caller(self, operation: str, scope: Scope, metadata: Sequence[tuple[str, str]]) -> Caller:
        """Who makes a request. Raises UNAUTHENTICATED or PERMISSION_DENIED, also for one that another site makes."""
        headers, method, identities = dict(metadata), scope["method"], certified.of_request(scope)
        is_of_page = scope["path"].startswith(PAGE)
        # Cookies and certificates are sent by browsers themselves, whichever site makes the request.
        is_checked = is_of_page or bool(identities) or method not in browsers.SAFE
        problem = browsers.foreign(method, headers) if is_checked else ""
        # With tokens, a site of another name has no session; and within a network of its own a server has any name.
        if not problem and self._access.tokens is None and (is_of_page or self._is_local):
            problem = browsers.wrong_host(headers.get("host", ""), self._names)
        if problem:
            raise ApiError(grpc.StatusCode.PERMISSION_DENIED, f"refused: {problem}", REQUEST_FOREIGN)
        if operation == SIGN_IN:
            return NOBODY
        if is_of_page:
            if method not in browsers.SAFE:
                self._sessions.check(headers)
            if self._sessions.are_needed:
                # Before Postgres is asked whose session it is.
                self._access.count(operation, NOBODY, _peer(scope))
            return await self._sessions.caller(operation, headers)
        # No gateway stands between: nobody calls here for others.
        return self._access.caller(operation, metadata) or self._access.certified(operation, identities, ())

    def _operation(self, scope: Scope) -> str | None:
        for route in self._routes:
            if isinstance(route, Route) and route.matches(scope)[0] is Match.FULL:
                # Health, the document and the files of the page are for everybody.
                return None if route.name.islower() else _method(route.name)
        return None


def plain_path(path: str) -> str:
    """A path without doubled slashes and the one at its end, which a base of URLs that ends with one leads to.

    A redirect would go to http where a proxy has ended TLS, and curl sends no form again.
    """
    return _SLASHES.sub("/", path).rstrip("/") or "/"


def _method(name: str) -> str:
    """The operation of a route as roles know it."""
    return name if name.startswith("/") else f"/openai/{name}"


def _check_coding(headers: Mapping[str, str]) -> None:
    """Raises INVALID_ARGUMENT for a body that is compressed on its way, which would be stored as it arrives."""
    coding = headers.get("content-encoding", "").strip().lower()
    if coding not in ("", "identity"):
        what = f"is {coding[:20]}, and bodies are not decompressed here: send it as it is"
        raise invalid([Violation("content-encoding", what)])


def _limited(receive: Receive, headers: Mapping[str, str]) -> Receive:
    """The body of a request, which ends the request once it is too large or stops arriving.

    Raises RESOURCE_EXHAUSTED and DEADLINE_EXCEEDED.
    """
    announced, size, is_complete = headers.get("content-length", ""), 0, False
    if announced.isascii() and announced.isdigit() and int(announced[:18]) > MAX_BODY_BYTES:
        raise messages.too_large("bytes of the body", MAX_BODY_BYTES, int(announced[:18]))

    async def counted() -> Message:
        nonlocal size, is_complete
        if is_complete:
            # For as long as the answer takes: what comes now is that the client has gone.
            return await receive()
        async with multipart.timely_piece():
            message = await receive()
        is_complete = not message.get("more_body", False)
        size += len(message.get("body", b""))
        if size > MAX_BODY_BYTES:
            raise messages.too_large("bytes of the body", MAX_BODY_BYTES, size)
        return message

    return counted


def _peer(scope: Scope) -> str:
    """The client's address as gRPC writes it."""
    host, port = scope.get("client") or ("", 0)
    return f"{'ipv6' if ':' in host else 'ipv4'}:{host}:{port}"


def response(error: ApiError) -> JSONResponse:
    """The answer for an error."""
    return JSONResponse(errors.body_of(error), errors.status_of(error), errors.headers_of(error))


async def on_error(request: Request, error: Exception) -> JSONResponse:
    """The answer for whatever an operation raises."""
    name = getattr(request.scope.get("route"), "name", request.url.path)
    if isinstance(error, ApiError):
        return response(error)
    if isinstance(error, ClientDisconnect):
        # Nobody reads it.
        return response(ApiError(grpc.StatusCode.INVALID_ARGUMENT, "the client has gone"))
    if isinstance(error, FullError):
        return response(messages.creation_error(error))
    if isinstance(error, DatabaseAwayError):
        log.warning("call_without_database", method=name, cause=str(error))
        return response(database_unavailable(str(error)))
    if meaning_of(error) is Meaning.REFUSED:
        log.warning("call_refused_by_database", method=name, cause=first_line(error))
        cause = f"Postgres refuses it: {first_line(error)}"
        return response(ApiError(grpc.StatusCode.INVALID_ARGUMENT, cause))
    log.error("call_failed", method=name, exc_info=error)
    return response(ApiError(grpc.StatusCode.INTERNAL, f"{name} failed: {type(error).__name__}"))


def of_http(error: HTTPException, request: Request) -> JSONResponse:
    """The answer for a path or method that is not there, and for a body that cannot be read."""
    status, asked = error.status_code, f"{request.method} {request.url.path[:200]}"
    if status == 405:
        allowed = ", ".join(_methods(request))
        message = f"Not allowed: {asked}. This URL takes {allowed}"
        return JSONResponse(errors.body(message, status, code="method_not_allowed"), status, {"allow": allowed})
    if status == 404:
        return JSONResponse(errors.body(f"Unknown request URL: {asked}", status, code="unknown_url"), status)
    # All that Starlette and FastAPI raise besides is about a body that cannot be read; why is the cause.
    if isinstance(error.__cause__, ApiError):
        return response(error.__cause__)
    why = f": {error.__cause__}" if isinstance(error.__cause__, ValueError) else ""
    return JSONResponse(errors.body(f"body: is not JSON in UTF-8{why[:200]}", status, "body"), status)


def _methods(request: Request) -> list[str]:
    """What can be done with the path of a request. Of a 405 Starlette names only what the first route can do."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    matching = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    return sorted({method for route in matching for method in route.methods or ()})


def of_validation(found: Sequence[Any], content_type: str) -> JSONResponse:
    """The answer for parameters that are not as the document says; what was given is left out."""
    first = found[0]
    loc, what = tuple(first["loc"]), first["msg"]
    if loc[:1] == ("body",) and (first["type"] == "json_invalid" or len(loc) == 1):
        param = "body"
        if first["type"] == "json_invalid":
            # The place is no field but a number of characters.
            what = (
                f"is not JSON at character {loc[1] if len(loc) > 1 else 0}: {first.get('ctx', {}).get('error', what)}"
            )
        elif first["type"] == "missing":
            what = "is required: a JSON object"
        elif not _is_json(content_type):
            # curl says of what follows -d that it is a form.
            param = "content-type"
            what = f"must be application/json, not {content_type[:100]!r}"
        else:
            what = "must be a JSON object"
        return JSONResponse(errors.body(f"{param}: {what}", 400, param), 400)
    name = ".".join(str(part) for part in loc if part not in ("body", "query", "path")) or None
    if first["type"] == "extra_forbidden":
        return JSONResponse(errors.body(f"Unknown parameter: '{name}'.", 400, name, "unknown_parameter"), 400)
    message = f"{name}: {what}" if name else str(what)
    return JSONResponse(errors.body(message, 400, name), 400)


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
