"""Webhooks on a whole stack: each end of a batch is told once at least, whoever dies, and to nobody else."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from openai import BadRequestError, OpenAI

from service.auth import tokens
from service.auth.roles import Role
from tests.integration.test_gateway_role import as_gateway, make_role
from tests.support.batches import finished, line, lines, refused, run_sql
from tests.support.ports import free_port
from tests.support.servers import ROOT, Server, Stack, new_database
from tests.support.waiting import until
from tests.support.webhook_receiver import SECRET, Received, WebhookReceiver, receiving
from vllm_batch import AsyncClient, Client
from vllm_batch.channel import open_channel
from vllm_batch.v1 import webhook_service_pb2 as pb
from vllm_batch.v1 import webhook_service_pb2_grpc

OTHER_SECRET = "whsec_" + "YW5vdGhlciBzZWNyZXQgb2YgdGhlIHRlc3RzLCBhcyBsb25n"
LOOPBACK = "127.0.0.0/8"


class Told(Stack):
    """A stack with a receiver to which the events of two tenants go."""

    receiver: WebhookReceiver
    gate: Server

    @property
    def tenants(self) -> Path:
        return self.folder / "tenants.toml"


@pytest.fixture(scope="module")
def told(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    """Gateway and door under their own role, and a worker; `default` has a target."""
    folder = tmp_path_factory.mktemp("told")
    with new_database(postgres) as url, receiving() as receiver:
        stack = Told(url, folder, free_port(), [])
        stack.receiver = receiver
        secret = folder / "secret"
        secret.touch(0o600)
        secret.write_text(f"# The new one first\n{OTHER_SECRET}\n{SECRET}\n")
        stack.tenants.write_text(
            f'[tenants.default.webhook]\nurl = "{receiver.url}"\nsecret_file = "secret"\n'
            '[tenants.broken.webhook]\nsecret_file = "nowhere"\n'
        )
        make_role(url)
        given = {"tenants_file": stack.tenants, "webhook_networks": LOOPBACK, "gateway_database_url": as_gateway(url)}
        stack.gate = stack.gateway(**given)
        stack.worker(**given)
        stack.http(**given)
        stack.wait_until_accepting()
        yield stack
        stack.end()


@pytest.fixture(autouse=True)
def _answers(told: Told) -> Iterator[None]:
    yield
    told.receiver.answer = lambda _: 204
    run_sql(told, "DELETE FROM webhook_deliveries WHERE state = 'pending'")


@pytest.fixture
def client(told: Told) -> Iterator[Client]:
    with Client(told.target, patience_s=30) as client:
        yield client


@contextmanager
def webhooks(stack: Stack, **security: str) -> Iterator[webhook_service_pb2_grpc.WebhookServiceStub]:
    with open_channel(stack.target, **security) as channel:
        yield webhook_service_pb2_grpc.WebhookServiceStub(channel)


def delivery(stack: Stack, batch: str) -> pb.Delivery:
    with webhooks(stack) as stub:
        found = stub.ListDeliveries(pb.ListDeliveriesRequest(batch_id=batch), timeout=30, wait_for_ready=True)
        return found.deliveries[0] if found.deliveries else pb.Delivery()


def in_state(stack: Stack, batch: str, state: str) -> pb.Delivery:
    def look() -> pb.Delivery | None:
        found = delivery(stack, batch)
        return found if found.state == pb.DeliveryState.Value(f"DELIVERY_STATE_{state}") else None

    return until(look, f"the webhook of {batch} to be {state}") or pb.Delivery()


def hurry(stack: Stack) -> None:
    """As if the time until the next try, and all leases, were over."""
    run_sql(
        stack,
        "UPDATE webhook_deliveries SET next_time = clock_timestamp(), lease_until = NULL WHERE state = 'pending'",
    )


def test_each_end_through_both_doors(told: Told, client: Client) -> None:
    """The openai package accepts what is sent for each of the four ends, with either secret; the id stays the same."""
    completed = client.submit_lines(lines(3))
    expired = client.submit_lines(lines(1, vllm_xargs={"simulate": 3}), completion_window_s=0.5)
    cancelled = client.cancel(client.submit_lines(lines(1, vllm_xargs={"simulate": 60})).id)
    with OpenAI(base_url=told.base_url, api_key="none") as door:
        file = door.files.create(file=("in.jsonl", b"no json\n"), purpose="batch")
        failed = door.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"a": "b"}
        )
    ends = {"completed": completed, "expired": expired, "cancelled": cancelled, "failed": failed}
    for state, batch in ends.items():
        [received] = told.receiver.wait(batch.id)
        for secret in (SECRET, OTHER_SECRET):
            event = received.event(secret)
            assert (event.type, event.data.id, event.object) == (f"batch.{state}", batch.id, "event")  # type: ignore[union-attr]
            assert event.id == received.id
        found = in_state(told, batch.id, "DELIVERED")
        assert (found.id, found.tries, found.last_status, found.last_error) == (received.id, 1, 204, "")
    assert finished(client, completed.id).end_time.seconds == told.receiver.of(completed.id)[0].event().created_at


def test_targets_of_batches(told: Told, client: Client) -> None:
    """A batch's own target takes the place of its tenant's, at both doors and for its retry; wrong ones are refused."""
    own = f"{told.receiver.url}/own?token=hidden"
    first = client.submit_lines([*lines(1), line("b", vllm_xargs={"simulate": "refuse"})], webhook=own)
    with OpenAI(base_url=told.base_url, api_key="none") as door:
        file = door.files.create(file=("in.jsonl", b"".join(lines(1))), purpose="batch")
        given = {"input_file_id": file.id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        second = door.batches.create(**given, extra_body={"webhook": own})  # type: ignore[arg-type]
        for wrong in ("ftp://example.com/", "http://10.0.0.1/", "https://user@example.com/"):
            with pytest.raises(BadRequestError) as caught:
                door.batches.create(**given, extra_body={"webhook": wrong})  # type: ignore[arg-type]
            assert caught.value.param == "webhook"
            error = refused(lambda wrong=wrong: client.submit_lines(lines(1), webhook=wrong))  # type: ignore[misc]
            assert error.violations[0][0] == "options.webhook"
        assert told.receiver.wait(first.id)[0].path == "/hook/own?token=hidden"
        assert told.receiver.wait(second.id)[0].event().type == "batch.completed"
        # Another target is another batch.
        assert door.batches.create(**given).id != second.id  # type: ignore[arg-type]
    again = client.retry(first.id)
    assert told.receiver.wait(again.id)[0].path == "/hook/own?token=hidden"
    assert "hidden" not in told.gate.log.read_text()


def test_target_down_then_up(told: Told, client: Client) -> None:
    """An event whose target fails is tried again later, one at a time, until it is answered with 2xx."""
    answers = [500, None, 302]

    def answer(one: Received) -> int | None:
        tries = sum(each.id == one.id for each in told.receiver.received)
        return answers[tries - 1] if tries <= len(answers) else 200

    told.receiver.answer = answer
    batch = client.submit_lines(lines(1))
    # Of a connection that is closed, the system says one or the other.
    closed = "the answer is not HTTP|cannot be reached: .*"
    errors = ["answered 500", closed, "answered 302; redirects are not followed"]
    for tries, error in enumerate(errors, 1):

        def failed(tries: int = tries, error: str = error) -> pb.Delivery | None:
            found = delivery(told, batch.id)
            return found if found.tries == tries and re.fullmatch(error, found.last_error) else None

        found = until(failed, error) or pb.Delivery()
        assert found.state == pb.DELIVERY_STATE_PENDING
        delay_s = found.next_try_time.ToNanoseconds() / 1e9 - found.last_try_time.ToNanoseconds() / 1e9
        assert 2.4 * 2 ** (tries - 1) < delay_s
        hurry(told)
    assert in_state(told, batch.id, "DELIVERED").tries == 4
    received = told.receiver.of(batch.id)
    assert len({one.id for one in received}) == 1
    assert {one.path for one in received} == {"/hook"}


@pytest.mark.parametrize("point", [pytest.param("before_send", marks=pytest.mark.thorough), "before_record"])
def test_deliverer_dies(told: Told, client: Client, point: str) -> None:
    """An event that was sent and not recorded, or not sent, is sent again by the next life, under the same id."""
    told.gate.terminate()
    told.gate.arm(f"webhook.{point}")
    told.gate.start()
    told.wait_until_accepting()
    batch = client.submit_lines(lines(1))
    until(lambda: told.gate.process.poll() is not None, "the gateway to die")
    assert len(told.receiver.of(batch.id)) == (1 if point == "before_record" else 0)
    told.gate.disarm()
    told.gate.start()
    told.wait_until_accepting()
    # Nobody else tries before the lease ends.
    assert delivery(told, batch.id).state == pb.DELIVERY_STATE_PENDING
    hurry(told)
    assert in_state(told, batch.id, "DELIVERED").tries == 2
    received = told.receiver.of(batch.id)
    assert len(received) == (2 if point == "before_record" else 1)
    assert len({one.id for one in received}) == 1


def test_target_rests(told: Told, client: Client) -> None:
    """After ten failures in a row a target rests, and what goes to others does not wait."""
    # The loopback has more addresses than one.
    other = f"http://127.0.0.2:{free_port()}/"
    batches = [client.submit_lines(lines(1), webhook=other) for _ in range(12)]
    failed = 0
    while not told.gate.events("webhook_target_rests"):
        seen = failed
        failed = until(lambda seen=seen: n if (n := len(told.gate.events("webhook_failed"))) > seen else 0, "a failure")  # type: ignore[misc]
        hurry(told)
    [rests] = told.gate.events("webhook_target_rests")
    assert (rests["target"], rests["rest_s"]) == (other[:-1], 60)
    assert told.receiver.wait(client.submit_lines(lines(1)).id)
    before = sum(delivery(told, batch.id).tries for batch in batches)
    hurry(told)
    assert told.receiver.wait(client.submit_lines(lines(1)).id)
    assert sum(delivery(told, batch.id).tries for batch in batches) == before
    waits = delivery(told, batches[-1].id)
    assert waits.state == pb.DELIVERY_STATE_PENDING


def test_given_up(told: Told, client: Client) -> None:
    """What failed for a day is given up, which the list, the log and a metric say; a replay sends it, under its id."""
    port = free_port()
    batch = client.submit_lines(lines(1), webhook=f"http://127.0.0.3:{port}/")
    until(lambda: delivery(told, batch.id).last_error, "the first failure")
    run_sql(told, "UPDATE webhook_deliveries SET expire_time = clock_timestamp() WHERE state = 'pending'")
    found = in_state(told, batch.id, "GIVEN_UP")
    assert "cannot be reached" in found.last_error
    [event] = [one for one in told.gate.events("webhook_given_up") if one["batch"] == batch.id]
    assert (event["webhook"], event["target"]) == (found.id, f"http://127.0.0.3:{port}")
    with webhooks(told) as stub, pytest.raises(grpc.RpcError) as caught:
        stub.ReplayDeliveries(pb.ReplayDeliveriesRequest(delivery_id="evt_" + "0" * 32))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND  # type: ignore[attr-defined]
    run_sql(told, f"UPDATE webhook_deliveries SET url = '{told.receiver.url}' WHERE state = 'given_up'")
    shown = cli(told, "webhooks", "replay", "--batch", batch.id, "--json")
    assert json.loads(shown)["id"] == found.id
    assert told.receiver.wait(batch.id)[0].id == found.id
    in_state(told, batch.id, "DELIVERED")
    cli(told, "webhooks", "replay", found.id)
    assert len(told.receiver.wait(batch.id, 2)) == 2


def refused_by(stack: Stack, *arguments: str) -> str:
    return cli(stack, *arguments, status=3)


def cli(stack: Stack, *arguments: str, status: int = 0) -> str:
    command = [str(Path(sys.executable).parent / "vllm-batch"), "--target", stack.target, *arguments]
    env = os.environ | {"PYTHONPATH": str(ROOT / "client"), "COLUMNS": "250"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_command_line(told: Told, client: Client) -> None:
    """`vllm-batch webhooks` lists deliveries with what went wrong, and tries out a target."""
    batch = client.submit_lines(lines(1))
    found = in_state(told, batch.id, "DELIVERED")
    listed = cli(told, "webhooks", "--batch", batch.id)
    assert all(part in listed for part in (found.id, batch.id, "batch.completed", "delivered", told.receiver.url))
    assert cli(told, "webhooks", "--batch", batch.id, "--state", "given_up").count("\n") == 1
    assert "answered 204" in cli(told, "webhooks", "test")
    sent = told.receiver.of("batch_test")[-1]
    assert sent.event().type == "webhook.test"  # type: ignore[comparison-overlap]
    told.receiver.answer = lambda _: 404
    assert "answered 404" in cli(told, "webhooks", "test", f"{told.receiver.url}/x", status=1)
    assert "tenant broken has no target" in refused_by(told, "webhooks", "test", "broken")


def test_both_clients(told: Told, client: Client) -> None:
    """Both clients list deliveries up to a limit, try out a target and send an event again."""
    batches = [client.submit_lines(lines(1)) for _ in range(3)]
    for batch in batches:
        in_state(told, batch.id, "DELIVERED")
    newest, older, _ = listed = list(client.deliveries(["DELIVERY_STATE_DELIVERED"], 3))
    assert {one.batch_id for one in listed} == {batch.id for batch in batches}
    assert client.test_webhook().status == 204
    [again] = client.replay_deliveries(batch_id=newest.batch_id)
    assert again.id == newest.id

    async def the_same() -> None:
        async with AsyncClient(told.target, patience_s=30) as others:
            assert [one.id async for one in others.deliveries(limit=2)] == [newest.id, older.id]
            assert [one.id async for one in others.deliveries(batch_id=older.batch_id)] == [older.id]
            assert (await others.test_webhook(f"{told.receiver.url}/x")).url == f"{told.receiver.url}/x"
            [again] = await others.replay_deliveries(delivery_id=older.id)
            assert again.id == older.id
            with pytest.raises(ValueError, match="either"):
                await others.replay_deliveries()

    asyncio.run(the_same())
    for one in (newest, older):
        assert len(told.receiver.wait(one.batch_id, 2)) == 2


def test_second_gateway(told: Told, client: Client) -> None:
    """Each event is sent by one of two gateways. With tokens, a tenant has no part in others' webhooks or secrets."""
    secret, token = tokens.new("alice", Role.SUBMIT)
    hashes = told.folder / "hashes"
    hashes.touch(0o600)
    hashes.write_text(f"{token.line()}\n")
    port = free_port()
    guarded = told.run(
        *("service.gateway", "gateway3"),
        **{"gateway_port": port, "tenants_file": told.tenants, "webhook_networks": LOOPBACK, "token_hashes": hashes},
    )
    until(lambda: guarded.events("gateway_serving"), "the guarded gateway")
    try:
        batches = [client.submit_lines(lines(1)) for _ in range(20)]
        for batch in batches:
            found = in_state(told, batch.id, "DELIVERED")
            assert found.tries == len(told.receiver.of(batch.id)) == 1
        with open_channel(f"127.0.0.1:{port}", token=secret) as channel:
            stub = webhook_service_pb2_grpc.WebhookServiceStub(channel)
            assert not stub.ListDeliveries(pb.ListDeliveriesRequest()).deliveries
            for call, code in (
                (lambda: stub.ListDeliveries(pb.ListDeliveriesRequest(tenant="default")), "PERMISSION_DENIED"),
                (lambda: stub.TestWebhook(pb.TestWebhookRequest(tenant="default")), "PERMISSION_DENIED"),
                (lambda: stub.TestWebhook(pb.TestWebhookRequest(url=told.receiver.url)), "INVALID_ARGUMENT"),
                (lambda: stub.ReplayDeliveries(pb.ReplayDeliveriesRequest(delivery_id=found.id)), "NOT_FOUND"),
                (lambda: stub.ReplayDeliveries(pb.ReplayDeliveriesRequest(batch_id=batch.id)), "NOT_FOUND"),
            ):
                with pytest.raises(grpc.RpcError) as caught:
                    call()  # type: ignore[no-untyped-call]
                assert caught.value.code().name == code  # type: ignore[attr-defined]
        with Client(f"127.0.0.1:{port}", patience_s=0, token=secret) as alice:
            until(lambda: not alice.accepting(), "the guarded gateway to accept")
            error = refused(lambda: alice.submit_lines(lines(1), webhook=told.receiver.url))
            assert "tenant alice has no webhook secret" in error.violations[0][1]
    finally:
        guarded.terminate()


def test_secrets_stay_secret(told: Told) -> None:
    """No log has a secret or the path of a target."""
    logs = "".join(log.read_text() for log in told.folder.glob("*.log"))
    assert "webhook_delivered" in logs
    for secret in (SECRET, OTHER_SECRET):
        assert secret.removeprefix("whsec_") not in logs
    assert "/hook" not in logs
