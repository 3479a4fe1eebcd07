"""All batches at a glance, for who watches the whole."""

from collections.abc import Mapping
from dataclasses import dataclass

import peewee


@dataclass(frozen=True)
class Survey:
    """How much there is and how long it waits. `leased` requests are those of chunks that a worker holds.

    `queue_age_s`: since the oldest batch was created of which no request has gone to a worker; 0 without one.
    `lease_age_s`: since the lease was renewed that was renewed longest ago; 0 without one.
    """

    batches: Mapping[str, int]
    queued: int
    leased: int
    queue_age_s: float
    lease_age_s: float


def take(db: peewee.PostgresqlDatabase, lease_s: float) -> Survey:
    """Costs an index's scan of the batches, and what is in progress; nothing of requests and results is read."""
    counts = dict(db.execute_sql("SELECT state, count(*) FROM batches GROUP BY state").fetchall())
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
    return Survey(counts, max(0, unanswered - leased), leased, queue_age_s, lease_age_s)
