"""Uploads and files of OpenAI's door while Postgres is played: what is answered when they end before all has come."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from service.auth.callers import ANYBODY, Caller
from service.auth.roles import Role
from service.db import files
from service.db.files import File, Part, PartGoneError, PartsError
from service.db.limits import Limits
from service.errors import ApiError
from service.http import batches, content, door, uploads
from service.http import files as http_files
from service.http.files import Keeping
from service.http.storing import PartWriter
from service.rpc import call_context

FORM = {"data": ("a", b"12345")}
UPLOAD = File(1, "default", "kept", True, "a", 5, None, datetime.now(UTC), None)
WRONG = {"part_ids": ["part_2"], "md5": "0" * 32}
PART = Part(2, 1, None, 5, datetime.now(UTC))


class Played:
    """A database whose functions answer, or raise, what a test says."""

    def __init__(self, **answers: Any) -> None:
        self.answers: dict[str, Any] = {"begin_part": 2, "begin": (1, 2), "add_piece": None, "discard": None} | answers
        self.calls: list[tuple[Any, ...]] = []

    def run(self, function: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        self.calls.append((function.__name__, *args))
        found: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        answer = self.answers[function.__name__]
        if isinstance(answer, Exception):
            found.set_exception(answer)
        else:
            found.set_result(answer(*args) if callable(answer) else answer)
        return found

    read = run_idempotent = run

    async def retry_once(self, function: Callable[[bool], Awaitable[Any]]) -> Any:
        return await function(False)


def post(database: Any, path: str, **body: Any) -> httpx.Response:
    """What the door answers."""
    return call(database, "POST", path, ANYBODY, **body)


def call(database: Any, method: str, path: str, caller: Caller, **body: Any) -> httpx.Response:
    """What the door answers a caller."""
    app, keeping = FastAPI(), Keeping(None, 1 << 20, Limits(1, 1))
    app.include_router(batches.router(database, keeping.limits, []))
    app.include_router(uploads.router(database, keeping))
    app.include_router(http_files.router(database, keeping))
    app.add_exception_handler(ApiError, door.on_error)  # type: ignore[arg-type]

    async def run() -> httpx.Response:
        call_context.begin("", ()).identify(caller)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://door") as client:
            return await client.request(method, path, **body)

    return asyncio.run(run())


def test_part_of_a_pending_upload() -> None:
    """A part that has arrived is named to the client."""
    answer = post(Played(finish_part=PART), "/v1/uploads/upload_1/parts", files=FORM)
    assert (answer.status_code, answer.json()["id"]) == (200, "part_2")


@pytest.mark.parametrize(
    "answers", [{"finish_part": PartGoneError()}, {"add_piece": PartGoneError()}, {"begin_part": None}]
)
def test_part_of_an_upload_that_ended_meanwhile(answers: dict[str, Any]) -> None:
    """A part whose upload is completed, cancelled or given up while it arrives is told so, and is no fault of ours."""
    answer = post(Played(**{"finish_part": PART} | answers), "/v1/uploads/upload_1/parts", files=FORM)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize("function", ["begin_part", "add_piece"])
def test_upload_to_which_too_much_was_sent(function: str) -> None:
    """An upload takes no parts beside those that can belong to it: one announced small does not fill the disk."""
    database = Played(**{"finish_part": PART, function: PartsError("9 bytes")})
    answer = post(database, "/v1/uploads/upload_1/parts", files=FORM)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "data: 9 bytes")


def test_part_that_breaks_off_counts() -> None:
    """What has arrived of a part that will not be complete is stored until the upload ends, and counts until then."""
    database = Played(finish_part=PART)
    body = b'--a\r\nContent-Disposition: form-data; name="data"; filename="a"\r\n\r\n12345\r\n'
    answer = post(
        database,
        "/v1/uploads/upload_1/parts",
        content=body,
        headers={"content-type": "multipart/form-data; boundary=a"},
    )
    assert answer.status_code == 400
    assert [call for call in database.calls if call[0] == "finish_part"] == [("finish_part", 2, 5)]


def test_file_that_is_deleted_while_its_checksum_is_made() -> None:
    """What is left of it says nothing about what the client has sent."""
    answer = post(Played(get=None, complete=UPLOAD, read_piece=b""), "/v1/uploads/upload_1/complete", json=WRONG)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize("was", [None, UPLOAD])
def test_wrong_checksum(was: File | None) -> None:
    """A file with another checksum is not made; one that was made before is not lost for a call with a wrong one."""
    database = Played(get=was, complete=UPLOAD, read_piece=lambda _, at: b"12345"[at:])
    answer = post(database, "/v1/uploads/upload_1/complete", json=WRONG)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "md5")
    assert [call[0] for call in database.calls if call[0] == "discard"] == ([] if was else ["discard"])


def test_file_that_was_given_up_while_it_arrived() -> None:
    """A file that takes longer than a day to arrive is told so, and is no fault of ours."""
    form = {"purpose": (None, "batch"), "file": ("a", b"12345")}
    answer = post(Played(add_piece=PartGoneError()), "/v1/files", files=form)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert files.ARRIVING_S == 86_400


def test_a_list_of_files_waits_for_the_own_ones_alone() -> None:
    """Output files of other tenants' batches that have just ended are measured without their callers."""
    database = Played(unmeasured=[], page=[])
    answer = call(database, "GET", "/v1/files", Caller("ann", "ann", Role.READ))
    assert (answer.status_code, answer.json()["data"]) == (200, [])
    assert [each for name, *each in database.calls if name == "unmeasured"] == [[content.BATCHES, "ann"]]


def test_what_is_too_large_is_called_what_it_is() -> None:
    """A part is not called a file, whose limit is another."""
    nowhere: Any = None
    for what in ("file", "part"):
        with pytest.raises(ApiError, match=f"bytes of the {what}: 5, at most 4 are allowed"):
            asyncio.run(PartWriter(nowhere, 1, 4, what).add(b"12345"))


@pytest.mark.parametrize("count", ["0", "1", "-1", "a", "9" * 5000, "\xb2", "\xff"])
def test_what_is_no_count_of_retries(count: str) -> None:
    """Whatever a header says about how often a request was sent before, it is answered as any other."""
    asked = {"input_file_id": "file-1", "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    headers = {"x-stainless-retry-count": count.encode("latin-1")}
    answer = post(Played(read_piece=b"", create=None), "/v1/batches", json=asked, headers=headers)
    assert (answer.status_code, answer.json()["error"]["message"]) == (404, "file 'file-1' does not exist")
