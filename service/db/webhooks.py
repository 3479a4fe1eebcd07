"""Deliveries of webhooks: the events of batches that have ended, leased, tried, delivered or given up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import peewee
from psycopg2.extras import execute_values

# Longer than a try may take, so that no two overlap.
LEASE_S = 30.0
# How long an event is tried.
PATIENCE_S = 86_400.0

# A tenant that has no target by then has none: gateways read their files of tenants at different times.
UNADDRESSED_S = 60.0

STATES = ("pending", "delivered", "given_up")


@dataclass(frozen=True)
class Delivery:
    """One event and what became of it. `url` None: its tenant's target is not looked up yet."""

    id: UUID
    number: int
    batch_id: int
    tenant: str
    type: str
    url: str | None
    is_own: bool
    state: str
    tries: int
    last_status: int | None
    last_error: str
    create_time: datetime
    last_time: datetime | None
    next_time: datetime
    end_time: datetime | None
    claim: UUID | None


@dataclass(frozen=True)
class Outcome:
    """What came of a try: the status of the answer, if there was one, and why it failed; empty: it did not."""

    status: int | None
    error: str = ""


@dataclass(frozen=True)
class Counts:
    """Deliveries by state, and the age of the oldest event that is pending."""

    states: Mapping[str, int]
    oldest_s: float


COLUMNS = (
    "id::text, number, batch_id, tenant, type, url, is_own, state, tries, last_status, last_error, create_time,"
    " last_time, next_time, end_time, claim::text"
)
# As `webhook_targets.origin` has it.
ORIGIN = "substring(url FROM '^[^/]+//[^/?]+')"
IS_DUE = """
state = 'pending' AND next_time <= clock_timestamp() AND (lease_until IS NULL OR lease_until <= clock_timestamp())
"""


def due(
    db: peewee.PostgresqlDatabase,
    urls: Mapping[str, str],
    limit: int,
    resting: Sequence[tuple[str, str]],
    busy: Sequence[str] = (),
) -> list[Delivery]:
    """What may be tried now, those first that are due longest, without what goes to targets that are `resting`.

    Targets are pairs of tenant and origin. Nothing of the tenants that are `busy`. New events get the target that their
    tenant has in `urls`.
    """
    _address(db, urls, "d.url IS NULL")
    condition, values = "", [*(value for target in resting for value in target), *busy]
    if resting:
        pairs = ", ".join(["(%s, %s)"] * len(resting))
        condition = f"AND (tenant, {ORIGIN}) NOT IN ({pairs})"
    if busy:
        condition += f" AND tenant NOT IN ({', '.join(['%s'] * len(busy))})"
    rows = db.execute_sql(
        f"SELECT {COLUMNS} FROM webhook_deliveries WHERE {IS_DUE} AND url IS NOT NULL {condition}"
        " ORDER BY next_time, number LIMIT %s",
        (*values, limit),
    )
    return [_from_row(row) for row in rows.fetchall()]


def readdress(db: peewee.PostgresqlDatabase, urls: Mapping[str, str]) -> None:
    """Gives all pending events the target that their tenant has now, also those that were tried elsewhere before."""
    _address(db, urls, "d.url IS DISTINCT FROM t.url")


def _address(db: peewee.PostgresqlDatabase, urls: Mapping[str, str], which: str) -> None:
    if not urls:
        return
    with db.cursor() as cursor:
        execute_values(
            cursor,
            "UPDATE webhook_deliveries d SET url = t.url FROM (VALUES %s) t (tenant, url)"
            f" WHERE d.state = 'pending' AND NOT d.is_own AND d.tenant = t.tenant AND {which}",
            list(urls.items()),
            page_size=len(urls),
        )


def claim(db: peewee.PostgresqlDatabase, ids: Sequence[UUID]) -> list[Delivery]:
    """Leases those that nobody else holds and that are still due."""
    rows = db.execute_sql(
        f"""
        WITH free AS MATERIALIZED (
            SELECT id FROM webhook_deliveries WHERE id = ANY(%(ids)s::uuid[]) AND {IS_DUE}
            ORDER BY id FOR UPDATE SKIP LOCKED
        )
        UPDATE webhook_deliveries SET claim = gen_random_uuid(), tries = tries + 1, last_time = clock_timestamp(),
               lease_until = clock_timestamp() + make_interval(secs => %(lease_s)s)
        WHERE id IN (SELECT id FROM free) RETURNING {COLUMNS}
        """,
        {"ids": [str(one) for one in ids], "lease_s": LEASE_S},
    )
    return [_from_row(row) for row in rows.fetchall()]


def record(
    db: peewee.PostgresqlDatabase, claimed: Delivery, outcome: Outcome, delay_s: float
) -> tuple[str, datetime] | None:
    """Writes what came of a try; a failed one is followed by the next after `delay_s`, if that is not too late.

    Returns the new state and the time of the next try. None: the lease was lost, or a replay was asked for meanwhile.
    """
    row = db.execute_sql(
        """
        UPDATE webhook_deliveries d SET
            state = n.state, last_status = %(status)s, last_error = %(error)s, claim = NULL, lease_until = NULL,
            next_time = n.next_time, end_time = CASE WHEN n.state <> 'pending' THEN clock_timestamp() END
        FROM (SELECT id, CASE WHEN %(error)s = '' THEN 'delivered'
                     WHEN clock_timestamp() + make_interval(secs => %(delay_s)s) < expire_time THEN 'pending'
                     ELSE 'given_up' END AS state,
                     clock_timestamp() + make_interval(secs => %(delay_s)s) AS next_time
              FROM webhook_deliveries WHERE id = %(id)s::uuid) n
        WHERE d.id = n.id AND d.claim = %(claim)s::uuid RETURNING d.state, d.next_time
        """,
        {
            "id": str(claimed.id),
            "claim": str(claimed.claim),
            "status": outcome.status,
            "error": outcome.error,
            "delay_s": delay_s,
        },
    ).fetchone()
    return None if row is None else (row[0], row[1])


def rest(db: peewee.PostgresqlDatabase, tenant: str, origin: str, rest_s: float) -> int:
    """Puts off everything that goes to a target, at every gateway. Returns how many deliveries that are."""
    cursor = db.execute_sql(
        f"""
        UPDATE webhook_deliveries SET next_time = clock_timestamp() + make_interval(secs => %(rest_s)s)
        WHERE id IN (
            SELECT id FROM webhook_deliveries
            WHERE state = 'pending' AND tenant = %(tenant)s AND {ORIGIN} = %(origin)s AND claim IS NULL
              AND next_time < clock_timestamp() + make_interval(secs => %(rest_s)s)
            ORDER BY id FOR UPDATE SKIP LOCKED)
        """,
        {"tenant": tenant, "origin": origin, "rest_s": rest_s},
    )
    return int(cursor.rowcount)


def give_up(db: peewee.PostgresqlDatabase) -> list[Delivery]:
    """Gives up what is too late while its target rests. Returns up to 100 of them."""
    rows = db.execute_sql(
        f"""
        WITH late AS MATERIALIZED (
            SELECT id FROM webhook_deliveries
            WHERE state = 'pending' AND expire_time <= clock_timestamp()
              AND (lease_until IS NULL OR lease_until <= clock_timestamp())
            ORDER BY id LIMIT 100 FOR UPDATE SKIP LOCKED
        )
        UPDATE webhook_deliveries SET state = 'given_up', end_time = clock_timestamp(), claim = NULL,
               lease_until = NULL, last_error = coalesce(nullif(last_error, ''), 'was never tried')
        WHERE id IN (SELECT id FROM late) RETURNING {COLUMNS}
        """
    )
    return [_from_row(row) for row in rows.fetchall()]


def delete_unaddressed(db: peewee.PostgresqlDatabase) -> None:
    """Removes up to 10,000 events for which no gateway has found a target within UNADDRESSED_S."""
    db.execute_sql(
        "DELETE FROM webhook_deliveries WHERE id IN (SELECT id FROM webhook_deliveries"
        " WHERE state = 'pending' AND url IS NULL AND next_time < clock_timestamp() - make_interval(secs => %s)"
        " LIMIT 10000 FOR UPDATE SKIP LOCKED)",
        (UNADDRESSED_S,),
    )


def delete_old(db: peewee.PostgresqlDatabase, retention_s: float) -> None:
    """Removes up to 1,000 deliveries that ended more than `retention_s` ago."""
    db.execute_sql(
        "DELETE FROM webhook_deliveries WHERE id IN (SELECT id FROM webhook_deliveries"
        " WHERE state <> 'pending' AND end_time < clock_timestamp() - make_interval(secs => %s)"
        " ORDER BY end_time LIMIT 1000 FOR UPDATE SKIP LOCKED)",
        (retention_s,),
    )


def replay(
    db: peewee.PostgresqlDatabase, tenant: str | None, delivery: UUID | None, batch_id: int | None
) -> list[Delivery]:
    """Makes an event, or that of a batch, due again, for another day. Empty: there is none, or not of the tenant.

    The outcome of a try that is under way does not count any more: there will be another one.
    """
    rows = db.execute_sql(
        f"""
        UPDATE webhook_deliveries SET state = 'pending', claim = NULL, end_time = NULL, next_time = clock_timestamp(),
               expire_time = clock_timestamp() + make_interval(secs => %(patience_s)s)
        WHERE (%(tenant)s::text IS NULL OR tenant = %(tenant)s)
          AND (id = %(id)s::uuid OR batch_id = %(batch)s::bigint)
        RETURNING {COLUMNS}
        """,
        {
            "tenant": tenant,
            "id": None if delivery is None else str(delivery),
            "batch": batch_id,
            "patience_s": PATIENCE_S,
        },
    )
    return [_from_row(row) for row in rows.fetchall()]


def list_page(
    db: peewee.PostgresqlDatabase,
    tenant: str | None,
    batch_id: int | None,
    states: Sequence[str],
    before: int | None,
    limit: int,
) -> list[Delivery]:
    """Up to `limit` deliveries, newest first, in one of `states` (empty: any), older than the number `before`."""
    where = {
        "tenant = %(tenant)s": tenant is not None,
        "batch_id = %(batch)s": batch_id is not None,
        "state = ANY(%(states)s)": bool(states),
        "number < %(before)s": before is not None,
    }
    condition = " AND ".join(["true", *(text for text, is_asked in where.items() if is_asked)])
    rows = db.execute_sql(
        f"SELECT {COLUMNS} FROM webhook_deliveries WHERE {condition} ORDER BY number DESC LIMIT %(limit)s",
        {"tenant": tenant, "batch": batch_id, "states": list(states), "before": before, "limit": limit},
    )
    return [_from_row(row) for row in rows.fetchall()]


def count_webhooks(db: peewee.PostgresqlDatabase) -> Counts:
    """How many deliveries there are, for metrics. Those whose target is not looked up yet do not count."""
    rows = db.execute_sql(
        "SELECT state, count(*), extract(epoch FROM clock_timestamp() - min(create_time))::float8"
        " FROM webhook_deliveries WHERE url IS NOT NULL GROUP BY state"
    ).fetchall()
    ages = {state: age_s for state, _, age_s in rows}
    return Counts({state: number for state, number, _ in rows}, ages.get("pending", 0.0))


def _from_row(row: Sequence[Any]) -> Delivery:
    """The delivery in a row of COLUMNS."""
    values = list(row)
    values[0], values[-1] = UUID(values[0]), None if values[-1] is None else UUID(values[-1])
    return Delivery(*values)
