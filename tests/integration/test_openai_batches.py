"""OpenAI's door with the openai package as it is: batches from file to results, whatever happens meanwhile."""

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import openai
import psycopg2
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import Batch

from tests.support.batches import count, line, lines, ready, run_sql
from tests.support.cutting import cutting
from tests.support.servers import ROOT, Stack, new_stack
from tests.support.waiting import until
from vllm_batch import Client
from vllm_batch.v1 import batch_service_pb2 as pb

CHAT = "/v1/chat/completions"
ENDED = ("completed", "failed", "expired", "cancelled")


@pytest.fixture(scope="module")
def whole(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Door, gateway and a worker that accepts new work."""
    with new_stack(postgres, tmp_path_factory.mktemp("whole")) as stack:
        stack.gateway()
        stack.worker()
        stack.http()
        stack.wait_until_accepting()
        yield stack


@pytest.fixture
def client(whole: Stack) -> Iterator[OpenAI]:
    with OpenAI(base_url=whole.base_url, api_key="none", max_retries=0) as client:
        yield client


def created(client: OpenAI, content: bytes, **options: Any) -> Batch:
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    given: Any = {"endpoint": CHAT, "completion_window": "24h"} | options
    return client.batches.create(input_file_id=file.id, **given)


def ended(client: OpenAI, batch_id: str) -> Batch:
    def look() -> Batch | None:
        batch = client.batches.retrieve(batch_id)
        return batch if batch.status in ENDED else None

    return until(look, f"{batch_id} to end") or client.batches.retrieve(batch_id)


def results(client: OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(text) for text in client.files.content(file_id).text.splitlines()]


def test_from_file_to_results(client: OpenAI) -> None:
    """As in OpenAI's guide: each answer is a line of the output file, in the order of the requests."""
    batch = created(client, b"".join(lines(250)), metadata={"team": "search"})
    assert (batch.object, batch.endpoint, batch.completion_window) == ("batch", CHAT, "24h")
    assert batch.metadata == {"team": "search"}
    batch = ended(client, batch.id)
    assert batch.status == "completed", batch
    assert batch.request_counts is not None
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (250, 250, 0)
    assert batch.usage is not None
    assert batch.usage.total_tokens == batch.usage.input_tokens + batch.usage.output_tokens > 0
    assert (batch.error_file_id, batch.errors, batch.model) == (None, None, "tiny")
    assert batch.created_at <= batch.in_progress_at <= batch.completed_at < batch.expires_at  # type: ignore[operator]
    found = results(client, batch.output_file_id)
    assert [result["custom_id"] for result in found] == [f"c{i}" for i in range(250)]
    assert found[0]["response"]["status_code"] == 200
    assert found[0]["response"]["body"]["choices"]
    assert found[0]["error"] is None


def test_successes_and_all_else_in_files_of_their_own(client: OpenAI, whole: Stack) -> None:
    """A request that is refused keeps its response in the error file; both files have the size that they say."""
    batch = created(client, line("a") + line("b", vllm_xargs={"simulate": "refuse"}) + line("c"))
    batch = ended(client, batch.id)
    assert batch.output_file_id is not None
    assert batch.error_file_id is not None
    assert [result["custom_id"] for result in results(client, batch.output_file_id)] == ["a", "c"]
    [wrong] = results(client, batch.error_file_id)
    assert (wrong["custom_id"], wrong["response"]["status_code"] // 100) == ("b", 4)
    for name in (batch.output_file_id, batch.error_file_id):
        file = client.files.retrieve(name)
        assert (file.purpose, file.bytes) == ("batch_output", len(client.files.content(name).read()))
    listed = {file.id for file in client.files.list(purpose="batch_output")}
    assert {batch.output_file_id, batch.error_file_id} <= listed
    client.files.delete(batch.error_file_id)
    with pytest.raises(openai.NotFoundError):
        client.files.content(batch.error_file_id)
    assert client.files.retrieve(batch.output_file_id)


def test_download_goes_on_where_it_broke_off(client: OpenAI) -> None:
    """Every range of an output file has exactly its bytes, within pages, across them and within a large line."""
    large = {"vllm_xargs": {"body_bytes": 3 << 20}}
    batch = created(client, b"".join(lines(3000)) + line("large", **large) + line("last"))
    batch = ended(client, batch.id)
    assert batch.output_file_id is not None
    whole = client.files.content(batch.output_file_id).read()
    url = f"{client.base_url}files/{batch.output_file_id}/content"
    size = len(whole)
    near = whole.index(b'"large"')
    starts = [0, 1, 1 << 19, near - 5, near + 200, near + (1 << 20), near + (2 << 20) + 77, size - 400, size - 1]
    for start in starts:
        for end in (start + 1, start + 300_000, start + (2 << 20), size):
            got = httpx.get(url, headers={"range": f"bytes={start}-{min(end, size) - 1}"})
            assert (got.status_code, got.content == whole[start:end]) == (206, True), (start, end)


def test_wrong_lines_are_told_one_by_one(client: OpenAI, whole: Stack) -> None:
    """The batch of a file with wrong lines is failed, with line, code, message and param of each."""
    content = b"".join(
        [
            line("a"),
            b"no json\n",
            line("a"),
            line("b", model="unknown"),
            line("c").replace(b"/v1/chat/completions", b"/v1/completions"),
            b'{"custom_id": "d"}\n',
        ]
    )
    batch = ended(client, created(client, content).id)
    assert batch.status == "failed"
    assert batch.failed_at is not None
    assert batch.errors is not None
    assert batch.errors.data is not None
    found = [(error.line, error.code, error.param) for error in batch.errors.data]
    assert found == [
        (2, "invalid_json_line", None),
        (3, "duplicate_custom_id", "custom_id"),
        (4, "model_not_found", "body.model"),
        (5, "invalid_url", "url"),
        (6, "missing_required_parameter", "url"),
    ]
    assert all(error.message for error in batch.errors.data)
    with Client(whole.target, patience_s=0) as grpc_client:
        assert grpc_client.get(batch.id).state == pb.BATCH_STATE_FAILED
    for content in (line("a", model="a\0b"), line("a").replace(b"tiny", b"\xff"), b"\x1f\x8b"):
        assert ended(client, created(client, content).id).status == "failed"
    empty = ended(client, created(client, b"\n").id)
    assert empty.errors is not None
    assert empty.errors.data is not None
    assert [error.code for error in empty.errors.data] == ["empty_file"]
    number = batch.id.removeprefix("batch_")
    until(lambda: not count(whole, f"requests WHERE batch_id = {number}"), "what was stored of it to go")


def test_same_create_again_is_the_same_batch(client: OpenAI) -> None:
    """A create that is sent again, also at the same moment, makes one batch; other options make another one."""
    file = client.files.create(file=("in.jsonl", line("a")), purpose="batch")

    def create(_: int) -> str:
        return client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h").id

    with ThreadPoolExecutor(8) as threads:
        names = set(threads.map(create, range(16)))
    assert len(names) == 1
    other = client.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata={"again": "yes"}
    )
    assert other.id not in names


@pytest.mark.parametrize("tries", [5, pytest.param(200, marks=pytest.mark.thorough)])
def test_create_whose_answer_was_lost(tries: int, whole: Stack) -> None:
    """Each of many creates whose answer is cut, at whatever byte, and which the SDK sends again, makes one batch."""
    before = count(whole, "batches")
    with (
        cutting(whole.host, whole.http_port) as line_to_door,
        OpenAI(base_url=line_to_door.base_url, api_key="none", max_retries=2) as client,
        ThreadPoolExecutor(8) as threads,
    ):
        file = client.files.create(file=("in.jsonl", line("a")), purpose="batch")

        def create(number: int) -> str:
            return client.batches.create(
                input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata={"n": str(number)}
            ).id

        names = set(threads.map(create, range(tries)))
    assert (line_to_door.cuts, len(names), count(whole, "batches") - before) == (tries, tries, tries)


@pytest.mark.parametrize(
    "failpoint", ["file_batch.after_commit", pytest.param("file_batch.before_commit", marks=pytest.mark.thorough)]
)
def test_door_dies_at_a_create(failpoint: str, stack: Stack) -> None:
    """A create whose door dies before it can answer, and which the SDK sends to its next life, makes one batch."""
    door = stack.http()
    with OpenAI(base_url=stack.base_url, api_key="none", max_retries=10) as client, ThreadPoolExecutor(1) as threads:
        file = client.files.create(file=("in.jsonl", line("a")), purpose="batch")
        door.terminate()
        door.arm(failpoint)
        door.start()
        creating = threads.submit(client.batches.create, input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        until(lambda: door.process.poll() is not None, "the door to die")
        assert count(stack, "batches") == (1 if failpoint.endswith("after_commit") else 0)
        door.disarm()
        door.start()
        name = creating.result(60).id
        assert count(stack, "batches") == 1
        assert [batch.id for batch in client.batches.list()] == [name]


@pytest.mark.parametrize("table", ["file_pieces", "batches"])
def test_connection_is_cut(table: str, client: OpenAI, whole: Stack) -> None:
    """A file and a create whose connection to Postgres is cut are stored over another one, and nobody is refused."""
    content = b"".join(lines(20, padding="x" * 100_000))
    before = count(whole, "batches")
    file = client.files.create(file=("in.jsonl", content), purpose="batch")

    def store() -> Batch:
        if table == "file_pieces":
            return created(client, content)
        return client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")

    waiting = (
        "SELECT pid FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE NOT granted"
        f" AND relation = '{table}'::regclass AND application_name = 'vllm-batch-http'"
    )
    with (
        closing(psycopg2.connect(whole.database_url)) as holding,
        closing(psycopg2.connect(whole.database_url)) as looking,
        ThreadPoolExecutor(1) as threads,
    ):
        # Within a transaction it would see the same sessions again and again.
        looking.autocommit = True
        seen = looking.cursor()

        def found() -> list[tuple[int]]:
            seen.execute(waiting)
            return seen.fetchall()

        with holding, holding.cursor() as cursor:
            cursor.execute(f"LOCK TABLE {table} IN SHARE MODE")
            storing = threads.submit(store)
            [(pid,)] = until(found, "the door to wait for the table", 8)
            cursor.execute("SELECT pg_terminate_backend(%s)", (pid,))
        batch = storing.result(60)
    assert ended(client, batch.id).status == "completed"
    assert count(whole, "batches") == before + 1
    assert client.files.content(batch.input_file_id).read() == content


def test_pages_and_both_doors(client: OpenAI, whole: Stack) -> None:
    """Each door lists and shows the batches of the other, newest first, page after page."""
    made = [created(client, line("a")).id for _ in range(3)]
    with Client(whole.target, patience_s=0) as grpc_client:
        through_grpc = grpc_client.submit_lines(lines(2)).id
        assert {*made} <= {batch.id for batch in grpc_client.list()}
    found = [batch.id for batch in client.batches.list(limit=2)]
    assert [name for name in found if name in (*made, through_grpc)] == [through_grpc, *made[::-1]]
    batch = ended(client, through_grpc)
    assert (batch.endpoint, batch.status) == (CHAT, "completed")
    assert len(results(client, batch.output_file_id)) == 2


def test_cancel(client: OpenAI) -> None:
    """A batch that is cancelled keeps its output; the requests without an answer are in its error file."""
    content = line("a") + b"".join(line(f"slow{i}", vllm_xargs={"simulate": 60}) for i in range(3))
    batch = created(client, content)
    until(lambda: client.batches.retrieve(batch.id).request_counts.completed == 1, "the first answer")  # type: ignore
    assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    batch = ended(client, batch.id)
    assert (batch.status, batch.cancelling_at is not None, batch.cancelled_at is not None) == ("cancelled", True, True)
    assert [result["custom_id"] for result in results(client, batch.output_file_id)] == ["a"]
    rest = results(client, batch.error_file_id)
    assert [(result["custom_id"], result["error"]["code"]) for result in rest] == [
        (f"slow{i}", "batch_cancelled") for i in range(3)
    ]
    assert client.files.retrieve(str(batch.error_file_id)).bytes == len(
        client.files.content(str(batch.error_file_id)).read()
    )
    with pytest.raises(openai.BadRequestError):
        client.batches.cancel(created_and_ended(client).id)


def created_and_ended(client: OpenAI) -> Batch:
    return ended(client, created(client, line("a")).id)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"completion_window": "soon"}, "completion_window"),
        ({"metadata": {"a" * 65: "b"}}, "metadata"),
        ({"metadata": {"a": "\0"}}, "metadata"),
        ({"endpoint": "/v1/\0"}, "endpoint"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, "output_expires_after.seconds"),
    ],
)
def test_create_that_is_wrong(given: dict[str, Any], param: str, client: OpenAI) -> None:
    """A create with anything wrong is refused at once, naming it."""
    with pytest.raises(openai.BadRequestError) as caught:
        created(client, line("a"), **given)
    assert param in str(caught.value.param)


def test_endpoint_that_is_not_served(client: OpenAI) -> None:
    """A batch for an endpoint that no model here has is failed with the ones that are there."""
    batch = ended(client, created(client, line("a"), endpoint="/v1/moderations").id)
    assert batch.errors is not None
    assert batch.errors.data is not None
    [error] = batch.errors.data
    assert (error.code, error.param) == ("invalid_endpoint", "endpoint")
    assert CHAT in str(error.message)


def test_asynchronous_client(whole: Stack) -> None:
    """The same with AsyncOpenAI, and with pages that it turns by itself."""

    async def run() -> int:
        async with AsyncOpenAI(base_url=whole.base_url, api_key="none") as client:
            file = await client.files.create(file=("in.jsonl", b"".join(lines(20))), purpose="batch")
            batch = await client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
            while batch.status not in ENDED:
                await asyncio.sleep(0.05)
                batch = await client.batches.retrieve(batch.id)
            assert batch.output_file_id is not None
            content = await client.files.content(batch.output_file_id)
            assert batch.id in [found.id async for found in client.batches.list(limit=1)]
            return len(content.text.splitlines())

    assert asyncio.run(run()) == 20


def test_example(whole: Stack, tmp_path: Path) -> None:
    """The program in examples/ runs as it is, but for the address."""
    program = (ROOT / "examples/openai_batch.py").read_text()
    assert "http://127.0.0.1:50054/v1" in program
    program = program.replace("http://127.0.0.1:50054/v1", whole.base_url)
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"".join(lines(3)))
    done = subprocess.run([sys.executable, "-c", program, source, target], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(target.read_text().splitlines()) == 3
    source.write_bytes(b"wrong")
    done = subprocess.run([sys.executable, "-c", program, source, target], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "line 1: not JSON" in done.stderr


def test_curl(whole: Stack) -> None:
    """As in OpenAI's guide, with curl."""
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("no curl")

    def call(*arguments: str) -> str:
        return subprocess.run(
            [curl, "-sS", "--fail-with-body", "-H", "Authorization: Bearer none", *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        ).stdout

    source = whole.folder / "batchinput.jsonl"
    source.write_bytes(b"".join(lines(3)))
    file = json.loads(call(f"{whole.base_url}/files", "-F", "purpose=batch", "-F", f"file=@{source}"))
    assert file["filename"] == "batchinput.jsonl"
    body = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h"}
    json_type = ("-H", "Content-Type: application/json")
    batch = json.loads(call(f"{whole.base_url}/batches", *json_type, "-d", json.dumps(body)))

    def look() -> dict[str, Any] | None:
        found: dict[str, Any] = json.loads(call(f"{whole.base_url}/batches/{batch['id']}"))
        return found if found["status"] == "completed" else None

    done = until(look, "the batch")
    assert done is not None
    assert len(call(f"{whole.base_url}/files/{done['output_file_id']}/content").splitlines()) == 3


def test_models(client: OpenAI) -> None:
    """Who asks what is served is told what a batch may name."""
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/other")


def test_batch_waits_for_a_worker(stack: Stack) -> None:
    """A batch is accepted before any worker lives, and after Postgres alone has kept it a while it runs."""
    stack.gateway()
    stack.worker().terminate()
    stack.http()
    with OpenAI(base_url=stack.base_url, api_key="none", max_retries=0) as client:
        made = [created(client, b"".join(lines(5)), metadata={"n": str(i)}) for i in range(3)]
        assert {batch.status for batch in made} == {"validating"}
        with Client(stack.target, patience_s=0) as grpc_client:
            assert grpc_client.get(made[0].id).state == pb.BATCH_STATE_VALIDATING
        cancelled = client.batches.cancel(made[2].id)
        assert cancelled.status == "cancelled"
        # Its file is deleted before it is checked, and not missed.
        client.files.delete(made[1].input_file_id)
        stack.worker()
        for batch in made[:2]:
            assert ended(client, batch.id).status == "completed"
        assert client.batches.retrieve(made[2].id).status == "cancelled"
        assert client.batches.retrieve(made[2].id).output_file_id is None


@pytest.mark.parametrize(
    "failpoint",
    [
        *(pytest.param(f"check.{point}", marks=pytest.mark.thorough) for point in ("after_claim", "after_stage")),
        pytest.param("check.before_commit", marks=pytest.mark.thorough),
        "check.after_commit",
    ],
)
def test_worker_dies_while_it_checks(failpoint: str, stack: Stack) -> None:
    """Whenever a worker is killed while it checks a file, its next life does it again, and each request runs once."""
    stack.http()
    stack.gateway()
    worker = stack.worker()
    until(lambda: ready(stack) == 1, "the worker")
    worker.terminate()
    worker.arm(failpoint)
    worker.start()
    with OpenAI(base_url=stack.base_url, api_key="none", max_retries=0) as client:
        # Large enough to be stored in several pieces.
        batch = created(client, b"".join(lines(400, padding="x" * 24_000)))
        until(lambda: worker.process.poll() is not None, "the worker to die")
        worker.disarm()
        worker.start()
        batch = ended(client, batch.id)
        assert batch.status == "completed", batch
        found = results(client, batch.output_file_id)
        assert [result["custom_id"] for result in found] == [f"c{i}" for i in range(400)]


def test_worker_dies_while_it_runs(stack: Stack) -> None:
    """A batch whose worker is killed in the middle has each answer once, through this door too."""
    stack.http()
    stack.gateway()
    worker = stack.worker(simulated_request_s=0.1)
    with OpenAI(base_url=stack.base_url, api_key="none") as client:
        batch = created(client, b"".join(lines(400)))
        until(lambda: client.batches.retrieve(batch.id).request_counts.completed > 60, "some answers")  # type: ignore
        worker.kill()
        worker.start()
        batch = ended(client, batch.id)
        assert batch.status == "completed"
        found = results(client, batch.output_file_id)
        assert [result["custom_id"] for result in found] == [f"c{i}" for i in range(400)]


def test_expired(client: OpenAI, whole: Stack) -> None:
    """What had no answer when the window ended is in the error file as batch_expired."""
    content = line("a") + line("slow", vllm_xargs={"simulate": 60})
    batch = created(client, content)
    until(lambda: client.batches.retrieve(batch.id).request_counts.completed == 1, "the first answer")  # type: ignore
    run_sql(whole, f"UPDATE batches SET expire_time = now() WHERE id = {batch.id.removeprefix('batch_')}")
    batch = ended(client, batch.id)
    assert (batch.status, batch.expired_at is not None) == ("expired", True)
    [rest] = results(client, batch.error_file_id)
    assert (rest["custom_id"], rest["response"], rest["error"]["code"]) == ("slow", None, "batch_expired")
