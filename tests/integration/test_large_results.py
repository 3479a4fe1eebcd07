"""Results of every size: whatever is stored can be read, in every way of reading, also after a broken connection."""

import asyncio
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from service.api import messages, servicer
from service.api.servicer import BatchServicer
from service.db import chunks, creation, results
from service.db.connection import Database
from service.db.limits import Limits
from service.db.results import Result
from service.errors import ApiError
from service.rpc import pages
from tests.support.batches import finished, line
from tests.support.servers import Stack
from tests.support.store import holder, stored
from vllm_batch import AsyncClient, CallError, Client, output
from vllm_batch.channel import MAX_MESSAGE_BYTES
from vllm_batch.v1 import batch_service_pb2 as pb

pytestmark = pytest.mark.usefixtures("called_by_anybody")

CLI = Path(sys.executable).parent / "vllm-batch"
LIMITS = Limits(1000, 1_000_000)
LARGE = 100
MB = 1_000_000


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lowers every limit on the path of a result to a few hundred bytes."""
    monkeypatch.setattr(results, "LARGE_BYTES", LARGE)
    monkeypatch.setattr(results, "STRETCH", 7)
    monkeypatch.setattr(messages, "MAX_BODY_BYTES", 3 * LARGE)
    monkeypatch.setattr(servicer, "PAGE_BYTES", 400)
    monkeypatch.setattr(servicer, "LINES_BYTES", 600)


def text_of(size: int, letters: str) -> str:
    """A JSON text of exactly this many bytes, made of these letters."""
    inner = size - 2
    wide = letters * (inner // len(letters.encode()))
    return f'"{wide}{"-" * (inner - len(wide.encode()))}"'


def store_bodies(database: Database, bodies: list[str | None], gaps: frozenset[int] = frozenset()) -> int:
    """Stores a batch with these bodies (None: an error) and ends it. Returns its id."""
    batch = stored(database, len(bodies))
    mine = holder()
    [chunk] = database.call(chunks.claim, mine, ["tiny"], 1)
    given = [
        Result(chunk.id, batch.id, index, status_code=200, body=body, custom_id=f"c{index}")
        if body is not None
        else Result(chunk.id, batch.id, index, error_code="E", error_message="said no", custom_id=f"c{index}")
        for index, body in enumerate(bodies)
        if index not in gaps
    ]
    # Results finish in a different order from the input.
    random.Random(len(bodies)).shuffle(given)
    database.call(results.write, given, mine.incarnation)
    state = "UPDATE batches SET state = 'cancelled', end_time = now() WHERE id = %s AND state = 'in_progress'"
    database.call(lambda db: db.execute_sql(state, (batch.id,)))
    return batch.id


def stream(database: Database, batch_id: int, form: int, order: int, token: str = "") -> list[pb.StreamResultsResponse]:
    """What StreamResults sends."""

    async def read() -> list[pb.StreamResultsResponse]:
        request = pb.StreamResultsRequest(
            batch_id=messages.batch_name(batch_id), order=order, format=form, resume_token=token
        )
        answers = BatchServicer(database, LIMITS).StreamResults(request, None)  # type: ignore[arg-type]
        return [response async for response in answers]

    return asyncio.run(read())


# Three pieces are also the most that a message takes.
AROUND_A_PIECE = [1, *(n * LARGE + more for n in (1, 2, 3) for more in (-1, 0, 1)), 5 * LARGE + 7]
SIZES: list[list[int | None]] = [
    [5 * LARGE],
    [1, 5 * LARGE, 1],
    [5 * LARGE, 5 * LARGE, None],
    [None, *AROUND_A_PIECE, None, *reversed(AROUND_A_PIECE)],
    [LARGE] * 20,
    [LARGE + 1] * 20,
    *([random.Random(seed).choice([None, 2, *AROUND_A_PIECE]) for _ in range(seed % 25 + 1)] for seed in range(6)),
]


@pytest.mark.parametrize("order", [pb.RESULT_ORDER_INPUT, pb.RESULT_ORDER_FINISHED])
@pytest.mark.parametrize("letters", ["x", "ä", "😀"])
@pytest.mark.usefixtures("small_limits")
def test_lines_are_whole_and_go_on_after_every_piece(database: Database, letters: str, order: int) -> None:
    """A stream of lines gives the same bytes wherever it is resumed, in pieces of bounded size."""
    for number, sizes in enumerate(SIZES):
        bodies = [None if size is None else text_of(max(size, 2), letters) for size in sizes]
        gaps = frozenset({1, 4} if number % 2 else ())
        batch_id = store_bodies(database, bodies, gaps)
        read = stream(database, batch_id, pb.RESULT_FORMAT_JSONL, order)
        whole = b"".join(page.jsonl for page in read)
        found = {json.loads(text)["custom_id"]: text for text in whole.decode().splitlines()}
        assert len(found) == whole.count(b"\n") == len([index for index in range(len(bodies)) if index not in gaps])
        for name, text in found.items():
            body = bodies[int(name[1:])]
            assert json.loads(text)["error"] == ({"code": "E", "message": "said no"} if body is None else None)
            assert body is None or f'"body": {body}}}, "error": null}}' in text
        assert all(0 < len(page.jsonl) <= 600 + LARGE + 300 for page in read)
        before = b""
        for page in read:
            before += page.jsonl
            rest = stream(database, batch_id, pb.RESULT_FORMAT_JSONL, order, page.resume_token)
            assert before + b"".join(each.jsonl for each in rest) == whole


@pytest.mark.usefixtures("small_limits")
def test_bodies_of_before_are_read_too(database: Database) -> None:
    """A large body that an earlier version stored in the old column is read in the same ways."""
    bodies: list[str | None] = [text_of(size, "ä") for size in (5, 5 * LARGE + 3, 2 * LARGE)]
    batch_id = store_bodies(database, bodies)
    forms = (pb.RESULT_FORMAT_JSONL, pb.RESULT_FORMAT_MESSAGE)
    new = [stream(database, batch_id, form, pb.RESULT_ORDER_INPUT) for form in forms]
    move = "UPDATE results SET body = convert_from(large_body, 'UTF8'), large_body = NULL WHERE large_body IS NOT NULL"
    assert database.call(lambda db: db.execute_sql(move).rowcount) == 2
    assert [stream(database, batch_id, form, pb.RESULT_ORDER_INPUT) for form in forms] == new


@pytest.mark.parametrize("order", [pb.RESULT_ORDER_INPUT, pb.RESULT_ORDER_FINISHED])
@pytest.mark.usefixtures("small_limits")
def test_messages_leave_out_what_is_too_large_and_go_on(database: Database, order: int) -> None:
    """A body too large for a message is omitted, with its size and a token to read it; all others are complete."""
    for sizes in SIZES:
        bodies = [None if size is None else text_of(max(size, 2), "ä") for size in sizes]
        batch_id = store_bodies(database, bodies)
        found = [
            result for page in stream(database, batch_id, pb.RESULT_FORMAT_MESSAGE, order) for result in page.results
        ]
        assert sorted(result.index for result in found) == list(range(len(bodies)))
        for result in found:
            body, response = bodies[result.index], result.response
            asked = pb.GetResultRequest(batch_id=messages.batch_name(batch_id), custom_id=result.custom_id)
            one = asyncio.run(BatchServicer(database, LIMITS).GetResult(asked, None))  # type: ignore[arg-type]
            assert one.result == result
            if body is None:
                assert result.error.code == "E"
            elif len(body.encode()) <= 3 * LARGE:
                assert (response.body_json, response.omitted_body_bytes, response.line_token) == (body, 0, "")
            else:
                assert (response.status_code, response.body_json) == (200, "")
                assert response.omitted_body_bytes == len(body.encode())
                with pytest.raises(ValueError, match="left out"):
                    output.line(result)
                read = stream(database, batch_id, pb.RESULT_FORMAT_JSONL, pb.RESULT_ORDER_INPUT, response.line_token)
                text = b"".join(page.jsonl for page in read).split(b"\n")[0]
                assert json.loads(text)["custom_id"] == result.custom_id
                assert text.endswith(f'"body": {body}}}, "error": null}}'.encode())


@pytest.mark.usefixtures("small_limits")
def test_a_token_from_within_a_line_asks_for_no_nonsense(database: Database) -> None:
    """A token that points outside a large body is rejected; for messages, one inside a line repeats that result."""
    batch_id = store_bodies(database, ["1", text_of(4 * LARGE, "x"), "2"])
    for wrong in (pages.token("index", 1, 4 * LARGE), pages.token("index", 0, 1), pages.token("index", 7, LARGE)):
        with pytest.raises(ApiError, match="is not a token"):
            stream(database, batch_id, pb.RESULT_FORMAT_JSONL, pb.RESULT_ORDER_INPUT, wrong) or pytest.fail("sent")
    [first, *_] = stream(
        database, batch_id, pb.RESULT_FORMAT_MESSAGE, pb.RESULT_ORDER_INPUT, pages.token("index", 1, LARGE)
    )
    assert first.results[0].index == 1


def test_a_message_has_room_for_what_is_said_to_fit() -> None:
    """The largest body allowed in a message, with the longest name, fits gRPC's message limit."""
    body = "x" * messages.MAX_BODY_BYTES
    result = results.StoredResult((1 << 31) - 1, 1 << 40, "😀" * 512, 200, body, None, None, 1 << 51)
    page = pb.StreamResultsResponse(results=[messages.result_message(1 << 59, result)])
    page.resume_token = pages.token("sequence", 1 << 61)
    assert page.ByteSize() <= MAX_MESSAGE_BYTES


def test_a_request_without_a_storable_result_can_be_retried(database: Database) -> None:
    """RetryBatch takes only the failed request."""
    batch_id = store_bodies(database, ["1", None, "3"])
    retried = database.call(creation.retry, batch_id, None, 60, LIMITS, None)
    assert retried is not None
    names = "SELECT custom_id FROM requests WHERE batch_id = %s"
    assert database.call(lambda db: db.execute_sql(names, (retried.id,)).fetchall()) == [("c1",)]


# One page of messages, of lines, one piece, gRPC's default limit, an upload's line.
SMALL_LIMITS = (192 << 10, 512 << 10, 1 << 20, 4 << 20, 8 << 20)
AROUND_SMALL_LIMITS = [limit + more for limit in SMALL_LIMITS for more in (-1, 0, 1)]
# And what a message takes, which is a little less than gRPC's own limit of 64 MiB.
IN_CI = [*AROUND_SMALL_LIMITS, messages.MAX_BODY_BYTES, messages.MAX_BODY_BYTES + 1, 75 * MB]
MORE = [messages.MAX_BODY_BYTES - 1, (64 << 20) - 1, 64 << 20, (64 << 20) + 1]


def large_lines(*sizes: int) -> Iterator[bytes]:
    """A request for a response of each size, with a small one before and after each."""
    for number, size in enumerate(sizes):
        yield line(f"small{number}")
        yield line(f"large{number}", vllm_xargs={"body_bytes": size})
    yield line("last")


def cli(stack: Stack, *arguments: str) -> "subprocess.CompletedProcess[bytes]":
    env = {name: value for name, value in os.environ.items() if not name.startswith("BATCH_")}
    command = [str(CLI), "--target", stack.target, "--patience", "60", *arguments]
    return subprocess.run(command, env=env, capture_output=True, timeout=100)


@pytest.mark.parametrize(
    "real_sizes",
    [pytest.param(IN_CI, id="in CI"), pytest.param(MORE, id="more", marks=pytest.mark.thorough)],
)
def test_every_way_of_reading_reads_every_size(
    serving: Stack, client: Client, tmp_path: Path, real_sizes: list[int]
) -> None:
    """Responses from a few bytes to 75 MB can be read as messages, as lines, with asyncio and on the command line."""
    batch = client.submit_lines(large_lines(*real_sizes))
    done = finished(client, batch.id)
    assert (done.counts.completed, done.counts.failed) == (2 * len(real_sizes) + 1, 0)
    names = [name for number in range(len(real_sizes)) for name in (f"small{number}", f"large{number}")] + ["last"]

    sizes = {}
    for result in client.results(batch.id):
        sizes[result.custom_id] = result.response.omitted_body_bytes or len(result.response.body_json)
        is_left_out = sizes[result.custom_id] > messages.MAX_BODY_BYTES
        assert (result.response.body_json == "") == is_left_out
    assert list(sizes) == names
    assert [sizes[f"large{number}"] for number in range(len(real_sizes))] == real_sizes

    made = tmp_path / "out.jsonl"
    written = cli(serving, "results", batch.id, "-o", str(made))
    assert written.returncode == 0, written.stderr
    with made.open("rb") as file:
        whole = list(file)
    assert [json.loads(text)["custom_id"] for text in whole] == names
    assert [text for some in client.result_lines(batch.id) for text in some.splitlines(keepends=True)] == whole

    async def read() -> list[bytes]:
        async with AsyncClient(serving.target, patience_s=0) as other:
            last = await other.result(batch.id, f"large{len(real_sizes) - 1}")
            one = b"".join([piece async for piece in other.result_line(batch.id, last)])
            assert one == whole[-2]
            return [some async for some in other.result_lines(batch.id)]

    assert b"".join(asyncio.run(read())) == b"".join(whole)
    for number in (1, len(real_sizes) - 2):
        assert cli(serving, "result", batch.id, f"large{number}").stdout == whole[2 * number + 1]


@pytest.mark.thorough
def test_a_gateway_that_dies_in_the_middle_of_a_line(stack: Stack, tmp_path: Path) -> None:
    """A line interrupted by the gateway's death resumes where it broke off, without gaps or repeats."""
    gateway = stack.gateway()
    stack.worker()
    stack.wait_until_accepting()
    told: list[CallError] = []
    with Client(stack.target, patience_s=90, on_retry=lambda error, _: told.append(error)) as client:
        batch = client.submit_lines(large_lines(20 * MB, 5))
        finished(client, batch.id)
        whole = b"".join(client.result_lines(batch.id))
        assert len(whole) > 20 * MB
        for read in (client.result_bytes, client.result_lines):
            told.clear()
            found = b""
            for piece in read(batch.id):
                found += piece
                if not told and len(found) < 2 * MB:
                    gateway.kill()
                    gateway.start()
            assert found == whole
            assert told


@pytest.mark.thorough
def test_memory_stays_flat(serving: Stack, client: Client) -> None:
    """The gateway's memory grows by less than 40 MB while it streams a line of 75 MB."""
    batch = client.submit_lines([line("warm", vllm_xargs={"body_bytes": 5 * MB})])
    finished(client, batch.id)
    gateway = psutil.Process(serving.servers[0].process.pid)
    sum(map(len, client.result_bytes(batch.id)))
    before = gateway.memory_info().rss
    batch = client.submit_lines([line("large", vllm_xargs={"body_bytes": 75 * MB})])
    finished(client, batch.id)
    highest, read = 0, 0
    for piece in client.result_bytes(batch.id):
        highest, read = max(highest, gateway.memory_info().rss), read + len(piece)
    assert read > 75 * MB
    assert highest - before < 40 * MB, (before, highest)


@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_the_largest_result_that_is_stored(serving: Stack, client: Client, tmp_path: Path) -> None:
    """Results of 300 MB and exactly at the limit are stored; a larger one becomes an error with limit and size."""
    sizes = (300 * MB, results.MAX_BODY_BYTES, results.MAX_BODY_BYTES + 1)
    gateway = psutil.Process(serving.servers[0].process.pid)
    batch = client.submit_lines(large_lines(*sizes))
    done = finished(client, batch.id)
    assert (done.counts.completed, done.counts.failed) == (6, 1)
    read, highest = 0, 0
    for piece in client.result_bytes(batch.id):
        highest, read = max(highest, gateway.memory_info().rss), read + len(piece)
    assert read > 300 * MB + results.MAX_BODY_BYTES
    assert highest < 150 * MB
    error = client.result(batch.id, "large2").error
    assert error.code == "RESULT_TOO_LARGE"
    assert str(results.MAX_BODY_BYTES) in error.message
    assert str(sizes[2]) in error.message
    again = client.retry(batch.id)
    assert again.counts.total == 1
