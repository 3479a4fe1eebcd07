"""OpenAI's door with the openai package as it is: files, their content, ranges, pages, deletion."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import httpx
import openai
import pytest
from openai import OpenAI

from tests.support.batches import count
from tests.support.servers import Stack
from tests.support.waiting import until


@pytest.fixture
def client(door: Stack) -> Iterator[OpenAI]:
    with OpenAI(base_url=door.base_url, api_key="none", max_retries=0) as client:
        yield client


def test_file_goes_up_and_comes_down(client: OpenAI) -> None:
    """A file of several pieces is the same when it is read back, whole and by any range of bytes."""
    content = bytes(range(256)) * 10_000
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    assert (file.filename, file.bytes, file.purpose, file.status) == ("in.jsonl", len(content), "batch", "processed")
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == content
    url = f"{client.base_url}files/{file.id}/content"
    for first, last in ((0, 0), (1, 1 << 20), ((1 << 20) - 1, (1 << 20) + 1), (len(content) - 1, len(content) + 9)):
        got = httpx.get(url, headers={"range": f"bytes={first}-{last}"})
        assert (got.status_code, got.content) == (206, content[first : last + 1])
        assert got.headers["content-range"] == f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
    assert httpx.get(url, headers={"range": "bytes=-5"}).content == content[-5:]
    assert httpx.get(url, headers={"range": "bytes=7-", "if-range": '"another"'}).content == content
    refused = httpx.get(url, headers={"range": f"bytes={len(content)}-"})
    assert (refused.status_code, refused.headers["content-range"]) == (416, f"bytes */{len(content)}")


def test_pages_of_files(client: OpenAI) -> None:
    """Pages go on where the last one ended, in both orders, until all files were seen once."""
    made = [client.files.create(file=(f"{i}.jsonl", b"{}"), purpose="batch").id for i in range(5)]
    seen = [file.id for file in client.files.list(limit=2, purpose="batch")]
    assert [name for name in seen if name in made] == made[::-1]
    assert len(seen) == len(set(seen))
    assert [file.id for file in client.files.list(limit=2, order="asc") if file.id in made] == made
    page = client.files.list(limit=1)
    assert (page.object, page.has_more) == ("list", True)


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_files_are_deleted_while_they_are_listed(client: OpenAI, door: Stack, order: Literal["asc", "desc"]) -> None:
    """Who deletes each file that a list names gets through the list, also once nothing is left of the deleted ones."""
    made = [client.files.create(file=(f"{i}.jsonl", b"{}"), purpose="batch").id for i in range(5)]
    seen = []
    for file in client.files.list(limit=2, purpose="batch", order=order):
        seen.append(file.id)
        if file.id in made:
            client.files.delete(file.id)
            if file.id == made[2]:
                number = file.id.removeprefix("file-")
                until(lambda number=number: not count(door, f"files WHERE id = {number}"), "the file to be removed")
    assert [name for name in seen if name in made] == (made if order == "asc" else made[::-1])
    assert len(seen) == len(set(seen))
    with pytest.raises(openai.NotFoundError):
        client.files.list(after="file-output-1")


def test_file_that_is_deleted_is_gone(client: OpenAI, door: Stack) -> None:
    """What is deleted is a 404 at once, and its pieces are removed soon after; a second delete finds nothing."""
    file = client.files.create(file=("in.jsonl", b"x" * (3 << 20)), purpose="batch")
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)
    with pytest.raises(openai.NotFoundError):
        client.files.delete(file.id)
    number = file.id.removeprefix("file-")
    until(lambda: not count(door, f"files WHERE id = {number}"), "the file to be removed")
    assert not count(door, f"file_parts p JOIN file_pieces c ON c.part_id = p.id WHERE p.file_id = {number}")


def test_expiry(client: OpenAI, door: Stack) -> None:
    """A file expires when its client said, else after the retention; what has expired is gone."""
    file = client.files.create(
        file=("in.jsonl", b"{}"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert file.expires_at is not None
    assert file.expires_at - file.created_at == 3600
    kept = client.files.create(file=("in.jsonl", b"{}"), purpose="batch")
    assert kept.expires_at is not None
    assert kept.expires_at - kept.created_at == 30 * 86_400


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"data": {"purpose": "batch"}, "files": {"other": ("a", b"x")}}, "other"),
        (
            {"data": {"purpose": "batch", "expires_after[seconds]": "7"}, "files": {"file": ("a", b"x")}},
            "expires_after",
        ),
        ({"data": {"purpose": "vision"}, "files": {"file": ("a", b"x")}}, "purpose"),
        ({"data": {}, "files": {"file": ("a", b"x")}}, "purpose"),
        ({"json": {}}, "content-type"),
        ({"content": b"--x\r\n", "headers": {"content-type": "multipart/form-data; boundary=x"}}, "body"),
    ],
)
def test_form_that_is_wrong(form: dict[str, object], param: str, door: Stack) -> None:
    """A form with anything wrong is refused, naming it, and leaves no file."""
    before = count(door, "files WHERE state = 'kept'")
    answer = httpx.post(f"{door.base_url}/files", **form)  # type: ignore[arg-type]
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert param in error["param"]
    assert count(door, "files WHERE state = 'kept'") == before


def test_errors_are_those_of_openai(client: OpenAI) -> None:
    """Each error has the object and the id that OpenAI's have, also on paths that do not exist."""
    with pytest.raises(openai.NotFoundError) as caught:
        client.files.retrieve("file-123456", extra_headers={"x-request-id": "mine"})
    assert caught.value.request_id == "mine"
    assert caught.value.body == {
        "message": "file 'file-123456' does not exist",
        "type": "invalid_request_error",
        "param": None,
        "code": "not_found",
    }
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve("nonsense")
    with pytest.raises(openai.BadRequestError) as wrong:
        client.files.list(limit=0)
    assert wrong.value.param == "limit"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.get("/nothing", cast_to=object)
    assert unknown.value.code == "unknown_url"


def test_upload_that_breaks_off(door: Stack) -> None:
    """A client that goes away in the middle of a file leaves nothing behind."""

    def broken() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        yield b"y" * (3 << 20)
        raise ConnectionError("the client goes away")

    headers = {"content-type": "multipart/form-data; boundary=x"}
    with pytest.raises(ConnectionError):
        httpx.post(f"{door.base_url}/files", content=broken(), headers=headers)
    until(lambda: not count(door, "files WHERE state = 'arriving'"), "the file to be given up")
    assert (Path(door.folder) / "http.log").read_text().count("call_failed") == 0
