"""The schema and who can work with it: two versions share one database for as long as an upgrade takes.

A migration either expands the schema, so that programs that do not know it go on working, or contracts it: it removes
what programs used once. A contraction has `NEEDS`, the last migration that a program must know to work without what
it removes. It waits while an older program is alive, and programs that are too old are refused afterwards.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import peewee
from playhouse.migrations import Migration, Runner

from service.db.availability import DatabaseAwayError, DatabaseUnfitError, first_line
from service.telemetry import logs
from vllm_batch import __version__

VERSION = __version__
MIGRATIONS = Path(__file__).parent / "migrations"
# A program that was not seen for this long counts as gone.
GONE_S = 600.0

# Everything that reports its version. Gateways before 0015 are not listed: they do not report at all.
OLDER = """
SELECT id, version, schema_version FROM (
    SELECT worker_id AS id, version, schema_version, last_seen, phase = 'stopping' AS is_ended FROM heartbeats
    UNION ALL SELECT watchdog_id, version, schema_version, last_seen, is_ended FROM watchdogs
    UNION ALL SELECT server_id, version, schema_version, last_seen, is_ended FROM servers
) AS programs
WHERE NOT is_ended AND schema_version < %s AND last_seen > clock_timestamp() - make_interval(secs => %s)
ORDER BY id LIMIT 5
"""

log = logs.get("schema")


# Classes of SQLSTATE with which a migration fails each time: what is there already, what is missing or what the server
# cannot, a right that is lacking, and what a trigger forbids.
LASTING = ("0A", "2F", "38", "39", "42", "P0")
LACKS_A_RIGHT = "42501"


class TooOldError(DatabaseUnfitError):
    """This program is too old for the schema. The text says what to do."""


@cache
def known(directory: Path = MIGRATIONS) -> int:
    """The last migration that this program knows: the version of its schema."""
    return max(int(migration.idx) for migration in Migration.load_directory(str(directory)))


def migrate(db: peewee.PostgresqlDatabase, directory: Path = MIGRATIONS) -> list[str]:
    """Applies what is pending, in the caller's transaction, but for contractions that older programs do not allow yet.

    Returns the migrations applied. Raises TooOldError for a program that is too old itself, and DatabaseUnfitError
    where no attempt can succeed, as in a database in which others have made tables of our names.
    """
    check_version(db, directory)
    runner = _Runner(db, directory=str(directory))
    applied: list[str] = []
    # Rights to read may have been taken away for a while.
    with _unfit("the table of migrations cannot be read", LACKS_A_RIGHT):
        pending = list(_pending(runner))
    for migration, needs in pending:
        if needs is not None and (older := _older(db, needs)):
            log.warning("contraction_waits", migration=migration.name, needs=needs, older=older)
            runner.waiting.add(migration.name)
            continue
        with _unfit(f"migration {migration.name} cannot be applied"):
            applied += runner.up(migration.name)
        if needs is not None:
            db.execute_sql("UPDATE schema_floor SET oldest = greatest(oldest, %s)", (needs,))
    return applied


def check(db: peewee.PostgresqlDatabase, directory: Path = MIGRATIONS) -> None:
    """Raises DatabaseAwayError until another process has applied what this program needs.

    Raises TooOldError for a program that is too old.
    """
    check_version(db, directory)
    missing = [migration.name for migration, needs in _pending(Runner(db, directory=str(directory))) if needs is None]
    if missing:
        schema, name = db.execute_sql("SELECT current_schema(), current_database()").fetchone()
        raise DatabaseAwayError(
            f"migration {missing[0]} is pending in schema {schema} of {name}; a worker or the watchdog applies it"
        )


def check_version(db: peewee.PostgresqlDatabase, directory: Path = MIGRATIONS) -> None:
    """Raises TooOldError for a program that is too old for what the schema was contracted to.

    Raises DatabaseAwayError in the middle of a restore, which makes the tables first.
    """
    if db.execute_sql("SELECT to_regclass('schema_floor') IS NULL").fetchone()[0]:
        return
    row = db.execute_sql("SELECT oldest FROM schema_floor").fetchone()
    if row is None:
        raise DatabaseAwayError("the table schema_floor is empty: the database is being restored")
    [oldest] = row
    if oldest > known(directory):
        raise TooOldError(
            f"version {VERSION} is too old for this database, whose schema needs version {oldest} of it and this"
            f" program knows {known(directory)}: upgrade this host (docs/fleet.md, Upgrades)"
        )


class _Runner(Runner):  # type: ignore[misc]
    """Leaves out contractions that wait. Nothing depends on them, so expansions that follow are applied at once."""

    def __init__(self, db: peewee.PostgresqlDatabase, directory: str) -> None:
        super().__init__(db, directory=directory)
        self.waiting: set[str] = set()

    def status(self) -> list[Migration]:
        return [migration for migration in super().status() if migration.name not in self.waiting]


@contextmanager
def _unfit(what: str, *spared: str) -> Iterator[None]:
    """Raises DatabaseUnfitError for what Postgres will refuse each time, but for the SQLSTATEs in `spared`."""
    try:
        yield
    except peewee.PeeweeException as error:
        sqlstate = getattr(getattr(error, "orig", None), "pgcode", None) or ""
        if not sqlstate.startswith(LASTING) or sqlstate in spared:
            raise
        fix = "correct that, or give the stack a database or a schema that is its own"
        raise DatabaseUnfitError(f"{what} ({first_line(error)}): {fix}") from error


def _pending(runner: Runner) -> Iterator[tuple[Migration, int | None]]:
    """Pending migrations in order, each with its `NEEDS`; None for an expansion."""
    for migration in runner.status():
        if migration.path is not None and not migration.applied:
            yield migration, getattr(migration.load(), "NEEDS", None)


def _older(db: peewee.PostgresqlDatabase, needs: int) -> list[str]:
    """Programs that are alive and do not know the migration `needs`, in words."""
    rows = db.execute_sql(OLDER, (needs, GONE_S)).fetchall()
    return [f"{name} (version {version or 'unknown'}, schema {schema})" for name, version, schema in rows]
