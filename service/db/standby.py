"""Acknowledgements that survive the loss of the server: a standby confirms them first (BATCH_SYNCHRONOUS_COMMIT)."""

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import peewee

from service.db.availability import DATABASE_ERRORS, DatabaseAwayError, DatabaseUnfitError

P = ParamSpec("P")
T = TypeVar("T")

# The level of sessions whose commits wait for no standby, whatever the server's default is.
LOCAL = "local"
# How long commits may wait before we say that the standby does not answer.
WAIT_S = 3.0


def level(db: peewee.PostgresqlDatabase) -> str:
    """What acknowledgements wait for; "" if that is left to the server."""
    demanded: str = getattr(db, "synchronous_commit", "")
    return "" if demanded == LOCAL else demanded


def acknowledged(
    function: Callable[Concatenate[peewee.PostgresqlDatabase, P], T],
) -> Callable[Concatenate[peewee.PostgresqlDatabase, P], T]:
    """Decorates a function whose outcome a client is told: it ends after a standby has confirmed what it saw or did.

    Then it may also raise DatabaseAwayError, after it has stored what it stores.
    """

    @functools.wraps(function)
    def confirmed(db: peewee.PostgresqlDatabase, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            result = function(db, *args, **kwargs)
        except DATABASE_ERRORS:
            raise
        except Exception:
            # Such as: an earlier call has stored it. Whoever made that may have been told nothing.
            _confirm(db)
            raise
        _confirm(db)
        return result

    return confirmed


def _confirm(db: peewee.PostgresqlDatabase) -> None:
    """Waits for a commit of our own: it follows, also on the standby, every commit that can be seen by now."""
    if not level(db):
        return
    connection: Any = db.connection()
    connection.notices.clear()
    with db.atomic():
        db.execute_sql("SELECT pg_catalog.set_config('synchronous_commit', %s, true)", (level(db),))
        db.execute_sql("SELECT pg_catalog.pg_logical_emit_message(true, 'vllm-batch', '')")
    if connection.notices:
        # Somebody ended the wait; we recognize that by there being a warning, whose words have the server's language.
        raise DatabaseAwayError(f"Postgres committed without its standby: {connection.notices[-1].strip()}")
    # Removing all names ends all waits as if a standby had confirmed.
    check(db)


def check(db: peewee.PostgresqlDatabase) -> None:
    """Raises DatabaseUnfitError if the server has no standby to wait for, DatabaseAwayError if that does not answer.

    Does nothing where acknowledgements need none.
    """
    if not level(db):
        return
    is_named, is_waiting = db.execute_sql(
        """
        SELECT pg_catalog.current_setting('synchronous_standby_names') <> '',
               EXISTS (SELECT FROM pg_catalog.pg_stat_activity
                       WHERE wait_event = 'SyncRep' AND state_change < clock_timestamp() - make_interval(secs => %s))
        """,
        (WAIT_S,),
    ).fetchone()
    if not is_named:
        raise DatabaseUnfitError(
            "BATCH_SYNCHRONOUS_COMMIT is set, but Postgres waits for no standby: name one in synchronous_standby_names"
            " there, or unset BATCH_SYNCHRONOUS_COMMIT"
        )
    if is_waiting:
        raise DatabaseAwayError("the standby of Postgres that has to confirm what is stored does not answer")
