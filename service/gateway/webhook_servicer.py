"""WebhookService: deliveries listed, a target tried out, events sent again."""

from collections.abc import Callable, Sequence
from uuid import UUID

from service.api import messages
from service.api.servicer import asked_tenant
from service.db import webhooks
from service.db.connection import Database
from service.db.webhooks import Delivery
from service.errors import Violation, invalid, not_found
from service.rpc import call_context, pages
from service.rpc.handlers import Context
from service.rpc.times import duration, timestamp
from service.telemetry import logs
from service.tenants import Quotas
from service.webhook_targets import Networks
from service.webhooks import signing
from service.webhooks.deliverer import Deliverer
from vllm_batch.v1 import webhook_service_pb2 as pb
from vllm_batch.v1 import webhook_service_pb2_grpc

log = logs.get("webhooks")


class WebhookServicer(webhook_service_pb2_grpc.WebhookServiceServicer):
    """Reads and changes deliveries in Postgres; sends tests itself."""

    def __init__(
        self, database: Database, deliverer: Deliverer, networks: Networks, quotas: Callable[[], Quotas]
    ) -> None:
        self._database = database
        self._deliverer = deliverer
        self._networks = networks
        self._quotas = quotas

    async def ListDeliveries(self, request: pb.ListDeliveriesRequest, context: Context) -> pb.ListDeliveriesResponse:
        """Returns a page of deliveries, newest first."""
        size = pages.size(request.page_size)
        before = pages.position(request.page_token, "deliveries", "page_token")
        states = [_state(state, place) for place, state in enumerate(request.states)]
        batch = messages.batch_id(request.batch_id) if request.batch_id else None
        tenant = asked_tenant(request.tenant, "Listing the webhooks")
        found = await self._database.read(webhooks.list_page, tenant, batch, states, before, size + 1)
        return pb.ListDeliveriesResponse(
            deliveries=_messages(found[:size]),
            next_page_token=pages.token("deliveries", found[size - 1].number) if len(found) > size else "",
        )

    async def TestWebhook(self, request: pb.TestWebhookRequest, context: Context) -> pb.TestWebhookResponse:
        """Sends an event to the URL, or to the tenant's."""
        asked = asked_tenant(request.tenant, "Testing the webhook")
        tenant = request.tenant or asked or call_context.current().caller.tenant
        webhook = self._quotas().of(tenant).webhook
        url = request.url or (webhook.url if webhook is not None else None) or ""
        if not url:
            raise invalid([Violation("url", f"is required: tenant {tenant} has no target of its own")])
        wrong = messages.wrong_webhook(url, tenant, self._quotas(), self._networks, "url")
        if wrong:
            raise invalid(wrong)
        outcome, name, took_s = await self._deliverer.test(tenant, url)
        return pb.TestWebhookResponse(
            id=name, url=url, status=outcome.status or 0, error=outcome.error, duration=duration(took_s)
        )

    async def ReplayDeliveries(
        self, request: pb.ReplayDeliveriesRequest, context: Context
    ) -> pb.ReplayDeliveriesResponse:
        """Makes an event due again."""
        delivery: UUID | None = None
        batch: int | None = None
        which = request.WhichOneof("which")
        if which is None:
            raise invalid([Violation("delivery_id", "is required, or batch_id")])
        if which == "batch_id":
            batch = messages.batch_id(request.batch_id)
        else:
            delivery = signing.event_id(request.delivery_id)
        what = f"a webhook of {request.batch_id!r}" if batch else f"webhook {request.delivery_id[:100]!r}"
        if delivery is None and batch is None:
            raise not_found(what)
        found = await self._database.run(webhooks.replay, call_context.scope(), delivery, batch)
        if not found:
            raise not_found(what)
        for each in found:
            log.info("webhook_replayed", webhook=signing.event_name(each.id), batch=messages.batch_name(each.batch_id))
        return pb.ReplayDeliveriesResponse(deliveries=_messages(found))


def _state(state: int, place: int) -> str:
    """The stored spelling of a DeliveryState. Raises INVALID_ARGUMENT."""
    if state not in pb.DeliveryState.values() or state == pb.DELIVERY_STATE_UNSPECIFIED:
        raise invalid([Violation(f"states[{place}]", f"{state} is no state")])
    return pb.DeliveryState.Name(pb.DeliveryState.ValueType(state)).removeprefix("DELIVERY_STATE_").lower()


def _messages(found: Sequence[Delivery]) -> list[pb.Delivery]:
    """Deliveries as clients see them."""
    return [
        pb.Delivery(
            id=signing.event_name(each.id),
            batch_id=messages.batch_name(each.batch_id),
            tenant=each.tenant,
            type=each.type,
            url=each.url or "",
            state=f"DELIVERY_STATE_{each.state.upper()}",
            tries=each.tries,
            last_status=each.last_status or 0,
            last_error=each.last_error,
            create_time=timestamp(each.create_time),
            last_try_time=timestamp(each.last_time),
            next_try_time=timestamp(each.next_time) if each.state == "pending" else None,
            end_time=timestamp(each.end_time),
        )
        for each in found
    ]
