"""The models that are served now."""

from fastapi import APIRouter

from service.db import heartbeats
from service.db.connection import Database
from service.db.heartbeats import Phase
from service.errors import not_found
from service.http.objects import ModelObject, Models


def router(database: Database, timeout_s: float) -> APIRouter:
    """The operations on models: those of workers whose heartbeat is fresh."""
    made = APIRouter(prefix="/v1/models", tags=["models"])

    @made.get("", name="ListModels")
    async def list_models() -> Models:
        return Models(data=await served())

    @made.get("/{model:path}", name="GetModel")
    async def get(model: str) -> ModelObject:
        found = [one for one in await served() if one.id == model]
        if not found:
            raise not_found(f"model {model[:100]!r}")
        return found[0]

    async def served() -> list[ModelObject]:
        names: set[str] = set()
        for seen in await database.read(heartbeats.read):
            if seen.age_s <= timeout_s and seen.beat.phase == Phase.READY:
                names.update(seen.beat.models)
        return [ModelObject(id=name) for name in sorted(names)]

    return made
