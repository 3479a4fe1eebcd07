"""Uploads of any size and pace: in small pieces or large, whole or not at all."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from uuid import uuid4

import pytest

from service.db import batches, chunks
from service.db.batches import Limits, Options
from service.db.connection import Database
from service.errors import ApiError
from service.worker import intake
from service.worker.intake import Intake, file_place
from tests.integration.conftest import Stack
from tests.integration.test_failpoints import check_invariants, dies_and_comes_back
from tests.integration.test_front_door import finished, lines
from tests.integration.test_store import OFFER, SIZES, count, line
from tests.waiting import until
from vllm_batch.client import Client
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import batch_service_pb2_grpc


@pytest.fixture
def small_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every few lines are a piece of their own."""
    monkeypatch.setattr(intake, "STAGE_BYTES", 1000)


def store(database: Database, pieces: Sequence[bytes], broken: bool = False, options: Options | None = None) -> int:
    """Stores these pieces of a file, after which the client may vanish. The batch's number."""

    async def given() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield piece
        if broken:
            raise ConnectionResetError

    taking = Intake(database, SIZES, Limits(100, 10_000))
    return asyncio.run(taking.store(options or Options(), b"", given(), OFFER, file_place)).id


def purge(database: Database) -> None:
    while database.call(batches.purge, 1000):
        pass


@pytest.mark.usefixtures("small_stages")
@pytest.mark.parametrize("cut", [7, 100, 100_000])
def test_a_file_in_stages_is_one_batch(database: Database, cut: int) -> None:
    """However a file is cut, its batch holds every line once, in order, and nothing else is kept of the upload."""
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
    """A client that vanishes in the middle has stored no batch, and soon no request either."""
    monkeypatch.setattr(intake, "STAGE_BYTES", stage_bytes)
    with pytest.raises(ConnectionResetError):
        store(database, [b"".join(map(line, range(500)))], broken=True)
    assert (count(database, "batches"), count(database, "chunks")) == (0, 0)
    purge(database)
    assert (count(database, "requests"), count(database, "purges")) == (0, 0)


@pytest.mark.usefixtures("small_stages")
def test_a_repeated_name_is_told_by_its_line(database: Database) -> None:
    """A custom_id that comes again several stages later is refused with the line it is on."""
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
def test_the_same_upload_again_is_the_same_batch(database: Database) -> None:
    """Under its request_id an upload that comes again stores nothing new."""
    file, options = [line(number) for number in range(200)], Options(request_id="again")
    assert store(database, file, options=options) == store(database, file, options=options)
    purge(database)
    assert (count(database, "batches"), count(database, "requests")) == (1, 200)


def test_what_was_staged_too_long_ago_is_no_batch(database: Database) -> None:
    """An upload that may have been removed already is not created with half of its requests."""
    batch_id = database.call(batches.reserve)
    rows = intake.Rows(batch_id, OFFER, SIZES)
    database.call(batches.stage, batch_id, rows.feed(line(0)), -1.0)
    with pytest.raises(batches.StagedTooLongError):
        database.call(batches.create, batch_id, Options(), rows.content, rows.feed(line(1)), True, 60)
    assert count(database, "batches") == 0


def test_worker_dies_in_the_middle_of_an_upload(stack: Stack) -> None:
    """The client sends it again, and there is one batch; what the first try left is not run and does not stay."""
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
    """Many clients in the middle of their uploads cost others neither their calls nor their turn."""
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
    until(lambda: all(client.get(batch_id).HasField("end_time") for batch_id in slow_ones), "all to be done")


def test_chunks_of_a_staged_batch_can_be_claimed(database: Database) -> None:
    """Nothing of an upload is to be had before it is a batch."""
    batch_id = database.call(batches.reserve)
    rows = intake.Rows(batch_id, OFFER, SIZES)
    database.call(batches.stage, batch_id, rows.feed(line(0)), 60.0)
    claim = lambda: database.call(chunks.claim, "w", uuid4(), ["tiny"], 1, 60.0)  # noqa: E731
    assert claim() == []
    database.call(batches.create, batch_id, Options(), rows.content, b"", True, 60)
    assert len(claim()) == 1
