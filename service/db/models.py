"""The small tables as peewee models. The files about the large tables have SQL of their own.

Migrations own the schema, so fields here ask for no indexes.
"""

import peewee
from playhouse.postgres_ext import ArrayField, BinaryJSONField, DateTimeTZField


class Heartbeat(peewee.Model):
    """A worker's last report about itself. One row per worker."""

    worker_id = peewee.TextField(primary_key=True)
    incarnation = peewee.UUIDField()
    address = peewee.TextField()
    phase = peewee.TextField()
    pid = peewee.IntegerField()
    models = ArrayField(peewee.TextField, index=False)
    queued = peewee.IntegerField()
    detail = BinaryJSONField(index=False)
    settings = peewee.TextField()
    served_settings = peewee.TextField()
    version = peewee.TextField()
    schema_version = peewee.IntegerField()
    start_time = DateTimeTZField()
    last_seen = DateTimeTZField()
    machine = peewee.TextField()
    pid_space = peewee.TextField()
    network = peewee.TextField()
    start_ticks = peewee.BigIntegerField()
    lease_until = DateTimeTZField(null=True)

    class Meta:
        table_name = "heartbeats"


class RecoveryEvent(peewee.Model):
    """One entry of the audit log. The outcome `open` marks an intent: a restart that is not finished."""

    id = peewee.BigAutoField()
    key = peewee.UUIDField()
    worker_id = peewee.TextField()
    kind = peewee.TextField()
    verdict = peewee.TextField()
    reason = peewee.TextField()
    evidence = BinaryJSONField(index=False)
    step = peewee.TextField()
    outcome = peewee.TextField()
    timings = BinaryJSONField(index=False)
    start_time = DateTimeTZField()
    end_time = DateTimeTZField(null=True)
    old_incarnation = peewee.UUIDField(null=True)
    new_incarnation = peewee.UUIDField(null=True)
    machine = peewee.TextField()

    class Meta:
        table_name = "recovery_events"


class Watchdog(peewee.Model):
    """When the watchdog of a host was last seen, and what it knows about its host."""

    watchdog_id = peewee.TextField(primary_key=True)
    pid = peewee.IntegerField()
    version = peewee.TextField()
    schema_version = peewee.IntegerField()
    detail = BinaryJSONField(index=False)
    is_ended = peewee.BooleanField()
    start_time = DateTimeTZField()
    last_seen = DateTimeTZField()
    machine = peewee.TextField()

    class Meta:
        table_name = "watchdogs"


class Server(peewee.Model):
    """A gateway or an OpenAI door, and when it was last seen."""

    server_id = peewee.TextField(primary_key=True)
    program = peewee.TextField()
    address = peewee.TextField()
    pid = peewee.IntegerField()
    version = peewee.TextField()
    schema_version = peewee.IntegerField()
    is_ended = peewee.BooleanField()
    start_time = DateTimeTZField()
    last_seen = DateTimeTZField()

    class Meta:
        table_name = "servers"
