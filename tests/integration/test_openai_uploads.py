"""OpenAI's door with the openai package as it is: uploads in parts; tokens, TLS, limits; no Postgres; its document."""

import hashlib
import json
import ssl
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import settings
from openai import OpenAI

from service.auth import new_token, tokens
from tests.conftest import IS_THOROUGH
from tests.support import documented
from tests.support.batches import count, line, lines, run_sql
from tests.support.certificates import Authority, replace
from tests.support.ports import free_port
from tests.support.servers import PostgresServer, Stack
from tests.support.waiting import until

# Of calls and of sequences of calls, each of which takes long.
MADE_UP = settings.default.max_examples // 4 if IS_THOROUGH else 8


@pytest.fixture
def client(door: Stack) -> Iterator[OpenAI]:
    with OpenAI(base_url=door.base_url, api_key="none", max_retries=0) as client:
        yield client


def test_file_in_parts(client: OpenAI, tmp_path: Path) -> None:
    """What the SDK uploads in parts is one file, whose checksum the server confirms."""
    content = bytes(range(256)) * 20_000
    source = tmp_path / "in.jsonl"
    source.write_bytes(content)
    upload = client.uploads.upload_file_chunked(
        file=source,
        mime_type="application/jsonl",
        purpose="batch",
        part_size=(1 << 20) + 17,
        md5=hashlib.md5(content).hexdigest(),
    )
    assert (upload.status, upload.bytes) == ("completed", len(content))
    assert upload.file is not None
    assert upload.file.filename == "in.jsonl"
    assert client.files.content(upload.file.id).read() == content
    url = f"{client.base_url}files/{upload.file.id}/content"
    edge = 2 * ((1 << 20) + 17)
    got = httpx.get(url, headers={"range": f"bytes={edge - 3}-{edge + 2}"})
    assert got.content == content[edge - 3 : edge + 3]


def test_parts_in_another_order(client: OpenAI, door: Stack) -> None:
    """The order is that of the call that completes it, which may be repeated; parts that it leaves out are removed."""
    upload = client.uploads.create(bytes=4, filename="a", mime_type="text/plain", purpose="batch")
    parts = [client.uploads.parts.create(upload.id, data=data) for data in (b"34", b"12", b"no")]
    assert parts[0].upload_id == upload.id
    order = [parts[1].id, parts[0].id]
    done = client.uploads.complete(upload.id, part_ids=order)
    assert client.uploads.complete(upload.id, part_ids=order) == done
    assert done.file is not None
    assert client.files.content(done.file.id).read() == b"1234"
    with pytest.raises(openai.BadRequestError):
        client.uploads.complete(upload.id, part_ids=[parts[0].id])
    with pytest.raises(openai.NotFoundError):
        client.uploads.parts.create(upload.id, data=b"late")
    left_out = parts[2].id.removeprefix("part_")
    until(lambda: not count(door, f"file_parts WHERE id = {left_out}"), "the part that was left out to go")


def test_upload_that_does_not_fit(client: OpenAI) -> None:
    """An upload of another size, of unknown parts or with another checksum makes no file."""
    upload = client.uploads.create(bytes=3, filename="a", mime_type="text/plain", purpose="batch")
    part = client.uploads.parts.create(upload.id, data=b"12")
    for part_ids in ([part.id], [part.id, part.id], ["part_123456"], ["nonsense"], []):
        with pytest.raises(openai.BadRequestError):
            client.uploads.complete(upload.id, part_ids=part_ids)
    last = client.uploads.parts.create(upload.id, data=b"3")
    with pytest.raises(openai.BadRequestError) as wrong:
        client.uploads.complete(upload.id, part_ids=[part.id, last.id], md5="0" * 32)
    assert wrong.value.param == "md5"
    with pytest.raises(openai.BadRequestError):
        client.uploads.create(bytes=9 << 30, filename="a", mime_type="text/plain", purpose="batch")


def test_upload_that_is_given_up(client: OpenAI, door: Stack) -> None:
    """An upload that is cancelled, or not completed in time, is gone with its parts."""
    upload = client.uploads.create(bytes=3, filename="a", mime_type="text/plain", purpose="batch")
    client.uploads.parts.create(upload.id, data=b"123")
    assert client.uploads.cancel(upload.id).status == "cancelled"
    late = client.uploads.create(bytes=3, filename="a", mime_type="text/plain", purpose="batch")
    part = client.uploads.parts.create(late.id, data=b"123")
    assert late.expires_at - late.created_at == 3600
    number = late.id.removeprefix("upload_")
    run_sql(door, f"UPDATE files SET expire_time = now() WHERE id = {number}")
    with pytest.raises(openai.NotFoundError):
        client.uploads.complete(late.id, part_ids=[part.id])
    until(lambda: not count(door, f"files WHERE id IN ({number}, {upload.id.removeprefix('upload_')})"), "both to go")


def test_document_and_health(door: Stack) -> None:
    """The document names every operation; health needs no token."""
    base = door.base_url.removesuffix("/v1")
    document = httpx.get(f"{base}/openapi.json").json()
    names = {one["operationId"] for path in document["paths"].values() for one in path.values()}
    assert len(names) == 15
    assert {"CreateFile", "GetFileContent", "CompleteUpload", "CreateBatch", "ListModels"} <= names
    assert httpx.get(f"{base}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{base}/readyz").status_code == 200


def test_calls_made_up_from_the_document(client: OpenAI, door: Stack) -> None:
    """Whatever is sent to any operation, also with ids that exist, the answer is one of the document and no 5xx."""
    schema = documented.read(f"{door.base_url.removesuffix('/v1')}/openapi.json")
    files = [client.files.create(file=("in.jsonl", line("a")), purpose="batch").id for _ in range(3)]
    batch = client.batches.create(input_file_id=files[0], endpoint="/v1/chat/completions", completion_window="24h")
    upload = client.uploads.create(bytes=3, filename="a", mime_type="text/plain", purpose="batch")
    real = {"file_id": files[1], "input_file_id": files[2], "batch_id": batch.id, "upload_id": upload.id}
    each = documented.call_each(schema, real, MADE_UP)
    assert len({operation for operation, _ in each}) == 15
    in_turn = documented.call_in_turn(schema, MADE_UP)
    # Some have found what they asked for.
    assert any("{" in operation and status == 200 for operation, status in each + in_turn)
    assert not [event for server in door.servers for event in server.events("call_failed")]
    assert all(server.process.poll() is None for server in door.servers)


def test_methods_that_are_not_there(door: Stack) -> None:
    """Who uses a method that a path does not have is told all that it has."""
    for path, allowed in (
        ("files", "GET, HEAD, POST"),
        ("files/file-1", "DELETE, GET, HEAD"),
        ("batches/batch_1/cancel", "POST"),
    ):
        answer = httpx.put(f"{door.base_url}/{path}")
        assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
        assert answer.json()["error"]["code"] == "method_not_allowed"
        assert answer.headers["x-request-id"]


def test_head_is_get_without_the_body(client: OpenAI, door: Stack) -> None:
    """HEAD, as download tools and load balancers send it, has the status and headers of GET, ranges included."""
    file = client.files.create(file=("in.jsonl", line("a")), purpose="batch")
    base = door.base_url.removesuffix("/v1")
    for path in (f"/v1/files/{file.id}", f"/v1/files/{file.id}/content", "/v1/files/file-1", "/v1/models", "/healthz"):
        for headers in ({}, {"range": "bytes=0-3"}, {"range": "bytes=9999-"}):
            head, get = (call(base + path, headers=headers) for call in (httpx.head, httpx.get))
            assert (head.status_code, head.content) == (get.status_code, b"")
            for name in ("content-length", "content-type", "content-range", "etag", "accept-ranges"):
                assert head.headers.get(name) == get.headers.get(name)


def test_bodies_are_limited(door: Stack) -> None:
    """What is read as a whole is never larger than a few MiB, whether its size is announced or not."""
    large = b'{"input_file_id": "' + b"x" * (5 << 20) + b'"}'
    headers = {"content-type": "application/json"}
    assert httpx.post(f"{door.base_url}/batches", content=large, headers=headers).status_code == 413
    unannounced = httpx.post(f"{door.base_url}/batches", content=iter([large]), headers=headers)
    assert unannounced.status_code == 413
    assert set(unannounced.json()["error"]) == {"message", "type", "param", "code"}
    wrong = httpx.post(f"{door.base_url}/batches", content=b"{", headers=headers)
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (400, "invalid_request_error")
    surrogate = b'{"input_file_id": "\\ud800", "endpoint": "e", "completion_window": "24h"}'
    for body in (b'{"input_file_id": 1}', b"[]", b"", surrogate):
        assert httpx.post(f"{door.base_url}/batches", content=body, headers=headers).status_code in (400, 404)


def test_compressed_bodies_are_refused(door: Stack) -> None:
    """A body that is compressed on its way is refused by name, rather than stored as it arrives."""
    form = {"file": ("a.jsonl", line("a")), "purpose": (None, "batch")}
    for path, how in (("files", {"files": form}), ("batches", {"json": {}})):
        answer = httpx.post(f"{door.base_url}/{path}", headers={"content-encoding": "gzip"}, **how)  # type: ignore[arg-type]
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "content-encoding")


def test_a_part_has_one_file(client: OpenAI, door: Stack) -> None:
    """Two files in one part are refused, rather than stored as one."""
    upload = client.uploads.create(bytes=6, filename="a", mime_type="text/plain", purpose="batch")
    twice = [("data", ("a", b"123")), ("data", ("b", b"456"))]
    answer = httpx.post(f"{door.base_url}/uploads/{upload.id}/parts", files=twice)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "data: is given twice")


def token(folder: Path, name: str, role: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert new_token.main([str(folder / "hashes"), name, role]) == 0
    return capsys.readouterr().out.strip()


def test_tokens_and_limits(stack: Stack, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens, roles and the rate limit are those of the gRPC ports; the worker's log has the id of the create."""
    reader, writer = (token(tmp_path, name, name, capsys) for name in ("read", "submit"))
    stack.http(token_hashes=tmp_path / "hashes", rate_limit_per_s=5)
    worker = stack.worker(token_hashes=tmp_path / "hashes")
    with OpenAI(base_url=stack.base_url, api_key=writer, max_retries=0) as client:
        file = client.files.create(file=("a", line("a")), purpose="batch")
        batch = client.batches.create(
            input_file_id=file.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            extra_headers={"x-request-id": "the-create"},
        )
        for key, kind in ((reader, openai.PermissionDeniedError), ("wrong", openai.AuthenticationError)):
            with pytest.raises(kind) as refused:
                client.with_options(api_key=key).files.delete(file.id)
            assert refused.value.request_id

        def call_often() -> None:
            for _ in range(100):
                client.files.retrieve(file.id)

        with pytest.raises(openai.RateLimitError) as limited:
            call_often()
        assert int(limited.value.response.headers["retry-after-ms"]) > 0
    assert httpx.get(f"{stack.base_url}/files").status_code == 401
    until(lambda: worker.events("batch_stored"), "the worker to begin it")
    [stored] = worker.events("batch_stored")
    assert (stored["call_id"], stored["batch"]) == ("the-create", batch.id)
    log = (stack.folder / "http.log").read_text()
    assert writer not in log
    assert reader not in log


def test_tenants(stack: Stack, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files, uploads and batches of another tenant do not exist, whatever is tried; who operates sees all."""
    one, other = (token(tmp_path, name, "submit", capsys) for name in ("one", "other"))
    operator = token(tmp_path, "root", "operate", capsys)
    stack.gateway(token_hashes=tmp_path / "hashes")
    stack.worker(token_hashes=tmp_path / "hashes")
    tenants = tmp_path / "tenants"
    tenants.write_text("[tenants.other]\nfile_bytes = 10\n")
    stack.http(token_hashes=tmp_path / "hashes", tenants_file=tenants)
    base = stack.base_url.removesuffix("/v1")
    until(lambda: httpx.get(f"{base}/readyz").status_code == 200, "the schema")
    with OpenAI(base_url=stack.base_url, api_key=one, max_retries=0) as client:
        file = client.files.create(file=("a", line("a")), purpose="batch")
        chat: Any = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
        batch = client.batches.create(input_file_id=file.id, **chat)
        until(lambda: client.batches.retrieve(batch.id).status == "completed", "the batch")
        output = str(client.batches.retrieve(batch.id).output_file_id)
        upload = client.uploads.create(bytes=1, filename="a", mime_type="a", purpose="batch")
        part = client.uploads.parts.create(upload.id, data=b"1")
        stranger = client.with_options(api_key=other)
        tried: list[Callable[[], object]] = [
            *(partial(stranger.files.retrieve, name) for name in (file.id, output)),
            *(partial(stranger.files.content, name) for name in (file.id, output)),
            *(partial(stranger.files.delete, name) for name in (file.id, output)),
            lambda: stranger.batches.create(input_file_id=file.id, **chat),
            lambda: stranger.batches.retrieve(batch.id),
            lambda: stranger.batches.cancel(batch.id),
            lambda: stranger.uploads.parts.create(upload.id, data=b"1"),
            lambda: stranger.uploads.complete(upload.id, part_ids=[part.id]),
            lambda: stranger.uploads.cancel(upload.id),
        ]
        for attempt in tried:
            with pytest.raises(openai.NotFoundError):
                attempt()
        assert not list(stranger.files.list())
        assert not list(stranger.batches.list())
        assert {found.id for found in client.files.list()} == {file.id, output}
        stranger.files.create(file=("a", b"12345"), purpose="batch")
        for call in (
            lambda: stranger.files.create(file=("a", b"123456"), purpose="batch"),
            lambda: stranger.uploads.create(bytes=6, filename="a", mime_type="a", purpose="batch"),
        ):
            with pytest.raises(openai.RateLimitError, match="file bytes: 11, at most 10 are allowed, 5 left"):
                call()
        with pytest.raises(openai.APIStatusError) as never:
            stranger.files.create(file=("a", b"1" * 11), purpose="batch")
        assert never.value.status_code == 413
        assert [found.bytes for found in stranger.files.list()] == [5]
        operating = client.with_options(api_key=operator)
        assert operating.files.content(output).read()
        assert [found.id for found in operating.batches.list()] == [batch.id]


def test_tls_with_rotation(stack: Stack, tmp_path: Path) -> None:
    """Certificates are required and replaced as on the gRPC ports, without a restart."""
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    pair, mine = old.issue(), old.issue()
    stack.http(
        server_cert=pair[0], server_key=pair[1], client_ca=old.file, tls_ca=old.file, tls_cert=mine[0], tls_key=mine[1]
    )
    url = f"https://127.0.0.1:{stack.http_port}/healthz"

    def answer(authority: Authority, own: tuple[Path, Path] | None) -> int | None:
        context = ssl.create_default_context(cafile=authority.file)
        if own is not None:
            context.load_cert_chain(*own)
        try:
            return int(urllib.request.urlopen(url, context=context, timeout=5).status)
        except OSError:
            return None

    assert answer(old, mine) == 200
    assert answer(new, mine) is None
    assert answer(old, None) is None
    replace(pair, new.issue())
    until(lambda: answer(new, mine) == 200, "the new certificate")
    assert answer(old, mine) is None


def test_certificate_instead_of_a_token(stack: Stack, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A certificate that the file names has its role and tenant; a token counts more, and no header names another."""
    authority = Authority(tmp_path, "authority")
    pair, writer, reader, gateway, unknown = (
        authority.issue(*names) for names in ((), ("ci.test",), ("qa.test",), ("gate.test",), ("other.test",))
    )
    secret = token(tmp_path, "token", "submit", capsys)
    with (tmp_path / "hashes").open("a") as hashes:
        hashes.write("gate.test gateway certificate\nci.test submit certificate users\nqa.test read certificate\n")
    stack.worker()
    stack.http(
        server_cert=pair[0],
        server_key=pair[1],
        client_ca=authority.file,
        tls_ca=authority.file,
        tls_cert=gateway[0],
        tls_key=gateway[1],
        token_hashes=tmp_path / "hashes",
    )
    context = ssl.create_default_context(cafile=authority.file)

    def status(own: tuple[Path, Path], method: str = "GET", **headers: str) -> int:
        context.load_cert_chain(*own)
        with httpx.Client(base_url=f"https://127.0.0.1:{stack.http_port}/v1", verify=context, headers=headers) as door:
            if method == "GET":
                return door.get("/files").status_code
            return door.post("/files", data={"purpose": "batch"}, files={"file": ("a", line("a"))}).status_code

    until(lambda: status(writer) == 200, "the schema")
    assert status(writer, "POST") == 200
    assert count(stack, "files WHERE tenant = 'users'") == 1
    assert (status(reader), status(reader, "POST")) == (200, 403)
    assert status(unknown) == 401
    assert status(gateway, **{tokens.CALLER_HEADER: "ci.test"}) == 401
    assert status(unknown, authorization=f"Bearer {secret}") == 200
    assert status(writer, authorization="Bearer wrong") == 401
    # A browser sends its certificate by itself.
    assert status(writer, **{"sec-fetch-site": "cross-site"}) == 403


def test_postgres_away(tmp_path: Path) -> None:
    """Without Postgres it is 503 with the time to wait; once it is back, the SDK's own repetition succeeds."""
    server = PostgresServer(tmp_path)
    server.start()
    stack = Stack(server.url % "batch", tmp_path, free_port(), [])
    try:
        stack.worker()
        stack.http()
        with OpenAI(base_url=stack.base_url, api_key="none", max_retries=0) as client:
            base = stack.base_url.removesuffix("/v1")
            until(lambda: httpx.get(f"{base}/readyz").status_code == 200, "the schema")
            file = client.files.create(file=("a", b"".join(lines(3))), purpose="batch")
            server.stop()
            with pytest.raises(openai.InternalServerError) as away:
                client.files.retrieve(file.id)
            assert away.value.status_code == 503
            assert away.value.code == "database_unavailable"
            assert 0 < int(away.value.response.headers["retry-after"]) < 120
            assert httpx.get(f"{base}/healthz").status_code == 200
            # An answer serves everybody for a second.
            until(lambda: httpx.get(f"{base}/readyz").status_code == 503, "the next answer")
            with pytest.raises(openai.InternalServerError):
                client.files.create(file=("a", b"x" * (2 << 20)), purpose="batch")
            server.start()
            again = client.with_options(max_retries=5)
            batch = again.batches.create(
                input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
            )
            until(lambda: client.batches.retrieve(batch.id).status == "completed", "the batch")
            assert json.loads(httpx.get(f"{base}/v1/batches/{batch.id}").content)["request_counts"]["completed"] == 3
    finally:
        stack.end()
        server.stop()
