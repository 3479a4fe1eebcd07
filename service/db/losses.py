"""Workers that are lost: whose leases end, early on evidence or when they run out, and which deaths that counts as.

A worker is gone for certain only to its own next life, which holds its identity. For all others there is evidence:
its heartbeats are missing, gateways of other hosts no longer reach it, and its sessions at Postgres are silent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

import peewee

from service.db import suspects
from service.db.chunks import release_where
from service.db.suspects import Burial

# A heartbeat is missing once two should have been written, and not before this.
MIN_SILENCE_S = 3.0
# For workers that do not say how often they beat.
OTHERWISE_INTERVAL_S = 5.0
# What a gateway has not repeated within this time no longer counts: it repeats it every second.
REPORT_S = 5.0
# Until then a report that a worker was reached shows that it lives, although its leases have run out.
REACHED_S = 30.0
# What nobody looks at any more.
KEPT_S = 3600.0

_SILENCE = f"""
make_interval(secs => greatest({MIN_SILENCE_S}, 2 * coalesce((h.detail->>'interval_s')::float8,
                                                             {OTHERWISE_INTERVAL_S})))
"""
# Of a heartbeat `h`, here and below.
IS_MISSING = f"h.last_seen < clock_timestamp() - {_SILENCE}"
# Another host's gateway has lost its link to this life, and none reaches it; no session of it was
# used since. Postgres keeps the sessions of a host that vanished, so that they are there means nothing.
_IS_LOST = f"""
{IS_MISSING}
AND (SELECT bool_and(NOT l.is_reachable) FROM losses l
     WHERE l.incarnation = h.incarnation AND host_of(l.seen_from) <> host_of(h.worker_id)
       AND l.report_time > clock_timestamp() - make_interval(secs => {REPORT_S}))
AND NOT EXISTS (SELECT FROM pg_stat_activity a
                WHERE a.application_name LIKE 'vllm-batch-%%' || h.incarnation
                  AND a.state_change > clock_timestamp() - {_SILENCE})
"""
_IS_UP_FOR = "pg_postmaster_start_time() < clock_timestamp() - make_interval(secs => %(lease_s)s)"


@dataclass(frozen=True)
class Loss:
    """A life of a worker whose leases ended, and what became of what it held."""

    worker_id: str
    incarnation: str
    burial: Burial


def silence_s(detail: Mapping[str, object]) -> float:
    """The age from which a heartbeat with this detail is missing."""
    interval_s = detail.get("interval_s")
    return max(MIN_SILENCE_S, 2 * (interval_s if isinstance(interval_s, int | float) else OTHERWISE_INTERVAL_S))


def report(db: peewee.PostgresqlDatabase, seen_from: str, reachable: Mapping[UUID, bool]) -> None:
    """Says of lives of workers whether the gateway `seen_from` (`<host>:<process>`) reaches them, in `losses`.

    Each gateway for itself: those of one host may differ, and one that reaches a worker is enough.

    Of hosts, watchdogs and models that are gone the table `reported_losses` tells (hosts.py).
    """
    db.execute_sql(
        """
        INSERT INTO losses (incarnation, seen_from, is_reachable)
        SELECT i, %(seen_from)s, r FROM unnest(%(incarnations)s::uuid[], %(reachable)s::boolean[]) AS g (i, r)
        ON CONFLICT (incarnation, seen_from)
        DO UPDATE SET is_reachable = EXCLUDED.is_reachable, report_time = clock_timestamp()
        """,
        {
            "seen_from": seen_from,
            "incarnations": [str(incarnation) for incarnation in reachable],
            "reachable": list(reachable.values()),
        },
    )


def take_over(db: peewee.PostgresqlDatabase, lease_s: float) -> list[Loss]:
    """Ends the leases of workers that are lost, before they run out, chunks and files to be checked.

    None until Postgres has been up for `lease_s`: the heartbeats of all are missing after an outage. Leaves out chunks
    that are locked.
    """
    lost = db.execute_sql(
        f"""
        SELECT h.worker_id, h.incarnation FROM heartbeats h
        WHERE {_IS_LOST} AND {_IS_UP_FOR} AND (
            EXISTS (SELECT FROM chunks c WHERE c.state = 'leased' AND c.incarnation = h.incarnation)
            OR EXISTS (SELECT FROM file_batches f WHERE f.incarnation = h.incarnation
                       AND f.lease_until > clock_timestamp()))
        """,
        {"lease_s": lease_s},
    ).fetchall()
    return [loss for worker_id, incarnation in lost if (loss := _take_over(db, worker_id, incarnation))]


def _take_over(db: peewee.PostgresqlDatabase, worker_id: str, incarnation: str) -> Loss | None:
    with db.atomic():
        # It cannot beat meanwhile; if it just did, it is not lost.
        row = db.execute_sql(
            f"SELECT FROM heartbeats h WHERE h.worker_id = %s AND h.incarnation = %s::uuid AND {_IS_LOST}"
            " FOR UPDATE SKIP LOCKED",
            (worker_id, incarnation),
        ).fetchone()
        if row is None:
            return None
        files = db.execute_sql(
            "UPDATE file_batches SET lease_until = clock_timestamp()"
            " WHERE incarnation = %s::uuid AND lease_until > clock_timestamp()",
            (incarnation,),
        ).rowcount
        burial = suspects.bury_lost(db, worker_id, incarnation)
    # Of several workers that saw it at once, the others find nothing left.
    return Loss(worker_id, incarnation, burial) if files or burial != Burial(0, 0, 0) else None


def release_expired(db: peewee.PostgresqlDatabase, lease_s: float) -> list[Loss]:
    """Puts chunks with expired leases back into the queue.

    Releases none until Postgres has been up for `lease_s`: while it was away nobody could renew. Nor any that is
    locked: its results are being written. A worker that still beats, or that a gateway still reaches, has not died.
    """
    expired = db.execute_sql(
        f"""
        SELECT c.worker_id, c.incarnation, NOT EXISTS (
                   SELECT FROM heartbeats h WHERE h.incarnation = c.incarnation
                   AND h.last_seen > clock_timestamp() - {_SILENCE})
               AND NOT EXISTS (
                   SELECT FROM losses l WHERE l.incarnation = c.incarnation AND l.is_reachable
                   AND l.report_time > clock_timestamp() - make_interval(secs => {REACHED_S}))
        FROM chunks c WHERE c.state = 'leased' AND c.lease_until < clock_timestamp() AND {_IS_UP_FOR}
        GROUP BY c.worker_id, c.incarnation
        """,
        {"lease_s": lease_s},
    ).fetchall()
    return [
        Loss(worker_id, incarnation, _release_expired(db, worker_id, incarnation, is_dead))
        for worker_id, incarnation, is_dead in expired
    ]


def _release_expired(db: peewee.PostgresqlDatabase, worker_id: str, incarnation: str, is_dead: bool) -> Burial:
    which = "lease_until < clock_timestamp()"
    if is_dead:
        return suspects.bury_lost(db, worker_id, incarnation, which)
    mine = f"incarnation = %(incarnation)s::uuid AND {which}"
    return Burial(release_where(db, mine, {"incarnation": incarnation}, wait=False), 0, 0)


def prune(db: peewee.PostgresqlDatabase) -> int:
    """Removes what gateways have not repeated for an hour: about lives that were followed by others, or are forgotten.

    Returns how many rows.
    """
    which = "report_time < clock_timestamp() - make_interval(secs => %s)"
    return int(db.execute_sql(f"DELETE FROM losses WHERE {which}", (KEPT_S,)).rowcount)


def released(losses: Sequence[Loss]) -> int:
    """How many chunks and suspects went back into the queue."""
    return sum(loss.burial.released + loss.burial.suspects for loss in losses)
