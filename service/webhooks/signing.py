"""What is sent: the body of an event as OpenAI has it, and the headers of the Standard Webhooks that sign it. Pure."""

import json
from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from standardwebhooks.webhooks import Webhook

# The type of the event by which somebody tries out a target, and the batch that it is about, which does not exist.
TEST_TYPE = "webhook.test"
TEST_BATCH = "batch_test"


def event_name(delivery: UUID) -> str:
    """The id of an event, the same at each try: receivers know by it what they have seen."""
    return f"evt_{delivery.hex}"


def event_id(name: str) -> UUID | None:
    """The delivery with this name; None: it is no name of one."""
    prefix, _, digits = name.partition("_")
    try:
        return UUID(hex=digits) if prefix == "evt" and len(digits) == 32 else None
    except ValueError:
        return None


def body(name: str, kind: str, batch: str, create_time: datetime) -> str:
    """An event as JSON."""
    event = {
        "id": name,
        "object": "event",
        "created_at": int(create_time.timestamp()),
        "type": kind,
        "data": {"id": batch},
    }
    return json.dumps(event, separators=(",", ":"))


def headers(secrets: Sequence[str], name: str, body: str, now: datetime) -> dict[str, str]:
    """The headers that sign a body, with each of the secrets: the receiver needs to know one of them."""
    return {
        "webhook-id": name,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": " ".join(Webhook(secret).sign(name, now, body) for secret in secrets),
    }
