"""Errors as OpenAI's API has them: an HTTP status, an error object, headers that say when to try again. Pure."""

import math
from collections.abc import Mapping
from typing import Any

import grpc

from service.auth.tokens import TOKEN_WRONG
from service.errors import ApiError

Code = grpc.StatusCode

# What a client may not send again as it is is never a 409, which SDKs send again.
_STATUSES = {
    Code.INVALID_ARGUMENT: 400,
    Code.FAILED_PRECONDITION: 400,
    Code.UNAUTHENTICATED: 401,
    Code.PERMISSION_DENIED: 403,
    Code.NOT_FOUND: 404,
    Code.DEADLINE_EXCEEDED: 408,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.UNAVAILABLE: 503,
}
TOO_LARGE = 413
CODES = {status: code for code, status in _STATUSES.items()} | {400: Code.INVALID_ARGUMENT}
# What ends without an error of ours: a path that is not there, a method that it does not have.
CODES |= {405: Code.UNIMPLEMENTED, 413: Code.RESOURCE_EXHAUSTED, 416: Code.OUT_OF_RANGE}


def status_of(error: ApiError) -> int:
    """The HTTP status of an error."""
    if error.code is Code.RESOURCE_EXHAUSTED and error.retry_delay_s is None:
        return TOO_LARGE
    return _STATUSES.get(error.code, 500)


def code_of(status: int) -> Code:
    """What metrics and logs call a status."""
    if status < 400:
        return Code.OK
    return CODES.get(status, Code.INTERNAL if status >= 500 else Code.INVALID_ARGUMENT)


def body(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The error object."""
    if status == 429:
        kind = "rate_limit_error"
    elif status == 403:
        kind = "permission_error"
    else:
        kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def body_of(error: ApiError) -> dict[str, Any]:
    """The error object of an ApiError."""
    status = status_of(error)
    param = error.violations[0].field if error.violations else None
    code: str | None
    if error.reason:
        code = "invalid_api_key" if error.reason == TOKEN_WRONG else error.reason.lower()
    else:
        code = {429: "rate_limit_exceeded", 404: "not_found"}.get(status)
    return body(error.message, status, param, code)


def headers_of(error: ApiError) -> Mapping[str, str]:
    """When to try again, in both forms that SDKs read; how to sign in."""
    headers = {}
    if error.retry_delay_s is not None:
        headers["retry-after"] = str(math.ceil(error.retry_delay_s))
        headers["retry-after-ms"] = str(round(error.retry_delay_s * 1000))
    if error.code is Code.UNAUTHENTICATED:
        headers["www-authenticate"] = "Bearer"
    return headers
