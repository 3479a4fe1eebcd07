"""Uploads of any size and pace, in small or large pieces, are stored whole or not at all."""

import asyncio
import gzip
import random
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import grpc
import peewee
import psycopg2
import psycopg2.errors
import pytest

from service.db import batches, chunks, creation, endings, served
from service.db.availability import DatabaseAwayError
from service.db.connection import Database
from service.db.creation import Options
from service.db.limits import Limits
from service.errors import MAX_VIOLATIONS, ApiError
from service.gateway import upload
from service.insight.links import LostError
from service.worker import intake
from service.worker.intake import Intake, file_place
from tests.support.batches import finished, lines
from tests.support.lives import check_invariants, dies_and_comes_back
from tests.support.servers import Stack
from tests.support.store import OFFER, SIZES, count, holder, line
from tests.support.waiting import until
from vllm_batch import Client
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import batch_service_pb2_grpc


@pytest.fixture
def small_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every few lines a stage of their own."""
    monkeypatch.setattr(intake, "STAGE_BYTES", 1000)


def store(database: Database, pieces: Sequence[bytes], broken: bool = False, options: Options | None = None) -> int:
    """Stores these pieces of a file, after which the client may vanish. Returns the batch's number."""

    async def given() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece
        if broken:
            raise ConnectionResetError

    taking = Intake(database, SIZES, Limits(100, 10_000))
    return asyncio.run(taking.store(options or Options(), b"", given(), OFFER, file_place)).id


def purge(database: Database) -> None:
    while database.call(endings.purge, 1000):
        pass


@pytest.mark.usefixtures("small_stages")
@pytest.mark.parametrize("cut", [7, 100, 100_000])
def test_a_file_in_stages_is_one_batch(database: Database, cut: int) -> None:
    """However a file is split, its batch holds every line once, in order, and nothing else remains of the upload."""
    file = b"".join(map(line, range(300)))
    batch_id = store(database, [file[start : start + cut] for start in range(0, len(file), cut)])
    purge(database)
    [batch] = database.call(batches.list_page, [], None, 10)
    assert (batch.id, batch.total) == (batch_id, 300)
    found = database.call(lambda db: db.execute_sql("SELECT custom_id FROM requests ORDER BY index").fetchall())
    assert [custom_id for (custom_id,) in found] == [f"c{number}" for number in range(300)]
    assert count(database, "chunks") == 3
    assert count(database, "purges") == 0


@pytest.mark.parametrize("stage_bytes", [1000, 1 << 20])
def test_a_broken_upload_leaves_nothing(database: Database, stage_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that vanishes during its upload leaves no batch, and after purging no request either."""
    monkeypatch.setattr(intake, "STAGE_BYTES", stage_bytes)
    with pytest.raises(ConnectionResetError):
        store(database, [b"".join(map(line, range(500)))], broken=True)
    assert (count(database, "batches"), count(database, "chunks")) == (0, 0)
    purge(database)
    assert (count(database, "requests"), count(database, "purges")) == (0, 0)


@pytest.mark.usefixtures("small_stages")
def test_a_repeated_name_is_told_by_its_line(database: Database) -> None:
    """A custom_id repeated several stages later is rejected with its line number."""
    file = [line(number) for number in range(200)]
    file[150] = b"\n" + line(3)
    with pytest.raises(ApiError) as refused:
        store(database, file)
    [violation] = refused.value.violations
    assert violation.field == "line 152: custom_id"
    assert "'c3'" in violation.description
    purge(database)
    assert count(database, "requests") == 0


@pytest.mark.usefixtures("small_stages")
@pytest.mark.parametrize("size", [2, 200])
def test_another_repetition_is_no_repeated_name(database: Database, size: int) -> None:
    """What Postgres refuses because of another index than that of custom_ids is told as Postgres tells it."""
    database.call(lambda db: db.execute_sql("CREATE UNIQUE INDEX by_url ON requests (batch_id, url)"))
    with pytest.raises(psycopg2.errors.UniqueViolation, match="by_url"):
        store(database, [line(number) for number in range(size)])


def wrong_places(database: Database, file: list[bytes]) -> list[str]:
    """The fields that are named when a file, split at random, is rejected."""
    whole = b"".join(file)
    cuts = sorted(random.Random(len(whole)).sample(range(len(whole)), 30))
    with pytest.raises(ApiError) as refused:
        store(database, [whole[start:end] for start, end in pairwise([0, *cuts, len(whole)])])
    return [violation.field for violation in refused.value.violations]


@pytest.mark.usefixtures("small_stages")
def test_every_wrong_line_and_repeated_name_is_told(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """However a file is split, all its wrong lines and repeated names are reported, up to a limit."""
    for seed in range(8):
        file = [line(number) for number in range(300)]
        chosen = sorted(random.Random(seed).sample(range(10, 300), 2 * seed + 1))
        for number in chosen:
            # Invalid, or with the name of an earlier line.
            file[number] = b"{x\n" if number % 2 else line(number % 10)
        expected = [f"line {number + 1}{'' if number % 2 else ': custom_id'}" for number in chosen]
        assert wrong_places(database, file) == expected
    everything = [b"5\n"] * 300
    assert wrong_places(database, everything) == [f"line {number + 1}" for number in range(MAX_VIOLATIONS)]
    # Beyond the names remembered, Postgres reports the first repeated one.
    monkeypatch.setattr(intake, "REMEMBERED", 100)
    file = [line(number) for number in range(300)]
    file[200] = file[210] = line(150)
    assert wrong_places(database, file) == ["line 201: custom_id"]
    file[200], file[210], file[299] = line(50), line(210), line(50)
    assert wrong_places(database, file) == ["line 201: custom_id", "line 300: custom_id"]
    monkeypatch.setattr(intake, "READ_ON_BYTES", 100)
    assert wrong_places(database, file) == ["line 201: custom_id"]
    purge(database)
    assert count(database, "requests") == count(database, "batches") == 0


@pytest.mark.parametrize(
    ("file", "name"),
    [
        (gzip.compress(b"".join(map(line, range(99))), mtime=0), "compressed with gzip"),
        (line(0).decode().encode("utf-16"), "UTF-16"),
    ],
)
@pytest.mark.parametrize("cut", [1, 1000])
def test_a_file_that_is_no_text_is_called_what_it_is(database: Database, file: bytes, name: str, cut: int) -> None:
    """A file in another format is recognized even if it arrives byte by byte."""
    with pytest.raises(ApiError, match=f"file: is {name}: give JSON lines in UTF-8"):
        store(database, [file[start : start + cut] for start in range(0, len(file), cut)])


@pytest.mark.usefixtures("small_stages")
def test_the_same_upload_again_is_the_same_batch(database: Database) -> None:
    """Repeating an upload under the same request_id stores nothing new."""
    file, options = [line(number) for number in range(200)], Options(request_id="again")
    assert store(database, file, options=options) == store(database, file, options=options)
    purge(database)
    assert (count(database, "batches"), count(database, "requests")) == (1, 200)


@pytest.mark.usefixtures("small_stages")
@pytest.mark.parametrize("size", [2, 200])
@pytest.mark.parametrize("is_done", [False, True])
def test_connections_that_are_cut(
    database: Database, size: int, is_done: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether or not a step of an upload was done when its connection to Postgres broke, it is done once."""
    file, call = [line(number) for number in range(size)], database.call
    left = {creation.reserve, served.read, creation.create, *([creation.stage] if size > 2 else [])}

    def cut(function: Any, *given: Any, **named: Any) -> Any:
        if function not in left:
            return call(function, *given, **named)
        left.remove(function)
        if is_done:
            call(function, *given, **named)
        raise DatabaseAwayError("cut") from psycopg2.OperationalError()

    monkeypatch.setattr(database, "call", cut)
    batch_id = store(database, file)
    assert not left
    purge(database)
    [batch] = database.call(batches.list_page, [], None, 10)
    assert (batch.id, batch.total, count(database, "requests")) == (batch_id, size, size)
    # A name that is really repeated is still told.
    left = {creation.stage, creation.create}
    with pytest.raises(ApiError, match="already used"):
        store(database, [*file, line(0)])


def test_what_was_staged_too_long_ago_is_no_batch(database: Database) -> None:
    """An upload whose staged rows may already have been removed is rejected instead of created incomplete."""
    batch_id = database.call(creation.reserve)
    rows = intake.Rows(batch_id, OFFER, SIZES)
    database.call(creation.stage, batch_id, rows.feed(line(0)), -1.0)
    with pytest.raises(creation.StagedTooLongError):
        database.call(creation.create, batch_id, Options(), rows.content, rows.feed(line(1)), True, 60)
    assert count(database, "batches") == 0


def test_what_is_staged_after_the_rest_was_removed_is_no_batch(database: Database) -> None:
    """An upload that goes on after its first rows were removed, as when the clock was set, is not taken for whole."""
    # As of two minutes ago: ids have the time.
    batch_id = database.call(creation.reserve) - (120_000 << 20)
    rows = intake.Rows(batch_id, OFFER, SIZES)
    database.call(creation.stage, batch_id, rows.feed(line(0)), 60.0)
    purge(database)
    assert count(database, "requests") == 0
    database.call(creation.stage, batch_id, rows.feed(line(1)), 60.0)
    with pytest.raises(creation.StagedTooLongError):
        database.call(creation.create, batch_id, Options(), rows.content, rows.feed(line(2)), True, 60)
    purge(database)
    assert (count(database, "batches"), count(database, "requests")) == (0, 0)


def test_what_is_staged_while_the_rest_is_removed(database: Database, database_url: str) -> None:
    """Rows whose transaction has not ended yet when a purge removes the ones before them are removed after it."""
    other = Database(database_url, "other")
    batch_id = database.call(creation.reserve) - (120_000 << 20)
    rows = intake.Rows(batch_id, OFFER, SIZES)
    database.call(creation.stage, batch_id, rows.feed(line(0)), 60.0)

    def slowly(db: peewee.PostgresqlDatabase) -> None:
        with db.atomic():
            creation.stage(db, batch_id, rows.feed(line(1)), 60.0)
            purge(other)

    database.call(slowly)
    purge(other)
    assert (count(database, "requests"), count(database, "purges")) == (0, 0)
    other.close()


def test_worker_dies_in_the_middle_of_an_upload(stack: Stack) -> None:
    """If the worker dies during an upload, the client's retry creates exactly one complete batch."""
    stack.gateway()
    worker = stack.worker(failpoint="stage.after_commit:2", simulated_request_s=0)
    stack.wait_until_accepting()
    with Client(stack.target, patience_s=90) as client:
        dying = threading.Thread(target=dies_and_comes_back, args=(worker,))
        dying.start()
        batch = client.submit_lines(lines(1000, filler="x" * 20_000))
        dying.join()
        assert finished(client, batch.id).counts.completed == 1000
        assert [found.id for found in client.list()] == [batch.id]
    check_invariants(stack)


def test_slow_uploads_hold_nobody_up(serving: Stack, client: Client) -> None:
    """Many clients in the middle of slow uploads do not hold up others, and their uploads complete too."""
    done = threading.Event()

    def slow() -> Iterator[pb.UploadBatchRequest]:
        yield pb.UploadBatchRequest(options=pb.BatchOptions())
        yield pb.UploadBatchRequest(data=b"".join(lines(10)))
        done.wait(60)
        yield pb.UploadBatchRequest(end=pb.UploadEnd())

    stub = batch_service_pb2_grpc.BatchServiceStub(client._channel)
    calls = [stub.UploadBatch.future(slow(), timeout=90) for _ in range(30)]
    try:
        assert finished(client, client.submit_lines(lines(50)).id).counts.completed == 50
    finally:
        done.set()
    slow_ones = [call.result().batch.id for call in calls]
    until(lambda: all(client.get(batch_id).HasField("end_time") for batch_id in slow_ones), "all to complete")


def test_chunks_of_a_staged_batch_can_be_claimed(database: Database) -> None:
    """The chunks of an upload can be claimed only once it is a batch."""
    batch_id = database.call(creation.reserve)
    rows = intake.Rows(batch_id, OFFER, SIZES)
    database.call(creation.stage, batch_id, rows.feed(line(0)), 60.0)
    claim = lambda: database.call(chunks.claim, holder("w"), ["tiny"], 1)  # noqa: E731
    assert claim() == []
    database.call(creation.create, batch_id, Options(), rows.content, b"", True, 60)
    assert len(claim()) == 1


def test_a_worker_that_is_given_up_during_an_upload() -> None:
    """An upload whose channel is closed because the worker is gone counts as lost, so that another one is tried."""
    began = threading.Event()

    def answer_nothing(requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        began.set()
        for _ in requests:
            pass
        return b""

    async def messages() -> AsyncIterator[pb.UploadBatchRequest]:
        yield pb.UploadBatchRequest(options=pb.BatchOptions())
        await asyncio.Event().wait()

    async def send(channel: grpc.Channel) -> None:
        stub = batch_service_pb2_grpc.BatchServiceStub(channel)
        sending = asyncio.create_task(upload.send(stub, upload.Upload(aiter(messages()), "r"), 60, ()))
        await asyncio.to_thread(began.wait, 30)
        channel.close()
        with pytest.raises(LostError):
            await asyncio.wait_for(sending, 30)

    server = grpc.server(ThreadPoolExecutor(1))
    handler = grpc.stream_unary_rpc_method_handler(answer_nothing)
    service = grpc.method_handlers_generic_handler("vllm_batch.v1.BatchService", {"UploadBatch": handler})
    server.add_generic_rpc_handlers((service,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        asyncio.run(send(grpc.insecure_channel(f"127.0.0.1:{port}")))
    finally:
        server.stop(None).wait(30)
