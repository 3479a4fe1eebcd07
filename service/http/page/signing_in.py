"""Signing in on the page, and out."""

import grpc
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, Response

from service.auth.callers import Caller
from service.errors import ApiError
from service.http.page.sessions import COOKIE, LASTS_S, PATH, Sessions
from service.rpc import call_context
from service.telemetry import logs

log = logs.get("page")


class GivenToken(BaseModel):
    """What somebody signs in with."""

    token: str = Field(min_length=1, max_length=1000)


def router(sessions: Sessions) -> APIRouter:
    """The session of a browser."""
    made = APIRouter(prefix="/page/api/session", include_in_schema=False)

    @made.post("", name="/page/SignIn")
    async def sign_in(given: GivenToken, request: Request) -> Response:
        if not sessions.are_needed:
            raise ApiError(grpc.StatusCode.FAILED_PRECONDITION, "no token is required here")
        secret, caller = await sessions.begin(given.token.strip())
        log.info("signed_in", caller=caller.name)
        answer = Response(status_code=204)
        answer.set_cookie(
            COOKIE,
            secret,
            max_age=round(LASTS_S),
            path=PATH,
            # As the browser sees it: TLS may end at a proxy.
            secure=request.url.scheme == "https" or request.headers.get("origin", "").startswith("https://"),
            httponly=True,
            samesite="strict",
        )
        return answer

    @made.get("", name="/page/GetSession")
    async def get(request: Request) -> Response:
        caller = call_context.current().caller
        return JSONResponse(_session(caller, sessions, request), headers={"cache-control": "no-store"})

    @made.delete("", name="/page/SignOut")
    async def sign_out(request: Request) -> Response:
        await sessions.end(request.headers)
        log.info("signed_out")
        answer = Response(status_code=204)
        answer.delete_cookie(COOKIE, path=PATH)
        return answer

    return made


def _session(caller: Caller, sessions: Sessions, request: Request) -> dict[str, object]:
    return {
        "name": caller.name,
        "tenant": caller.tenant,
        "role": caller.role,
        "sees_all": caller.sees_all,
        "is_signed_in": sessions.are_needed,
        "proof": sessions.proof(request.headers),
    }
