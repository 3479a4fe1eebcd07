"""Hosts: what their programs report, what operators ordered about them, which are gone; aged by Postgres."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import peewee

# Lists stay short however many hosts are gone: this many of the last.
MOST_LOST = 100
# What was gone for longer when it was first looked at is no news.
NEWS_S = 3600.0

# One row for each program that reports: workers, watchdogs, gateways and OpenAI's doors.
SEEN = """
seen AS (
    SELECT host_of(worker_id) AS host, 'worker' AS program, worker_id AS id, address, phase, models, queued, detail,
           version, schema_version, start_time, last_seen,
           phase = 'stopping' AND NOT detail ? 'is_orphan' AS is_ended, machine, network
    FROM heartbeats
    UNION ALL
    SELECT watchdog_id, 'watchdog', watchdog_id || ':watchdog', '', '', '{}', 0, detail,
           version, schema_version, start_time, last_seen, is_ended, machine, ''
    FROM watchdogs
    UNION ALL
    SELECT host_of(server_id), program, server_id, address, '', '{}', 0, '{}',
           version, schema_version, start_time, last_seen, is_ended, '', ''
    FROM servers
)
"""
# A host is lost if none of its programs is alive and the one that was seen last did not say that it was stopped, and
# no operator had it drained.
JUDGED = f"""
{SEEN}, fresh AS (
    SELECT *, last_seen > clock_timestamp() - make_interval(secs => %(timeout_s)s) AS is_fresh,
           extract(epoch FROM clock_timestamp() - last_seen)::float8 AS age_s
    FROM seen
), judged AS MATERIALIZED (
    SELECT host, min(age_s) AS age_s, max(hosts.drain_time) IS NOT NULL AS is_draining,
           CASE WHEN bool_or(is_fresh AND NOT is_ended) THEN 'alive'
                WHEN (array_agg(is_ended ORDER BY last_seen DESC))[1] THEN 'stopped'
                WHEN max(hosts.drain_time) IS NOT NULL THEN 'stopped'
                ELSE 'lost' END AS state
    FROM fresh LEFT JOIN hosts ON hosts.name = host GROUP BY host
), served AS MATERIALIZED (
    SELECT DISTINCT unnest(models) AS model FROM fresh WHERE is_fresh AND phase NOT IN ('starting', 'loading')
), lost AS MATERIALIZED (
    SELECT 'host' AS kind, host AS subject, age_s FROM judged WHERE state = 'lost'
    UNION ALL
    SELECT 'watchdog', host, fresh.age_s FROM fresh JOIN judged USING (host)
    WHERE program = 'watchdog' AND NOT is_fresh AND NOT is_ended AND state = 'alive'
    UNION ALL
    SELECT 'model', model, min(fresh.age_s) FROM fresh JOIN judged USING (host) CROSS JOIN unnest(models) AS model
    WHERE state = 'lost' AND NOT is_ended AND model NOT IN (SELECT model FROM served)
    GROUP BY model
)
"""
COUNTS = f"""
WITH {JUDGED}
SELECT state, count(*), count(*) FILTER (WHERE is_draining AND state = 'alive') FROM judged GROUP BY state
"""
LOST = f"WITH {JUDGED} SELECT kind, subject, age_s FROM lost ORDER BY age_s LIMIT %(most)s"
BEGIN = f"""
WITH {JUDGED}, news AS (
    INSERT INTO reported_losses (kind, subject)
    SELECT kind, subject FROM lost WHERE age_s < %(news_s)s ORDER BY age_s LIMIT %(most)s
    ON CONFLICT DO NOTHING RETURNING kind, subject
)
SELECT kind, subject, age_s FROM news JOIN lost USING (kind, subject) ORDER BY kind, subject
"""
# What was stopped in order meanwhile, or is drained, is not back and needs no word.
END = f"""
WITH {JUDGED}
DELETE FROM reported_losses r WHERE NOT EXISTS (SELECT FROM lost WHERE (kind, subject) = (r.kind, r.subject))
RETURNING kind, subject, extract(epoch FROM clock_timestamp() - since)::float8,
          CASE kind WHEN 'model' THEN EXISTS (SELECT FROM served WHERE model = subject)
          ELSE EXISTS (SELECT FROM judged WHERE host = subject AND state = 'alive') END
"""
PAGE = f"""
WITH {SEEN}, names AS (
    SELECT DISTINCT host FROM seen WHERE host > %(after)s AND (%(name)s = '' OR host = %(name)s)
    ORDER BY host LIMIT %(limit)s
), held AS (
    SELECT host_of(worker_id) AS host, count(*) AS chunks FROM (
        SELECT worker_id FROM chunks WHERE state = 'leased'
        UNION ALL SELECT worker_id FROM file_batches WHERE NOT is_measured AND lease_until > clock_timestamp()
    ) AS leases GROUP BY 1
)
SELECT names.host, hosts.drain_reason, extract(epoch FROM clock_timestamp() - hosts.drain_time)::float8,
       coalesce(max(held.chunks), 0),
       jsonb_agg(to_jsonb(seen) || jsonb_build_object(
           'age_s', extract(epoch FROM clock_timestamp() - last_seen),
           'life_s', extract(epoch FROM clock_timestamp() - start_time)) ORDER BY id)
FROM names JOIN seen USING (host) LEFT JOIN hosts ON hosts.name = names.host LEFT JOIN held ON held.host = names.host
GROUP BY names.host, hosts.drain_reason, hosts.drain_time ORDER BY names.host
"""
ORDER = """
INSERT INTO hosts (name, drain_time, drain_reason) VALUES (%s, clock_timestamp(), %s)
ON CONFLICT (name) DO UPDATE SET drain_time = coalesce(hosts.drain_time, EXCLUDED.drain_time),
                                 drain_reason = coalesce(nullif(EXCLUDED.drain_reason, ''), hosts.drain_reason)
"""
# The audit log of hosts that are forgotten.
PRUNE = f"""
WITH {SEEN}, known AS (SELECT DISTINCT host FROM seen)
DELETE FROM recovery_events WHERE id IN (
    SELECT id FROM recovery_events WHERE start_time < clock_timestamp() - make_interval(secs => %(kept_s)s)
    AND NOT EXISTS (SELECT FROM known WHERE host = host_of(worker_id) OR host = worker_id) LIMIT %(limit)s
)
"""


class State(StrEnum):
    """Whether a host is there."""

    ALIVE = "alive"
    # Its programs said that they were stopped, or it was drained before it went.
    STOPPED = "stopped"
    LOST = "lost"


class Drain(StrEnum):
    """How far a worker is with an order to drain, as in the `drain` of its heartbeat's detail."""

    DRAINING = "draining"
    DRAINED = "drained"


@dataclass(frozen=True)
class Program:
    """A program of a host, as it reported last. `schema_version` 0: it did not say, and is older than that."""

    program: str
    id: str
    address: str
    phase: str
    models: tuple[str, ...]
    queued: int
    detail: Mapping[str, Any]
    version: str
    schema_version: int
    age_s: float
    life_s: float
    is_ended: bool
    # Where it runs, as service/machine.py has it; "": it did not say.
    machine: str = ""
    network: str = ""


@dataclass(frozen=True)
class Host:
    """A host and its programs. `drain_age_s`: how long ago it was ordered to drain; None: it is not."""

    name: str
    programs: Sequence[Program] = ()
    drain_reason: str = ""
    drain_age_s: float | None = None
    # Chunks, and files of batches, that its workers have leased.
    held: int = 0

    def alive(self, timeout_s: float) -> list[Program]:
        """The programs that were seen within `timeout_s` and did not end."""
        return [each for each in self.programs if each.age_s <= timeout_s and not each.is_ended]

    def state(self, timeout_s: float) -> State:
        """Whether it is there; as JUDGED has it."""
        if self.alive(timeout_s):
            return State.ALIVE
        last = min(self.programs, key=lambda each: each.age_s)
        return State.STOPPED if last.is_ended or self.drain_age_s is not None else State.LOST

    def is_drained(self, timeout_s: float) -> bool:
        """True once it was ordered to drain and nothing is held: its workers say so, and Postgres has no lease."""
        if self.drain_age_s is None or self.held:
            return False
        workers = [each for each in self.alive(timeout_s) if each.program == "worker"]
        return all(each.detail.get("drain") == Drain.DRAINED for each in workers)


@dataclass(frozen=True)
class Loss:
    """Something that is gone: of kind `host`, `watchdog` (its host is there) or `model` (no host left serves it)."""

    kind: str
    subject: str
    age_s: float


@dataclass(frozen=True)
class Survey:
    """How many hosts there are by state, how many of those alive are draining, and the last losses."""

    counts: Mapping[str, int] = field(default_factory=dict)
    draining: int = 0
    lost: Sequence[Loss] = ()


def survey(db: peewee.PostgresqlDatabase, timeout_s: float) -> Survey:
    """Counts the hosts. One that was not seen for `timeout_s` is gone."""
    given = {"timeout_s": timeout_s, "most": MOST_LOST}
    rows = db.execute_sql(COUNTS, given).fetchall()
    lost = [Loss(*row) for row in db.execute_sql(LOST, given).fetchall()]
    return Survey({state: count for state, count, _ in rows}, sum(draining for *_, draining in rows), lost)


def begin_losses(db: peewee.PostgresqlDatabase, timeout_s: float) -> list[Loss]:
    """Records what is gone, in `reported_losses`. Returns what nobody had recorded yet.

    The table `losses` is another: what gateways see of workers whose heartbeats are missing (losses.py).
    """
    given = {"timeout_s": timeout_s, "most": MOST_LOST, "news_s": NEWS_S}
    return [Loss(*row) for row in db.execute_sql(BEGIN, given).fetchall()]


def end_losses(db: peewee.PostgresqlDatabase, timeout_s: float) -> list[Loss]:
    """Removes what is not gone any more. Returns what is back, with the time for which it was known to be gone."""
    rows = db.execute_sql(END, {"timeout_s": timeout_s}).fetchall()
    return [Loss(kind, subject, for_s) for kind, subject, for_s, is_back in rows if is_back]


def read(db: peewee.PostgresqlDatabase, limit: int, after: str = "", name: str = "") -> list[Host]:
    """Up to `limit` hosts by name, those after the name `after`, or the one called `name`."""
    rows = db.execute_sql(PAGE, {"limit": limit, "after": after, "name": name}).fetchall()
    return [
        Host(host, tuple(_program(one) for one in programs), reason or "", drain_age_s, held)
        for host, reason, drain_age_s, held, programs in rows
    ]


def drained(db: peewee.PostgresqlDatabase) -> frozenset[str]:
    """The hosts that are ordered to drain."""
    return frozenset(name for (name,) in db.execute_sql("SELECT name FROM hosts WHERE drain_time IS NOT NULL"))


def drain(db: peewee.PostgresqlDatabase, name: str, reason: str) -> None:
    """Orders a host to drain, and adds that to the audit log."""
    with db.atomic():
        db.execute_sql(ORDER, (name, reason))
        db.execute_sql("SELECT note_of_host(%s, 'host_drained', %s)", (name, reason))


def resume(db: peewee.PostgresqlDatabase, name: str, reason: str) -> bool:
    """Ends the order to drain, and adds that to the audit log. False: there was none."""
    with db.atomic():
        ended = db.execute_sql("DELETE FROM hosts WHERE name = %s RETURNING name", (name,)).fetchall()
        if ended:
            db.execute_sql("SELECT note_of_host(%s, 'host_resumed', %s)", (name, reason))
    return bool(ended)


def forget(db: peewee.PostgresqlDatabase, name: str, quiet_s: float, reason: str) -> bool:
    """Removes what is stored about a host, and adds that to the audit log. False: it was seen within `quiet_s`."""
    with db.atomic():
        [is_gone] = db.execute_sql("SELECT forget_host(%s, %s)", (name, quiet_s)).fetchone()
        if is_gone:
            db.execute_sql("SELECT note_of_host(%s, 'host_forgotten', %s)", (name, reason))
    return bool(is_gone)


def forget_old(db: peewee.PostgresqlDatabase, quiet_s: float, limit: int) -> list[str]:
    """Forgets up to `limit` hosts of which nothing was seen for `quiet_s`. Returns their names."""
    query = f"""
        WITH {SEEN} SELECT host FROM seen GROUP BY host
        HAVING max(last_seen) < clock_timestamp() - make_interval(secs => %s) LIMIT %s
    """
    names = [name for (name,) in db.execute_sql(query, (quiet_s, limit)).fetchall()]
    return [name for name in names if forget(db, name, quiet_s, f"not seen for {quiet_s:.0f} s")]


def prune_events(db: peewee.PostgresqlDatabase, kept_s: float, limit: int) -> int:
    """Removes up to `limit` events older than `kept_s` of hosts that are forgotten. Returns how many."""
    return int(db.execute_sql(PRUNE, {"kept_s": kept_s, "limit": limit}).rowcount)


def _program(row: Mapping[str, Any]) -> Program:
    names = "program id address phase queued detail version schema_version is_ended machine network"
    given = {name: row[name] for name in names.split()}
    return Program(**given, models=tuple(row["models"]), age_s=float(row["age_s"]), life_s=float(row["life_s"]))
