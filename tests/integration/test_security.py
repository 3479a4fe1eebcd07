"""Access control as real clients see it: TLS, client certificates, tokens, roles, limits.

A worker and a watchdog that require client certificates; a `front` gateway with TLS and tokens, and a `strict` one that
requires client certificates, has no reflection and allows five calls a second per client.
"""

import asyncio
import json
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from service.auth import tokens
from service.auth.roles import Role
from service.rpc import server as rpc_server
from tests.support.batches import finished, inline, lines, refused
from tests.support.certificates import Authority, replace
from tests.support.ports import free_port
from tests.support.servers import Server, Stack, new_stack
from tests.support.waiting import until
from vllm_batch import CallError, Client
from vllm_batch.channel import open_aio_channel, open_channel
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import batch_service_pb2_grpc, recovery_service_pb2

OK = grpc.StatusCode.OK
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
PERMISSION_DENIED = grpc.StatusCode.PERMISSION_DENIED
RESOURCE_EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED

SERVICES = (
    pb.DESCRIPTOR.services_by_name["BatchService"],
    recovery_service_pb2.DESCRIPTOR.services_by_name["RecoveryService"],
)
METHODS = [f"/{service.full_name}/{method.name}" for service in SERVICES for method in service.methods]
MAY = {
    None: set(),
    Role.READ: {
        *("GetServiceStatus", "GetBatch", "ListBatches", "WatchBatch", "StreamResults", "GetResult", "ListErrors"),
        "ListTenants",
        *("GetStatus", "ListEvents"),
    },
}
MAY[Role.SUBMIT] = MAY[Role.READ] | {"CreateBatch", "UploadBatch", "CancelBatch", "DeleteBatch", "RetryBatch"}
MAY[Role.OPERATE] = MAY[Role.SUBMIT] | {"PauseRecovery", "ResumeRecovery", "ResetBudget"}


@dataclass
class Secured:
    """The processes, their key files, and a token for each role."""

    stack: Stack
    servers: Authority
    clients: Authority
    front_pair: tuple[Path, Path]
    worker_client_ca: Path
    gateway_pair: tuple[Path, Path]
    hashes: Path
    tokens: dict[Role | None, str]
    strict: Server
    worker: Server
    watchdog: Server
    strict_port: int
    watchdog_port: int

    @property
    def front(self) -> str:
        return self.stack.target

    def channel(self, target: str, role: Role | None, *, has_certificate: bool = False) -> grpc.Channel:
        """A channel with a connection of its own and the token of a role."""
        certificate, key = map(str, self.clients.issue()) if has_certificate else ("", "")
        return open_channel(
            target,
            tls_ca=str(self.servers.file),
            tls_cert=certificate,
            tls_key=key,
            token=self.tokens[role],
            options=(("grpc.use_local_subchannel_pool", 1),),
        )

    def client(self, role: Role, target: str = "", **more: object) -> Client:
        return Client(target or self.front, 0, tls_ca=str(self.servers.file), token=self.tokens[role], **more)


@pytest.fixture(scope="module")
def secured(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """All processes, running until the last test of this file."""
    folder = tmp_path_factory.mktemp("secured")
    servers, clients = Authority(folder, "servers"), Authority(folder, "clients")
    worker_client_ca = folder / "worker-clients.pem"
    worker_client_ca.write_bytes(clients.file.read_bytes())
    front, gateway, other = servers.issue(), clients.issue("gate.test"), servers.issue()
    secrets: dict[Role | None, str] = {None: ""}
    text = "# who may call\n\n"
    for role in Role:
        secrets[role], token = tokens.new(f"{role}er", role, "users")
        text += token.line() + "\n"
    text += "gate.test gateway certificate\nci.test submit certificate users\nqa.test read certificate\n"
    hashes = folder / "hashes"
    hashes.touch(0o600)
    hashes.write_text(text)
    common = {"tls_ca": servers.file, "tls_cert": gateway[0], "tls_key": gateway[1], "token_hashes": hashes}
    theirs = common | {"server_cert": other[0], "server_key": other[1]}
    with new_stack(postgres, folder) as stack:
        # Some tests make more calls than a client would.
        stack.gateway(server_cert=front[0], server_key=front[1], rate_limit_per_s=1000, **common)
        strict_port, watchdog_port = free_port(), free_port()
        strict = stack.run(
            "service.gateway",
            "strict",
            **theirs | {"gateway_port": strict_port, "client_ca": clients.file},
            reflection="false",
            rate_limit_per_s=5,
        )
        worker = stack.worker(client_ca=worker_client_ca, **theirs)
        watchdog = stack.run("watchdog", "watchdog", watchdog_port=watchdog_port, **theirs)
        found = Secured(
            stack, servers, clients, front, worker_client_ca, gateway, hashes, secrets,
            strict, worker, watchdog, strict_port, watchdog_port,
        )  # fmt: skip
        until(lambda: is_serving(found, found.front), "the gateway to accept new work")
        until(lambda: is_serving(found, f"127.0.0.1:{strict_port}"), "the strict gateway to accept new work")
        until(lambda: health(found.channel(f"127.0.0.1:{watchdog_port}", None), "") is OK, "the watchdog to answer")
        yield found


@pytest.fixture(scope="module")
def patient_watcher(secured: Secured) -> Iterator[Callable[[], float]]:
    """Opens an idle stream with our own keepalive. Returns a function that gives its age, or fails if it broke."""
    begin = time.monotonic()
    with open_channel(
        secured.front, tls_ca=str(secured.servers.file), token="", options=rpc_server.CHANNEL_OPTIONS
    ) as channel:
        answers = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=300)

        def read() -> None:
            with suppress(grpc.RpcError):
                list(answers)

        threading.Thread(target=read, daemon=True).start()

        def lasted_s() -> float:
            assert answers.is_active(), answers
            return time.monotonic() - begin

        yield lasted_s
        answers.cancel()


def health(channel: grpc.Channel, service: str = "vllm_batch.v1.BatchService") -> grpc.StatusCode:
    """OK for any answer, otherwise the status that the check failed with. Closes the channel."""
    with channel:
        try:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
        except grpc.RpcError as error:
            return error.code()
    return OK


def is_serving(secured: Secured, target: str) -> bool:
    with secured.channel(target, None, has_certificate=True) as channel:
        request = health_pb2.HealthCheckRequest(service="vllm_batch.v1.BatchService")
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=10)
        except grpc.RpcError:
            return False
    return answer.status == health_pb2.HealthCheckResponse.SERVING


def outcome(channel: grpc.Channel, method: str) -> tuple[grpc.StatusCode, str]:
    """The code and reason that a call with an empty request ends with."""
    try:
        for _ in channel.stream_stream(method)(iter([b""]), timeout=30):
            pass
    except grpc.RpcError as error:
        return error.code(), CallError(error).reason
    return OK, ""


def listing(channel: grpc.Channel) -> CallError | None:
    try:
        batch_service_pb2_grpc.BatchServiceStub(channel).ListBatches(pb.ListBatchesRequest(), timeout=30)
    except grpc.RpcError as error:
        return CallError(error)
    return None


def test_batch_over_tls(secured: Secured, patient_watcher: object) -> None:
    """A batch goes over TLS through gateway and worker, which logs the caller's own name, and can be read back."""
    with secured.client(Role.SUBMIT) as client:
        uploaded = client.submit_lines(lines(20))
        assert finished(client, uploaded.id).counts.completed == 20
    with secured.channel(secured.front, Role.SUBMIT) as channel:
        request = pb.InlineRequest(
            custom_id="a", url="/v1/chat/completions", body_json='{"model":"tiny","messages":[]}'
        )
        created = batch_service_pb2_grpc.BatchServiceStub(channel).CreateBatch(
            pb.CreateBatchRequest(requests=[request]), timeout=30
        )
    with secured.client(Role.READ) as client:
        assert finished(client, created.batch.id).counts.completed == 1
        assert len(list(client.results(uploaded.id))) == 20
    assert {event.get("caller") for event in secured.worker.events("batch_stored")} == {"submiter"}


def test_asyncio_client(secured: Secured) -> None:
    """The asyncio client uses TLS and the token for every kind of call."""

    async def run() -> tuple[int, int, int]:
        async with open_aio_channel(
            secured.front, tls_ca=str(secured.servers.file), token=secured.tokens[Role.SUBMIT]
        ) as channel:
            stub = batch_service_pb2_grpc.BatchServiceStub(channel)

            async def pieces() -> object:
                yield pb.UploadBatchRequest(options=pb.BatchOptions())
                yield pb.UploadBatchRequest(data=b"".join(lines(3)))
                yield pb.UploadBatchRequest(end=pb.UploadEnd())

            batch = (await stub.UploadBatch(pieces(), timeout=30)).batch
            states = [r.batch.state async for r in stub.WatchBatch(pb.WatchBatchRequest(batch_id=batch.id), timeout=60)]
            listed = await stub.ListBatches(pb.ListBatchesRequest(), timeout=30)
            info = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=30
            )
            names = [len(answer.list_services_response.service) async for answer in info]
            return states[-1], len(listed.batches) > 0, names[0]

    assert asyncio.run(run()) == (pb.BATCH_STATE_COMPLETED, True, 5)


def test_status_needs_a_token_that_may_read(secured: Secured) -> None:
    """The status requires a token with the read role, and without one `accepting` says that it is missing."""
    with Client(secured.front, 0, tls_ca=str(secured.servers.file), token="") as stranger:
        error = refused(stranger.service_status)
        assert (error.code, error.reason) == (UNAUTHENTICATED, "TOKEN_MISSING")
        assert stranger.accepting() == error.message
    with secured.client(Role.READ) as reader:
        assert list(reader.service_status().models) == ["tiny"]
        assert reader.accepting() == ""


def test_server_that_is_not_known(secured: Secured, tmp_path: Path) -> None:
    """A client refuses a server whose certificate another authority issued, and a TLS server refuses plain text."""
    stranger = Authority(tmp_path, "stranger")
    assert health(open_channel(secured.front, tls_ca=str(stranger.file), token="")) is UNAVAILABLE
    assert health(open_channel(secured.front, tls_ca="", token="")) is UNAVAILABLE
    assert health(secured.channel(secured.front, None)) is OK


def test_certificates_are_rotated_without_restart(secured: Secured, tmp_path: Path) -> None:
    """New connections get a rotated certificate, existing ones continue, and a pair that does not match is ignored."""
    before = tuple(path.read_bytes() for path in secured.front_pair)
    new = Authority(tmp_path, "new")

    def connect(authority: Authority) -> grpc.StatusCode:
        own_connection = (("grpc.use_local_subchannel_pool", 1),)
        return health(open_channel(secured.front, tls_ca=str(authority.file), token="", options=own_connection))

    with secured.channel(secured.front, Role.READ) as old:
        assert listing(old) is None
        replace(secured.front_pair, new.issue())
        assert (connect(new), connect(secured.servers)) == (OK, UNAVAILABLE)
        assert listing(old) is None
        gateway = secured.stack.servers[0]
        already = len(gateway.events("change_refused"))
        # Half of the next rotation: a certificate whose key is not there yet.
        replace(secured.front_pair[:1], secured.servers.issue()[:1])  # type: ignore[arg-type]
        assert connect(new) is OK
        assert len(gateway.events("change_refused")) == already + 1
        replace(secured.front_pair, secured.servers.issue(is_expired=True))
        assert (connect(new), connect(secured.servers)) == (UNAVAILABLE, UNAVAILABLE)
    for path, content in zip(secured.front_pair, before, strict=True):
        path.write_bytes(content)
    assert (connect(new), connect(secured.servers)) == (UNAVAILABLE, OK)


def test_client_certificates(secured: Secured, tmp_path: Path) -> None:
    """Where client certificates are required, only a valid one from the right authority is accepted."""
    target = f"127.0.0.1:{secured.strict_port}"

    def connect(pair: tuple[Path, Path] | None) -> grpc.StatusCode:
        certificate, key = map(str, pair) if pair else ("", "")
        ca = str(secured.servers.file)
        return health(open_channel(target, tls_ca=ca, tls_cert=certificate, tls_key=key, token=""))

    assert connect(secured.clients.issue()) is OK
    assert connect(None) is UNAVAILABLE
    assert connect(secured.clients.issue(is_expired=True)) is UNAVAILABLE
    assert connect(Authority(tmp_path, "other").issue()) is UNAVAILABLE


@pytest.mark.parametrize("role", list(MAY), ids=str)
def test_each_role_against_each_method(secured: Secured, role: Role | None) -> None:
    """At gateway, worker and watchdog a token may call exactly the methods of its role, and none without a token."""
    let_in = set()
    for target in (secured.front, f"127.0.0.1:{secured.worker.port}", f"127.0.0.1:{secured.watchdog_port}"):
        with secured.channel(target, role, has_certificate=True) as channel:
            for method in METHODS:
                code, reason = outcome(channel, method)
                name = method.rpartition("/")[2]
                if code is grpc.StatusCode.UNIMPLEMENTED:
                    continue
                is_refused = code in (UNAUTHENTICATED, PERMISSION_DENIED)
                assert is_refused is (name not in MAY[role]), (target, method, code)
                if is_refused:
                    assert reason == ("ROLE_MISSING" if role else "TOKEN_MISSING")
                else:
                    let_in.add(name)
    assert let_in == MAY[role]


def test_certificate_instead_of_a_token(secured: Secured) -> None:
    """A certificate that the file names has its role and tenant; the gateway's alone may say whose call it forwards."""
    gateway, worker = (f"127.0.0.1:{port}" for port in (secured.strict_port, secured.worker.port))

    def stub(target: str, *pair: Path) -> batch_service_pb2_grpc.BatchServiceStub:
        certificate, key = map(str, pair)
        ca, own = str(secured.servers.file), (("grpc.use_local_subchannel_pool", 1),)
        return batch_service_pb2_grpc.BatchServiceStub(
            open_channel(target, tls_ca=ca, tls_cert=certificate, tls_key=key, token="", options=own)
        )

    def failure(call: Callable[..., object], *given: object, **more: object) -> CallError:
        with pytest.raises(grpc.RpcError) as caught:
            call(*given, timeout=30, **more)
        return CallError(caught.value)

    ci, qa, unknown = (secured.clients.issue(name) for name in ("ci.test", "qa.test", "other.test"))
    forged = ((tokens.CALLER_HEADER, "ci.test"),)
    created = stub(gateway, *ci).CreateBatch(inline(), timeout=30).batch
    assert created.tenant == "users"
    assert {event.get("caller") for event in secured.worker.events("batch_stored")} >= {"ci.test"}
    read = pb.GetBatchRequest(batch_id=created.id)
    assert stub(gateway, *ci).GetBatch(read, timeout=30).batch.id == created.id
    assert failure(stub(gateway, *qa).GetBatch, read).code is grpc.StatusCode.NOT_FOUND
    for target in (gateway, worker):
        error = failure(stub(target, *qa).CreateBatch, inline(), metadata=forged)
        assert (error.code, error.reason) == (PERMISSION_DENIED, "ROLE_MISSING")
        error = failure(stub(target, *unknown).CreateBatch, inline(), metadata=forged)
        assert (error.code, error.reason) == (UNAUTHENTICATED, "TOKEN_MISSING")


def test_wrong_tokens(secured: Secured) -> None:
    """Unknown tokens are rejected, and adding or revoking a token takes effect at the next call."""
    ca = str(secured.servers.file)
    for wrong in ("vbt_wrong", secured.tokens[Role.READ][:-1], f"{secured.tokens[Role.READ]}x"):
        with open_channel(secured.front, tls_ca=ca, token=wrong) as channel:
            error = listing(channel)
            assert error is not None
            assert (error.code, error.reason) == (UNAUTHENTICATED, "TOKEN_WRONG")
    secret, token = tokens.new("guest", Role.READ)
    with open_channel(secured.front, tls_ca=ca, token=secret) as channel:
        assert listing(channel) is not None
        text = secured.hashes.read_text()
        secured.hashes.write_text(text + token.line() + "\n")
        assert listing(channel) is None
        secured.hashes.write_text(text)
        assert listing(channel) is not None


def test_health_is_open_and_reflection_is_not(secured: Secured) -> None:
    """Health needs no token, reflection needs one, and a server with reflection disabled does not offer it."""
    method = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    strict = f"127.0.0.1:{secured.strict_port}"
    for target in (secured.front, strict, f"127.0.0.1:{secured.watchdog_port}"):
        assert health(secured.channel(target, None, has_certificate=True), "") is OK
    for target in (secured.front, f"127.0.0.1:{secured.watchdog_port}"):
        with secured.channel(target, None, has_certificate=True) as channel:
            assert outcome(channel, method) == (UNAUTHENTICATED, "TOKEN_MISSING")
        with secured.channel(target, Role.READ, has_certificate=True) as channel:
            assert outcome(channel, method)[0] is OK
    with secured.channel(strict, Role.OPERATE, has_certificate=True) as channel:
        assert outcome(channel, method)[0] is grpc.StatusCode.UNIMPLEMENTED


def test_oversized_messages_and_metadata(secured: Secured) -> None:
    """Messages and metadata over the limits are rejected with RESOURCE_EXHAUSTED, and the server keeps working."""
    large = pb.CreateBatchRequest(options=pb.BatchOptions(request_id="x" * rpc_server.MAX_MESSAGE_BYTES))
    with secured.client(Role.SUBMIT) as client:
        stub = client._stub
        error = refused(lambda: client._retry(lambda: stub.CreateBatch(large, timeout=60)))
        assert error.code is RESOURCE_EXHAUSTED
        metadata = (("x-large", "x" * 20_000),)
        error = refused(lambda: client._retry(lambda: stub.ListBatches(pb.ListBatchesRequest(), metadata=metadata)))
        assert error.code is RESOURCE_EXHAUSTED
        assert list(client.list())


def frame(kind: int, flags: int, payload: bytes) -> bytes:
    """An HTTP/2 frame on stream 0 (RFC 9113, 4.1)."""
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + b"\0\0\0\0" + payload


def test_who_pings_too_often_is_cut_off(secured: Secured) -> None:
    """A flood of pings ends that connection with ENHANCE_YOUR_CALM, and others still work."""
    context = ssl.create_default_context(cafile=str(secured.servers.file))
    context.set_alpn_protocols(["h2"])
    address = ("127.0.0.1", secured.stack.gateway_port)
    with (
        socket.create_connection(address, timeout=30) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, b""))
        connection.sendall(b"".join(frame(6, 0, struct.pack(">Q", number)) for number in range(20)))
        received = b""
        while part := connection.recv(65536):
            received += part
    # GOAWAY, then the last stream, then the code 11.
    assert b"\x07\x00\x00\x00\x00\x00" in received
    assert b"\x00\x00\x00\x0btoo_many_pings" in received
    assert health(secured.channel(secured.front, None)) is OK


def test_rate_limit(secured: Secured) -> None:
    """A client over the rate limit is told how long to wait; others are served, and a retrying client succeeds."""
    target = f"127.0.0.1:{secured.strict_port}"
    certificate, key = map(str, secured.clients.issue())
    with secured.channel(target, Role.READ, has_certificate=True) as channel:
        until(lambda: listing(channel) is not None, "the rate limit to apply")
        error = listing(channel)
        while error is None:
            error = listing(channel)
        assert (error.code, error.reason) == (RESOURCE_EXHAUSTED, "RATE_LIMITED")
        assert 0 < (error.retry_delay_s or 0) <= 1
    with secured.channel(target, Role.SUBMIT, has_certificate=True) as channel:
        assert listing(channel) is None
    for _ in range(20):
        assert health(secured.channel(target, None, has_certificate=True)) is OK
    waits: list[float] = []
    with Client(
        target,
        30,
        lambda _, delay_s: waits.append(delay_s),
        tls_ca=str(secured.servers.file),
        tls_cert=certificate,
        tls_key=key,
        token=secured.tokens[Role.READ],
    ) as patient:
        while not waits:
            list(patient.list(limit=1))


def test_gateway_calls_with_its_newest_certificate(secured: Secured, tmp_path: Path) -> None:
    """The gateway connects with its renewed certificate, without a restart, to a worker with a new client CA."""
    new = Authority(tmp_path, "new-clients")
    replace(secured.gateway_pair, new.issue())
    secured.worker_client_ca.write_bytes(new.file.read_bytes())
    # Only new connections use the new certificate.
    secured.worker.kill()
    secured.worker.start()
    with secured.client(Role.SUBMIT) as client:

        def submits() -> bool:
            try:
                return bool(client.submit_lines(lines(1)).id)
            except CallError as error:
                if error.code is UNAVAILABLE:
                    return False
                raise

        until(submits, "the gateway to reach the worker")


def test_secrets_are_nowhere_to_be_seen(secured: Secured) -> None:
    """No token and no token hash appears in any log or process list."""
    secrets = [secret for secret in secured.tokens.values() if secret]
    secrets += [tokens.digest(secret).hex() for secret in secrets]
    logs = "".join(log.read_text() for log in secured.stack.folder.glob("*.log"))
    refusals = [json.loads(line) for line in logs.splitlines() if '"call_refused"' in line]
    assert {"TOKEN_MISSING", "TOKEN_WRONG", "ROLE_MISSING"} <= {refusal["reason"] for refusal in refusals}
    commands = " ".join(" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"]))
    for secret in secrets:
        assert secret not in logs
        assert secret not in commands


def test_our_own_keepalive_is_let_through(secured: Secured, patient_watcher: Callable[[], float]) -> None:
    """A client that pings every 5 s while idle, as ours do, keeps its connection."""
    # A third ping that came too early, after 15 s, would have ended it.
    until(lambda: patient_watcher() > 17, "three pings")
