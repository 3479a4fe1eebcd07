"""The application: OpenAI's operations and the document that describes them, health, and the page."""

import asyncio
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from service.db.connection import Database, check_schema
from service.http import batches, door, files, models, uploads
from service.http.door import Door
from service.http.files import Keeping
from service.http.objects import ErrorBody
from service.http.page.wiring import Page
from service.rpc.access import Access
from service.webhook_targets import Networks

# Of every operation. Without it FastAPI describes errors of its own, which nobody ever gets.
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is wrong, not allowed, or one too many"},
    "5XX": {"model": ErrorBody, "description": "The server failed, or Postgres is away"},
}

# How long an answer of Postgres serves everybody who asks.
READY_S = 1.0


@dataclass
class Ready:
    """Whether what comes in can be kept."""

    database: Database
    _asked: asyncio.Future[None] | None = None
    _asked_s: float = 0.0

    async def check(self) -> None:
        """Asks Postgres at most once per READY_S, and never twice at once. Raises DatabaseAwayError."""
        now_s = asyncio.get_running_loop().time()
        if self._asked is None or (self._asked.done() and now_s - self._asked_s >= READY_S):
            self._asked, self._asked_s = self.database.read(check_schema), now_s
        # Others wait for it too.
        await asyncio.shield(self._asked)


def made(
    database: Database,
    access: Access,
    keeping: Keeping,
    heartbeat_timeout_s: float,
    webhook_networks: Networks,
    page: Page,
    names: Set[str],
    is_local: bool,
) -> Door:
    """The application, with what each request passes around it.

    `names` are those of this machine; `is_local`: no other one reaches it.
    """
    app = FastAPI(
        title="vLLM batch server",
        description="Files, uploads, batches and models as in OpenAI's API.",
        version="1",
        # They are made of scripts of other hosts.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses=ERRORS,
        generate_unique_id_function=lambda route: route.name,
    )
    for router in (
        files.router(database, keeping),
        uploads.router(database, keeping),
        batches.router(database, keeping.limits, webhook_networks),
        models.router(database, heartbeat_timeout_s),
    ):
        app.include_router(router)
    for router in page.routers():
        app.include_router(router)
    # The same, for who has signed in on the page.
    for router in (files.router(database, keeping), batches.router(database, keeping.limits, webhook_networks)):
        app.include_router(router, prefix="/page/api", include_in_schema=False)

    ready = Ready(database)

    @app.get("/healthz", name="healthz", include_in_schema=False)
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", name="readyz", include_in_schema=False)
    async def readyz() -> dict[str, str]:
        # Also with no worker alive: what is kept is begun later.
        await ready.check()
        return {"status": "ok"}

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> JSONResponse:
        return door.of_http(error, request)

    @app.exception_handler(RequestValidationError)
    async def of_validation(request: Request, error: RequestValidationError) -> JSONResponse:
        return door.of_validation(error.errors(), request.headers.get("content-type", ""))

    for kind in door.HANDLED:
        app.add_exception_handler(kind, door.on_error)
    # The document is made before: HEAD is no operation of its own.
    app.openapi()
    for route in app.routes:
        if isinstance(route, APIRoute) and "GET" in route.methods and not route.path.startswith(door.PAGE):
            route.methods.add("HEAD")
    return Door(app, app.routes, access, page.sessions, names, is_local)
