"""The calls on stored batches of a server that knows of the workers: with the end or the wait of each batch."""

from collections.abc import Sequence

from service.api.servicer import BatchServicer
from service.db.batches import Batch
from service.db.connection import Database
from service.db.limits import Limits
from service.insight.explainer import Explainer
from vllm_batch.v1 import batch_service_pb2 as pb


class ExplainedServicer(BatchServicer):
    """Adds to batches when they will end, or why they do not move."""

    def __init__(self, database: Database, limits: Limits, explainer: Explainer) -> None:
        super().__init__(database, limits)
        self._explainer = explainer

    async def _described(self, found: Sequence[Batch]) -> list[pb.Batch]:
        described = await super()._described(found)
        await self._explainer.explain(found, described)
        return described
