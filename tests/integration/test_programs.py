"""Hosts that run only some of the programs: BATCH_PROGRAMS, followed by the scripts that users run."""

import socket

import pytest

from service.db.connection import Database
from tests.support.batches import finished, lines
from tests.support.namespaces import own_name
from tests.support.stacks import full_stack
from tests.support.waiting import until
from vllm_batch import Client
from vllm_batch.v1 import host_service_pb2 as pb

pytestmark = pytest.mark.timeout(240)


@pytest.mark.thorough
def test_a_gateway_and_a_worker_on_hosts_of_their_own(database_url: str, database: Database) -> None:
    """start-all.sh waits for what a host runs, status.sh shows it, and both hosts make one service."""
    shared = {"DATABASE_URL": database_url, "BATCH_ENGINE": "simulated", "BATCH_HEARTBEAT_INTERVAL_S": "1"}
    with (
        full_stack(BATCH_PROGRAMS="gateway,watchdog", **shared) as front,
        full_stack(BATCH_PROGRAMS="worker,watchdog", **shared) as back,
    ):
        started = front.script("start-all.sh")
        assert started.returncode == 0, started.stdout + started.stderr + front.logs()
        assert "the programs of this host work" in started.stdout
        states = dict(text.split()[:2] for text in front.supervisorctl("status").splitlines())
        assert {name for name, state in states.items() if state == "RUNNING"} == {"gateway", "watchdog"}
        shown = front.script("status.sh")
        assert shown.returncode == 0
        assert "worker offline" in shown.stdout
        with own_name("backroom"):
            back.start_all()
            states = dict(text.split()[:2] for text in back.supervisorctl("status").splitlines())
            assert {name for name, state in states.items() if state == "RUNNING"} == {"worker", "watchdog"}
            shown = back.script("status.sh")
            assert shown.returncode == 0
            assert "backroom:worker" in shown.stdout
        with Client(front.target) as client:
            until(lambda: not client.accepting(), "new work to be accepted")
            assert finished(client, client.submit_lines(lines(20)).id).counts.completed == 20

            def known() -> dict[str, pb.Host]:
                found = {host.name: host for host in client.hosts()}
                return found if all(host.workers[0].verdict for host in found.values() if host.workers) else {}

            found = until(known, "the watchdog's report")
            assert found.keys() == {socket.gethostname(), "backroom"}
            [worker] = found["backroom"].workers
            assert (worker.verdict, worker.budget_left) == ("HEALTHY", 10)
            running = {program.name for program in found["backroom"].programs if program.state == "RUNNING"}
            assert running == {"worker", "watchdog"}
            assert not found["backroom"].notes
            # Stopped in order: not lost.
            assert back.script("stop-all.sh").returncode == 0
            until(lambda: next(client.hosts("backroom")).state == pb.HOST_STATE_STOPPED, "the host to be stopped")
