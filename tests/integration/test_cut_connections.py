"""Calls whose connection to Postgres is cut while Postgres is up: they are made again, and nobody is refused."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from uuid import uuid4

import peewee
import psycopg2
import psycopg2.extensions
import pytest
from openai import OpenAI
from structlog.testing import capture_logs

from service.db import files
from service.db.availability import DatabaseAwayError
from service.db.connection import Database
from service.db.limits import Limits
from tests.conftest import IS_THOROUGH
from tests.support.batches import finished, line, lines
from tests.support.servers import Stack
from vllm_batch import Client

CHAT = "/v1/chat/completions"
ROUNDS = 8 if IS_THOROUGH else 3
# Most calls take no longer.
LATEST_S = 0.03


class Cut:
    """A call that breaks its own connection as often as it is told, after so many seconds."""

    def __init__(self, times: int, after_s: float = 0) -> None:
        self.left, self.after_s = times, after_s
        self.calls = 0

    def run(self, db: peewee.PostgresqlDatabase) -> str:
        self.calls += 1
        for _ in range(2):
            db.execute_sql("SELECT pg_sleep(%s)", (self.after_s / 2,))
        if self.left:
            self.left -= 1
            db.execute_sql("SELECT pg_terminate_backend(pg_backend_pid())")
        return "done"


def test_a_call_is_made_again_once(database_url: str) -> None:
    """A read whose connection breaks is made again over another one, but only once, and not when it took too long; it
    is logged where it helped."""

    async def run(database: Database) -> None:
        once, always, late = Cut(1), Cut(9), Cut(1, after_s=3)
        assert await database.read(once.run) == "done"
        for cut in (always, late):
            with pytest.raises(DatabaseAwayError):
                await database.read(cut.run)
        assert (once.calls, always.calls, late.calls) == (2, 2, 1)

    with closing(Database(database_url, "test", timeout_s=2)) as database, capture_logs() as events:
        asyncio.run(run(database))
    assert [event["event"] for event in events].count("call_made_again") == 1


def test_a_file_whose_end_is_told_twice(database: Database) -> None:
    """Whether or not the first end of a file was stored when its connection broke, the second has the file."""
    allowed = Limits(1, 1)
    for is_stored in (False, True):
        begun = database.call(files.begin, "t", allowed)
        given = (*begun, "a", 7, None, allowed)
        first = database.call(files.finish, *given) if is_stored else None
        second = database.call(files.finish, *given, True)
        assert second is not None
        assert first in (None, second)
    assert database.call(files.finish, begun[0] + 1, *given[1:], True) is None


def cut(connection: psycopg2.extensions.connection, after_s: float) -> None:
    """Cuts all connections that door, gateway and worker have then, but for its heart. Returns once they are closed."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_sleep(%s)", (after_s,))
        cursor.execute(
            "SELECT array_agg(pid) FROM (SELECT pid, pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name ~ '^vllm-batch-(http|gateway|worker)') cut"
        )
        cursor.execute("SELECT pg_terminate_backend(pid, 30000) FROM unnest(%s::int[]) pid", cursor.fetchone())


def test_no_call_is_refused(serving: Stack) -> None:
    """While all connections are cut again and again, neither the doors nor the worker refuse a call."""
    serving.http()
    with (
        OpenAI(base_url=serving.base_url, api_key="none", max_retries=0) as openai,
        Client(serving.target, patience_s=0) as client,
    ):
        content = b"".join(lines(20)) + line("wrong", vllm_xargs={"simulate": "refuse"})
        file = openai.files.create(file=("in.jsonl", content), purpose="batch")
        made = openai.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h").id
        slow = openai.files.create(file=("in.jsonl", line("slow", vllm_xargs={"simulate": 60})), purpose="batch")
        batch = finished(client, made)
        assert batch.counts.completed == 20
        output = str(openai.batches.retrieve(made).output_file_id)

        def deleted() -> None:
            other = openai.files.create(file=("in.jsonl", b"{}"), purpose="batch")
            assert openai.files.delete(other.id).deleted

        def in_parts() -> None:
            upload = openai.uploads.create(bytes=2, filename="a", mime_type="text/plain", purpose="batch")
            part = openai.uploads.parts.create(upload.id, data=b"{}").id
            assert openai.uploads.complete(upload.id, part_ids=[part]).status == "completed"
            given_up = openai.uploads.create(bytes=2, filename="a", mime_type="text/plain", purpose="batch")
            assert openai.uploads.cancel(given_up.id).status == "cancelled"

        def retried() -> None:
            other = client.retry(made).id
            client.wait(other)
            client.delete(other)

        def cancelled() -> None:
            for cancel in (client.cancel, openai.batches.cancel):
                name = str(uuid4())
                cancel(
                    openai.batches.create(
                        input_file_id=slow.id, endpoint=CHAT, completion_window="24h", metadata={"name": name}
                    ).id
                )

        calls: list[Callable[[], object]] = [
            lambda: list(islice(openai.files.list(limit=2), 4)),
            lambda: openai.files.retrieve(output),
            lambda: openai.files.content(output).read(),
            lambda: openai.batches.list().data,
            lambda: openai.batches.retrieve(made),
            lambda: openai.models.list().data,
            deleted,
            in_parts,
            lambda: client.submit_lines(lines(3)),
            lambda: client.get(made),
            lambda: list(client.list()),
            lambda: list(client.results(made)),
            lambda: list(client.result_lines(made)),
            lambda: client.result(made, "c1"),
            lambda: client.errors(made),
            client.tenants,
            lambda: list(client.hosts()),
            lambda: list(client.deliveries()),
            retried,
            cancelled,
        ]
        with closing(psycopg2.connect(serving.database_url)) as connection, ThreadPoolExecutor(1) as threads:
            connection.autocommit = True
            for number in range(ROUNDS):
                for call in calls:
                    # At another moment of the call each time, and once at most in each.
                    cutting = threads.submit(cut, connection, LATEST_S * number / ROUNDS)
                    call()
                    cutting.result()
