"""The small tables as peewee models. The large ones are read and written by statements in their own files."""

import peewee
from psycopg2.extras import Json


class ArrayField(peewee.Field):
    """A Postgres array of text."""

    field_type = "TEXT[]"


class JsonField(peewee.Field):
    """A Postgres jsonb value; psycopg2 reads it as Python objects."""

    field_type = "JSONB"

    def db_value(self, value: object) -> object:
        return Json(value)


class TimestampField(peewee.Field):
    """A Postgres timestamp with its zone."""

    field_type = "TIMESTAMPTZ"


class Heartbeat(peewee.Model):
    """What a worker last said of itself. One row per worker."""

    worker_id = peewee.TextField(primary_key=True)
    incarnation = peewee.UUIDField()
    address = peewee.TextField()
    phase = peewee.TextField()
    pid = peewee.IntegerField()
    models = ArrayField()
    queued = peewee.IntegerField()
    detail = JsonField()
    start_time = TimestampField()
    last_seen = TimestampField()

    class Meta:
        table_name = "heartbeats"


class RecoveryEvent(peewee.Model):
    """One entry of the audit log. A restart that is not finished has the outcome `open`: an intent."""

    id = peewee.BigAutoField()
    key = peewee.UUIDField()
    worker_id = peewee.TextField()
    kind = peewee.TextField()
    verdict = peewee.TextField()
    reason = peewee.TextField()
    evidence = JsonField()
    step = peewee.TextField()
    outcome = peewee.TextField()
    timings = JsonField()
    start_time = TimestampField()
    end_time = TimestampField(null=True)
    old_incarnation = peewee.UUIDField(null=True)
    new_incarnation = peewee.UUIDField(null=True)

    class Meta:
        table_name = "recovery_events"


class Watchdog(peewee.Model):
    """When the watchdog of a host was seen last."""

    watchdog_id = peewee.TextField(primary_key=True)
    pid = peewee.IntegerField()
    start_time = TimestampField()
    last_seen = TimestampField()

    class Meta:
        table_name = "watchdogs"
