"""Totals over all batches, for monitoring."""

from collections.abc import Mapping
from dataclasses import dataclass

import peewee


@dataclass(frozen=True)
class QueueStats:
    """How much work there is and how long it waits. `leased` counts the requests in chunks that workers hold.

    `queue_age_s`: age of the oldest batch that no worker has started; 0 without one.
    `lease_age_s`: time since the renewal of the least recently renewed lease; 0 without one.
    """

    batches: Mapping[str, int]
    queued: int
    leased: int
    queue_age_s: float
    lease_age_s: float


def take(db: peewee.PostgresqlDatabase, lease_s: float) -> QueueStats:
    """Costs an index scan over the batches, plus reading those in progress; does not read requests or results."""
    by_state = dict(db.execute_sql("SELECT state, count(*) FROM batches GROUP BY state").fetchall())
    unanswered, queue_age_s = db.execute_sql(
        """
        SELECT coalesce(sum(total - completed - failed), 0)::bigint,
               coalesce(extract(epoch FROM clock_timestamp() - min(create_time) FILTER (WHERE start_time IS NULL)),
                        0)::float8
        FROM batches WHERE state = 'in_progress'
        """
    ).fetchone()
    leased, lease_age_s = db.execute_sql(
        """
        SELECT coalesce(sum(unfinished), 0)::bigint,
               greatest(0, coalesce(%s - extract(epoch FROM min(lease_until) - clock_timestamp()), 0))::float8
        FROM chunks WHERE state = 'leased'
        """,
        (lease_s,),
    ).fetchone()
    return QueueStats(by_state, max(0, unanswered - leased), leased, queue_age_s, lease_age_s)
