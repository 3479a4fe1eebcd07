"""Rows by which programs report that they live: watchdogs, gateways, OpenAI's doors. By the database's clock alone."""

from collections.abc import Mapping
from typing import Any

import peewee

from service.db import schema
from service.db.models import Server, Watchdog

NOW = peewee.SQL("clock_timestamp()")


def beat(
    db: peewee.PostgresqlDatabase,
    model: type[Watchdog] | type[Server],
    name: str,
    pid: int,
    more: Mapping[Any, Any],
    where: Any = None,
) -> bool:
    """Records that the program of this name was seen now, with `more`. Another pid starts a new life.

    Does nothing, and returns False, if there is a row for which `where` does not hold.
    """
    row = {
        model.pid: pid,
        model.version: schema.VERSION,
        model.schema_version: schema.known(),
        model.is_ended: False,
        model.last_seen: NOW,
        **more,
    }
    key, table = model._meta.primary_key, model._meta.table_name
    born = peewee.SQL(f"CASE WHEN {table}.pid = EXCLUDED.pid THEN {table}.start_time ELSE EXCLUDED.start_time END")
    query = model.insert(row | {key: name, model.start_time: NOW}).on_conflict(
        conflict_target=[key], preserve=list(row), update={model.start_time: born}, where=where
    )
    return bool(query.as_rowcount().execute(db))


def end(db: peewee.PostgresqlDatabase, model: type[Watchdog] | type[Server], name: str, pid: int, *where: Any) -> None:
    """Records that this life of the program, for which `where` holds, was stopped: nobody has to look for it."""
    row = {model.is_ended: True, model.last_seen: NOW}
    model.update(row).where(model._meta.primary_key == name, model.pid == pid, *where).execute(db)
