"""Limits on what may be open and queued at once: of all, and of one tenant."""

from collections.abc import Callable
from dataclasses import dataclass

import peewee

from service.db.connection import lock_tenant
from service.tenants import Quotas

# A batch's tokens count as queued in proportion to its requests without a result.
QUEUED_TOKENS = "estimated_tokens::numeric * (total - completed - failed) / nullif(total, 0)"


@dataclass(frozen=True)
class Limits:
    """How many batches may be open and requests queued at once, and the quotas of tenants beside that."""

    open_batches: int
    queued_requests: int
    quotas: Callable[[], Quotas] = Quotas


@dataclass(frozen=True)
class New:
    """What a new batch adds to the queue. `batch_id` is its own, which does not count as there already."""

    batch_id: int
    tenant: str
    requests: int
    tokens: int


class FullError(Exception):
    """A limit would be exceeded: `limit` of `what`, which would be `value`. `tenant` is empty for the limit of all."""

    def __init__(self, name: str, limit: int, value: int, more: int, tenant: str = "") -> None:
        self.name, self.limit, self.value, self.tenant = name, limit, value, tenant
        self.left = max(0, limit - value + more)
        # Waiting helps, unless what is asked for is more than may ever be there.
        self.may_pass = more <= limit
        whose = f"tenant {tenant}: " if tenant else ""
        super().__init__(f"{whose}{name.replace('_', ' ')}: {value}, at most {limit} are allowed, {self.left} left")


def check(db: peewee.PostgresqlDatabase, limits: Limits, new: New) -> None:
    """Raises FullError if the limits of all are reached, or now those of the tenant.

    Others may add to the queue right afterwards: for before a batch is stored, so that no work is done in vain.
    """
    _check_all(db, limits, new)
    _check_tenant(db, limits, new)


def check_finally(db: peewee.PostgresqlDatabase, limits: Limits, new: New) -> None:
    """The same for the transaction that stores the batch. Exact for the tenant: others of it wait until this one ends.

    Those of other tenants do not wait and do not see each other, so the limits of all can be exceeded slightly.
    """
    _check_all(db, limits, new)
    if limits.quotas().of(new.tenant).limits_queue:
        lock_tenant(db, new.tenant)
        _check_tenant(db, limits, new)


def check_files(db: peewee.PostgresqlDatabase, limits: Limits, tenant: str, more: int) -> None:
    """Raises FullError if the tenant may not keep files of so many bytes beside those that it has.

    Exact in the transaction that stores a file: others of the tenant wait until this one ends.
    """
    limit = limits.quotas().of(tenant).file_bytes
    if limit is None:
        return
    lock_tenant(db, tenant)
    row = db.execute_sql(
        "SELECT coalesce(sum(bytes), 0)::bigint FROM files WHERE tenant = %s AND state IN ('pending', 'kept')",
        (tenant,),
    ).fetchone()
    _compare("file_bytes", limit, row[0], more, tenant)


def _check_all(db: peewee.PostgresqlDatabase, limits: Limits, new: New) -> None:
    batches, requests = db.execute_sql(
        "SELECT count(*), coalesce(sum(total - completed - failed), 0)::bigint FROM batches"
        " WHERE state IN ('validating', 'in_progress') AND id <> %s",
        (new.batch_id,),
    ).fetchone()
    _compare("open_batches", limits.open_batches, batches, 1)
    _compare("queued_requests", limits.queued_requests, requests, new.requests)


def _check_tenant(db: peewee.PostgresqlDatabase, limits: Limits, new: New) -> None:
    quota = limits.quotas().of(new.tenant)
    if not quota.limits_queue:
        return
    batches, requests, tokens = db.execute_sql(
        f"""
        SELECT count(*), coalesce(sum(total - completed - failed), 0)::bigint,
               coalesce(sum({QUEUED_TOKENS}), 0)::bigint
        FROM batches WHERE tenant = %s AND NOT is_counted AND state IN ('validating', 'in_progress') AND id <> %s
        """,
        (new.tenant, new.batch_id),
    ).fetchone()
    _compare("open_batches", quota.open_batches, batches, 1, new.tenant)
    _compare("queued_requests", quota.queued_requests, requests, new.requests, new.tenant)
    _compare("queued_tokens", quota.queued_tokens, tokens, new.tokens, new.tenant)


def _compare(name: str, limit: int | None, there: int, more: int, tenant: str = "") -> None:
    if limit is not None and there + more > limit:
        raise FullError(name, limit, there + more, more, tenant)
