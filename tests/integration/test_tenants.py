"""Tenants: nobody sees or changes another's batches, and each has its quota."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import message_factory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.api import messages
from service.api.servicer import BatchServicer
from service.auth import tokens
from service.auth.callers import Caller
from service.auth.roles import Role
from service.db.connection import Database
from service.db.limits import Limits
from service.errors import ApiError
from service.rpc import call_context
from tests.conftest import IS_THOROUGH
from tests.support.batches import count, finished, inline, lines, refused
from tests.support.servers import Stack, new_stack
from tests.support.store import stored
from tests.support.waiting import until
from vllm_batch import CallError, Client
from vllm_batch.channel import open_channel
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import batch_service_pb2_grpc

SERVICE = pb.DESCRIPTOR.services_by_name["BatchService"]
MISSING = "batch_999999999"
# Methods that name no batch: what keeps tenants apart there is tested by name below.
WITHOUT_BATCH = {"GetServiceStatus", "CreateBatch", "UploadBatch", "ListBatches", "ListTenants"}
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Shared:
    """A stack for tenants: `alice` with a second token to read, `bob`, `carol`; and an operator."""

    stack: Stack
    tokens: dict[str, str]
    tenants_file: Path

    def client(self, name: str) -> Client:
        return Client(self.stack.target, 0, token=self.tokens[name])

    def stub(self, name: str, target: str = "") -> batch_service_pb2_grpc.BatchServiceStub:
        own_connection = (("grpc.use_local_subchannel_pool", 1),)
        channel = open_channel(target or self.stack.target, token=self.tokens[name], options=own_connection)
        return batch_service_pb2_grpc.BatchServiceStub(channel)


@pytest.fixture(scope="module")
def shared(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """Gateway and worker on loopback, with tokens, until the last test of this file."""
    folder = tmp_path_factory.mktemp("tenants")
    secrets, text = {}, ""
    for name, role, tenant in (
        ("alice", Role.SUBMIT, ""),
        ("alice-reader", Role.READ, "alice"),
        ("bob", Role.SUBMIT, ""),
        ("carol", Role.SUBMIT, ""),
        ("operator", Role.OPERATE, ""),
    ):
        secrets[name], token = tokens.new(name, role, tenant)
        text += token.line() + "\n"
    hashes, tenants_file = folder / "hashes", folder / "tenants.toml"
    hashes.touch(0o600)
    hashes.write_text(text)
    tenants_file.write_text("")
    files = {"token_hashes": hashes, "tenants_file": tenants_file}
    with new_stack(postgres, folder) as stack:
        stack.gateway(**files)
        stack.worker(**files)
        found = Shared(stack, secrets, tenants_file)
        with found.client("operator") as client:
            until(lambda: not client.accepting(), "the gateway to accept new work")
        yield found


@pytest.fixture(scope="module")
def of_alice(shared: Shared) -> dict[str, str]:
    """Batches of alice by what they are."""
    with shared.client("alice") as client:
        ended = client.submit_lines(lines(3)).id
        finished(client, ended)
        running = client.submit_lines(lines(1, vllm_xargs={"simulate": 600})).id
        until(lambda: client.get(running).counts.running, "its request to run")
        return {"ended": ended, "running": running}


def call(stub: Any, method: str, batch_id: str) -> CallError | None:
    """Calls a method with its smallest valid request. None: it succeeded."""
    descriptor = SERVICE.methods_by_name[method]
    fields = {"batch_id": batch_id, "custom_id": "c0"}
    given = {field.name: fields[field.name] for field in descriptor.input_type.fields if field.name in fields}
    request = message_factory.GetMessageClass(descriptor.input_type)(**given)
    try:
        answer = getattr(stub, method)(request, timeout=20)
        if descriptor.server_streaming:
            next(answer, None)
            answer.cancel()
    except grpc.RpcError as error:
        return CallError(error)
    return None


@pytest.mark.parametrize("at", ["gateway", "worker"])
@pytest.mark.parametrize("method", [method.name for method in SERVICE.methods])
def test_batches_of_others_do_not_exist(shared: Shared, of_alice: dict[str, str], method: str, at: str) -> None:
    """Every method that names a batch answers about another tenant's exactly as about none at all."""
    if "batch_id" not in SERVICE.methods_by_name[method].input_type.fields_by_name:
        assert method in WITHOUT_BATCH, f"{method} names no batch: what keeps it from showing another tenant's?"
        return
    target = shared.stack.target if at == "gateway" else f"127.0.0.1:{shared.stack.servers[1].port}"
    bob, alice = shared.stub("bob", target), shared.stub("alice", target)
    before = [alice.GetBatch(pb.GetBatchRequest(batch_id=batch_id), timeout=20) for batch_id in of_alice.values()]
    missing = call(bob, method, MISSING)
    assert missing is not None
    for batch_id in of_alice.values():
        error = call(bob, method, batch_id)
        assert error is not None
        assert error.code is grpc.StatusCode.NOT_FOUND
        assert error.message == missing.message.replace(MISSING, batch_id)
        assert (error.reason, error.metadata) == (missing.reason, missing.metadata)
    after = [alice.GetBatch(pb.GetBatchRequest(batch_id=batch_id), timeout=20) for batch_id in of_alice.values()]
    assert after == before


@pytest.mark.parametrize("name", ["alice", "alice-reader", "operator"])
@pytest.mark.parametrize("method", ["GetBatch", "WatchBatch", "StreamResults", "GetResult"])
def test_who_sees_a_batch(shared: Shared, of_alice: dict[str, str], method: str, name: str) -> None:
    """The tenant's other tokens see its batches, and operators see everybody's."""
    assert call(shared.stub(name), method, of_alice["ended"]) is None


def test_operator_acts_for_a_tenant(shared: Shared) -> None:
    """An operator cancels, retries and deletes the batch of a tenant, and what comes of it belongs to that tenant."""
    with shared.client("alice") as alice, shared.client("operator") as operator, shared.client("bob") as bob:
        batch = alice.submit_lines(lines(1, vllm_xargs={"simulate": 600}))
        operator.cancel(batch.id)
        finished(operator, batch.id)
        retried = operator.retry(batch.id)
        assert retried.tenant == alice.get(retried.id).tenant == "alice"
        assert refused(lambda: bob.get(retried.id)).code is grpc.StatusCode.NOT_FOUND
        operator.delete(batch.id)
        alice.cancel(retried.id)
        assert refused(lambda: alice.get(batch.id)).code is grpc.StatusCode.NOT_FOUND


def test_lists(shared: Shared, of_alice: dict[str, str]) -> None:
    """A list has one's own batches; only operators see others', of all tenants or of the one that they ask for."""
    with shared.client("alice") as alice, shared.client("operator") as operator, shared.client("bob") as bob:
        own = bob.submit_lines(lines(1))
        assert {batch.tenant for batch in alice.list()} == {batch.tenant for batch in alice.list(tenant="alice")}
        assert set(of_alice.values()) <= {batch.id for batch in alice.list()}
        assert {batch.tenant for batch in bob.list()} == {"bob"}
        assert {"alice", "bob"} <= {batch.tenant for batch in operator.list()}
        assert {batch.tenant for batch in operator.list(["BATCH_STATE_IN_PROGRESS"], tenant="alice")} == {"alice"}
        assert list(operator.list(tenant="nobody")) == []
        for tenant in ("alice", "nobody"):
            error = _failure(lambda tenant=tenant: list(bob.list(tenant=tenant)))
            assert error is not None
            assert (error.code, error.reason) == (grpc.StatusCode.PERMISSION_DENIED, "ROLE_MISSING")
        assert [tenant.name for tenant in bob.tenants()] == ["bob"]
        assert {"alice", "bob", "operator"} <= {tenant.name for tenant in operator.tenants()}
        finished(bob, own.id)


def test_request_ids(shared: Shared) -> None:
    """A request_id is unique within a tenant: it neither returns nor disturbs another tenant's batch."""
    with shared.client("alice") as alice, shared.client("bob") as bob:
        first = alice.submit_lines(lines(2), request_id="monday")
        other = bob.submit_lines(lines(1), request_id="monday")
        again = alice.submit_lines(lines(2), request_id="monday")
        assert again.id == first.id != other.id
        assert (first.tenant, other.tenant) == ("alice", "bob")
        assert refused(lambda: alice.submit_lines(lines(1), request_id="monday")).reason == "REQUEST_ID_REUSED"


@pytest.mark.parametrize("at", ["gateway", "worker"])
def test_tenant_cannot_be_forged(shared: Shared, at: str) -> None:
    """What a client says about itself in its metadata changes nothing: its token decides."""
    target = shared.stack.target if at == "gateway" else f"127.0.0.1:{shared.stack.servers[1].port}"
    forged = ((tokens.CALLER_HEADER, "alice"), ("tenant", "alice"))
    created = shared.stub("bob", target).CreateBatch(inline(), timeout=30, metadata=forged)
    assert created.batch.tenant == "bob"


def test_quotas(shared: Shared) -> None:
    """Over a quota nothing is stored, and the error names limit, value and what is left; the file is read anew."""
    with shared.client("carol") as carol, shared.client("alice") as alice:
        before = count(shared.stack, "batches")
        shared.tenants_file.write_text("[tenants.carol]\nqueued_requests = 5\nqueued_tokens = 20_000\n")
        error = refused(lambda: carol.submit_lines(lines(6)))
        assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUOTA_REACHED")
        assert error.message == "tenant carol: queued requests: 6, at most 5 are allowed, 5 left"
        assert error.metadata == {
            **{"tenant": "carol", "name": "queued_requests", "limit": "5", "value": "6", "left": "5"},
        }
        # More than it may ever have: there is nothing to wait for.
        assert error.retry_delay_s is None
        error = refused(lambda: carol.submit_lines(lines(1, max_tokens=30_000)))
        assert (error.metadata["name"], error.metadata["limit"]) == ("queued_tokens", "20000")
        assert count(shared.stack, "batches") == before
        alice.submit_lines(lines(6))
        # A file that is wrong changes nothing and is reported.
        shared.tenants_file.write_text("[tenants.carol]\nqueued = 5\n")
        assert refused(lambda: carol.submit_lines(lines(6))).reason == "QUOTA_REACHED"
        [event] = shared.stack.servers[1].events("change_refused")
        assert "tenants.carol.queued: there is no such key" in str(event["cause"])
        shared.tenants_file.write_text("[tenants.carol]\ncalls_per_s = 1\n")
        error = until(lambda: _failure(lambda: list(carol.list())), "the limit of calls")
        assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED")
        assert (error.metadata["tenant"], error.metadata["limit"]) == ("carol", "1")
        assert list(alice.list())
        shared.tenants_file.write_text("")
        carol.submit_lines(lines(6))


def _failure(call: Callable[[], object]) -> CallError | None:
    try:
        call()
    except CallError as error:
        return error
    return None


def test_command_line(shared: Shared) -> None:
    """`vllm-batch tenants` shows each tenant's queue beside its limits, and what it used."""

    def run(name: str, *arguments: str) -> str:
        command = [str(Path(sys.executable).parent / "vllm-batch"), "--target", shared.stack.target, *arguments]
        env = {"BATCH_TOKEN": shared.tokens[name], "COLUMNS": "120", "PATH": "/usr/bin:/bin"}
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    for name in ("alice", "bob", "operator"):
        with shared.client(name) as client:
            finished(client, client.submit_lines(lines(2)).id)
    shared.tenants_file.write_text("[tenants.bob]\nweight = 3\nopen_batches = 100\n")
    shown = run("operator", "tenants")
    assert [line.split()[0] for line in shown.splitlines()][:1] == ["tenant"]
    assert {"alice", "bob", "operator"} <= {line.split()[0] for line in shown.splitlines()}
    found = json.loads(run("bob", "tenants", "--json"))
    assert (found["name"], found["weight"], found["limits"]["open_batches"]) == ("bob", 3.0, "100")
    assert int(found["usage"]["completion_tokens"]) > 0
    assert "tenant" in run("operator", "list").splitlines()[0]
    assert "tenant" not in run("bob", "list").splitlines()[0]
    shared.tenants_file.write_text("")


@dataclass
class Scene:
    """The callers and the batches of a property test."""

    callers: list[Caller]
    owners: list[str]


TENANTS = st.sampled_from(["a", "b", "c", "default"])
SCENES = st.builds(
    Scene,
    st.lists(st.builds(Caller, st.just("x"), TENANTS, st.sampled_from(list(Role))), min_size=1, max_size=3),
    st.lists(TENANTS, min_size=1, max_size=6),
)


async def outcome(answer: Awaitable[Any]) -> object:
    """The id of the batch in an answer, or the code of the error."""
    try:
        return getattr(await answer, "batch", None).id
    except ApiError as error:
        return error.code


@given(scene=SCENES, asked=st.one_of(st.just(""), TENANTS))
@settings(
    max_examples=2_000 if IS_THOROUGH else 25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_everybody_sees_what_is_theirs(database: Database, scene: Scene, asked: str) -> None:
    """For any callers and batches: each caller sees and changes exactly its tenant's, or as operator all."""
    owned = {stored(database, 1, tenant=owner).id: owner for owner in scene.owners}
    servicer = BatchServicer(database, Limits(10_000, 10_000))
    context: Any = None

    async def sees(caller: Caller) -> None:
        call_context.begin("/test", ()).caller = caller
        may_see = {number for number, owner in owned.items() if caller.role is Role.OPERATE or owner == caller.tenant}
        for number in owned:
            name = messages.batch_name(number)
            expected = name if number in may_see else grpc.StatusCode.NOT_FOUND
            assert await outcome(servicer.GetBatch(pb.GetBatchRequest(batch_id=name), context)) == expected
            assert await outcome(servicer.CancelBatch(pb.CancelBatchRequest(batch_id=name), context)) == expected
        listing = pb.ListBatchesRequest(page_size=1000, tenant=asked)
        if caller.role is not Role.OPERATE and asked not in ("", caller.tenant):
            assert await outcome(servicer.ListBatches(listing, context)) is grpc.StatusCode.PERMISSION_DENIED
        else:
            listed = {messages.batch_id(batch.id) for batch in (await servicer.ListBatches(listing, context)).batches}
            assert listed & owned.keys() == {number for number in may_see if asked in ("", owned[number])}

    for caller in scene.callers:
        asyncio.run(sees(caller))
