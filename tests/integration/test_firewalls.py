"""Firewalls that drop connections silently: every call ends by its deadline, work continues over new connections, no
result is lost, and no healthy process is restarted."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psycopg2
import pytest

from service.database_url import parse
from service.db import recoveries
from service.db.availability import DatabaseAwayError
from service.db.connection import Database
from tests.support.batches import lines, refused
from tests.support.servers import new_database
from tests.support.stacks import FullStack, full_stack
from tests.support.swallowing import BOTH, TO_CLIENT, TO_SERVER, Firewall, firewall
from tests.support.waiting import until
from vllm_batch import Client
from vllm_batch.v1 import batch_service_pb2 as pb

COUNT = 150
DIRECTIONS = pytest.mark.parametrize(
    "directions",
    [
        pytest.param(BOTH, id="both ways"),
        pytest.param((TO_SERVER,), id="to the server", marks=pytest.mark.thorough),
        pytest.param((TO_CLIENT,), id="to the client", marks=pytest.mark.thorough),
    ],
)
# Makes gateways reach the worker through its firewall.
ANNOUNCE = """
CREATE FUNCTION announce() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN NEW.address = '127.0.0.1:%d'; RETURN NEW; END $$;
CREATE TRIGGER announce BEFORE INSERT OR UPDATE ON heartbeats FOR EACH ROW EXECUTE FUNCTION announce();
"""

pytestmark = pytest.mark.timeout(240)


@dataclass
class Walled:
    """A stack with firewalls in front of Postgres, the worker and the gateway."""

    stack: FullStack
    database: Firewall
    worker: Firewall
    gateway: Firewall
    pids: dict[str, int]

    def client(self, patience_s: float = 90) -> Client:
        """A client that reaches the gateway through its firewall."""
        return Client(f"127.0.0.1:{self.gateway.port}", patience_s=patience_s)

    @contextmanager
    def batch(self, client: Client) -> Iterator[pb.Batch]:
        """Runs the block in the middle of a batch.

        Then asserts that each request has exactly one result, new work is accepted, and no process was restarted.
        """
        batch = client.submit_lines(lines(COUNT, vllm_xargs={"simulate": 0.5}))
        until(lambda: client.get(batch.id).counts.completed > 10, "part of the batch")
        yield batch
        *_, done = client.watch(batch.id)
        assert (done.state, done.counts.completed) == (pb.BATCH_STATE_COMPLETED, COUNT)
        assert [result.custom_id for result in client.results(batch.id)] == [f"c{i}" for i in range(COUNT)]
        until(lambda: not client.accepting(), "new work to be accepted")
        assert {name: self.stack.pid(name) for name in self.pids} == self.pids


@pytest.fixture(scope="module")
def walled(postgres: str) -> Iterator[Walled]:
    """The stack with its firewalls."""
    with new_database(postgres) as url:
        given = parse(url)
        with firewall(f"{given['host']}/.s.PGSQL.5432") as database:
            settings = {
                "BATCH_ENGINE": "simulated",
                "BATCH_SIMULATED_WINDOW": "16",
                "BATCH_HEARTBEAT_INTERVAL_S": "0.5",
                "BATCH_HEARTBEAT_TIMEOUT_S": "15",
                "BATCH_CHECK_INTERVAL_S": "1",
                "BATCH_DATABASE_TIMEOUT_S": "1",
                "DATABASE_URL": f"postgresql://postgres@127.0.0.1:{database.port}/{given['dbname']}",
            }
            with (
                full_stack(**settings) as stack,
                firewall(("127.0.0.1", int(stack.env["BATCH_WORKER_PORT"]))) as worker,
                firewall(("127.0.0.1", int(stack.env["BATCH_GATEWAY_PORT"]))) as gateway,
            ):
                with psycopg2.connect(url) as connection, connection.cursor() as cursor:
                    cursor.execute(ANNOUNCE % worker.port)
                stack.start_all()
                pids = {name: stack.pid(name) for name in ("gateway", "worker", "watchdog")}
                yield Walled(stack, database, worker, gateway, pids)
                assert stack.restarts() == []


@DIRECTIONS
def test_connections_to_postgres(walled: Walled, directions: tuple[str, ...]) -> None:
    """When all connections to Postgres go silent in mid-batch, each process reconnects and the batch completes."""
    with walled.client() as client, walled.batch(client):
        walled.database.forget(*directions)
        assert walled.database.forgotten > 5


def test_no_way_to_postgres(walled: Walled) -> None:
    """While new connections go silent too, gateway and worker report Postgres away; afterwards the batch completes."""
    marks = {name: walled.stack.mark(name) for name in ("gateway", "worker")}
    with walled.client() as client, walled.batch(client):
        walled.database.forget(*BOTH, new=True)
        for name, mark in marks.items():
            until(
                lambda name=name, mark=mark: walled.stack.events(name, "database_away", mark), f"{name} to notice", 30
            )  # type: ignore[misc]
        with walled.client(patience_s=0) as hasty:
            error = until(lambda: refused(lambda: hasty.submit_lines(lines(1))), "a refusal")
        assert error.reason == "DATABASE_UNAVAILABLE"
        walled.database.mend()


def test_one_call_finds_out_for_all(postgres: str, database_url: str) -> None:
    """When all connections of a pool went silent, only one call has to wait for its deadline."""
    given = parse(database_url)
    with firewall(f"{given['host']}/.s.PGSQL.5432") as wall:
        url = f"postgresql://postgres@127.0.0.1:{wall.port}/{given['dbname']}"
        database = Database(url, "test", timeout_s=0.5, connections=4)
        together = threading.Barrier(4)
        threads = [threading.Thread(target=lambda: database.call(lambda _: together.wait(20))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wall.forget(*BOTH)
        assert wall.forgotten == 4
        with pytest.raises(DatabaseAwayError, match=r"^Postgres did not answer within 1\.5 s$"):
            database.call(recoveries.uptime_s)
        for _ in range(4):
            assert database.call(recoveries.uptime_s) > 0
        database.close()


@DIRECTIONS
def test_connections_to_the_worker(walled: Walled, directions: tuple[str, ...]) -> None:
    """When its connections to the worker go silent, the gateway reconnects and accepts new work again."""
    mark = walled.stack.mark("gateway")
    with walled.client() as client, walled.batch(client):
        walled.worker.forget(*directions)
        again = client.submit_lines(lines(3))
        seen = [event["health"] for event in walled.stack.events("gateway", "worker_contact", mark)]
        assert seen == ["unreachable", "serving"]
        *_, done = client.watch(again.id)
        assert done.counts.completed == 3


@DIRECTIONS
def test_connections_of_a_client(walled: Walled, directions: tuple[str, ...]) -> None:
    """A client whose connection goes silent resumes its stream without gap or repeat; its upload makes one batch."""
    followed: list[str] = []
    with walled.client() as client, walled.client() as follower, walled.batch(client) as batch:
        thread = threading.Thread(
            target=lambda: followed.extend(result.custom_id for result in follower.results(batch.id, follow=True))
        )
        thread.start()
        until(lambda: followed, "the first results")
        batches = len(list(client.list(limit=1000)))
        walled.gateway.forget(*directions)
        assert client.submit_lines(lines(3)).counts.total == 3
        assert len(list(client.list(limit=1000))) == batches + 1
        thread.join(60)
        assert followed == [f"c{i}" for i in range(COUNT)]
