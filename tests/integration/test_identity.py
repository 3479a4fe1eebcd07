"""Names and addresses of hosts: a dead session keeps no name, no two machines have one, and each can be reached."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import psycopg2
import pytest

from service.database_url import parse
from tests.support.batches import count, finished, lines, run_sql
from tests.support.namespaces import Network, moving_name, own_name
from tests.support.ports import free_port
from tests.support.servers import Server, Stack, new_database
from tests.support.stacks import BIN, FullStack, full_stack
from tests.support.swallowing import BOTH, firewall
from tests.support.waiting import until
from vllm_batch import Client
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import recovery_service_pb2 as rpb

pytestmark = pytest.mark.timeout(240)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="networks need root")

SIMULATED = {"BATCH_ENGINE": "simulated", "BATCH_HEARTBEAT_INTERVAL_S": "0.5", "BATCH_CHECK_INTERVAL_S": "1"}


def sessions(url: str, incarnation: object) -> int:
    """How many sessions Postgres keeps for an incarnation."""
    with psycopg2.connect(url) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE %s", (f"%{incarnation}",))
        [count] = cursor.fetchone() or [0]
        return int(count)


def ready(worker: Server) -> bool:
    return any(event["phase"] == "ready" for event in worker.events("phase_entered"))


@contextmanager
def networks(count: int) -> Iterator[list[Network]]:
    """Yields networks that know nothing of each other."""
    with ExitStack() as stack:
        made = [Network(f"10.77.0.{number}") for number in range(1, count + 1)]
        for network in made:
            stack.callback(network.close)
        yield made


def test_a_dead_session_keeps_no_name(stack: Stack, client: Client) -> None:
    """A worker whose host lost power in mid-batch comes back under its name at once, although Postgres keeps the
    sessions of its last life: those are ended, with the locks that they hold."""
    given = parse(stack.database_url)
    stack.gateway()
    with firewall(f"{given['host']}/.s.PGSQL.5432") as wall:
        behind = f"postgresql://postgres@127.0.0.1:{wall.port}/{given['dbname']}"
        direct, stack.database_url = stack.database_url, behind
        # Its leases alone would keep it out for longer than this test may take.
        worker = stack.worker(lease_s=3600, heartbeat_timeout_s=3600)
        stack.database_url = direct
        stack.wait_until_accepting()
        batch = client.submit_lines(lines(300, vllm_xargs={"simulate": 0.2}))
        until(lambda: client.get(batch.id).counts.completed > 10, "part of the batch")
        wall.forget(*BOTH)
        worker.kill()
        [first] = worker.events("identity_locked")
        assert sessions(direct, first["incarnation"]) > 1
        again = stack.worker(lease_s=3600, heartbeat_timeout_s=3600)
        [_, second] = until(
            lambda: found if len(found := again.events("identity_locked")) == 2 else None, "the next life", 30
        )
        assert cast(int, second["sessions_ended"]) > 1
        assert sessions(direct, first["incarnation"]) == 0
        assert finished(client, batch.id).counts.completed == 300


def test_a_restored_heartbeat_ends_nobody(stack: Stack, client: Client) -> None:
    """A worker that finds the heartbeat and the leases of an earlier life, as after a restore, takes its name back and
    runs what that held, once both can be written; no request counts a death. It leaves the name to a life that came
    after it."""
    stack.gateway()
    worker = stack.worker()
    stack.wait_until_accepting()
    batch = client.submit_lines(lines(20, vllm_xargs={"simulate": 2}))
    until(lambda: client.get(batch.id).counts.running == 20, "the batch to run")
    run_sql(stack, "CREATE TABLE beats AS SELECT * FROM heartbeats; CREATE TABLE held AS SELECT * FROM chunks")
    worker.kill()
    worker.start()
    until(lambda: len(worker.events("identity_locked")) == 2, "the next life")
    run_sql(stack, "DELETE FROM chunks; INSERT INTO chunks SELECT * FROM held")
    with psycopg2.connect(stack.database_url) as restoring, restoring.cursor() as cursor:
        cursor.execute("SELECT FROM chunks FOR UPDATE")
        run_sql(stack, "DELETE FROM heartbeats; INSERT INTO heartbeats SELECT * FROM beats")
        until(lambda: "timeout" in str(worker.events("database_away")), "the leases to be waited for in vain")
    restoring.close()
    [taken] = until(lambda: worker.events("name_taken_back"), "the name to be taken back")
    first, second = worker.events("identity_locked")
    assert (taken["life"], taken["incarnation"]) == (first["incarnation"], second["incarnation"])
    assert taken["put_back"]
    done = finished(client, batch.id)
    assert (done.state, done.counts.completed) == (pb.BATCH_STATE_COMPLETED, 20)
    assert count(stack, "chunks WHERE deaths > 0") == 0
    assert worker.process.poll() is None
    run_sql(stack, "UPDATE heartbeats SET incarnation = gen_random_uuid(), start_ticks = start_ticks + 1")
    assert worker.process.wait(30) == 1


@needs_root
def test_loopback_is_refused_beside_other_hosts(stack: Stack) -> None:
    """A host on loopback works until there are others; beside them its worker and its gateway are refused in words,
    and gateways elsewhere never take its address for their own worker's."""
    with networks(2) as (one, two):
        # A machine of its own: with another BATCH_HOME, and another name.
        home = {"home": stack.folder / "b"}
        elsewhere = home | {"host": two.address, "allow_insecure": "true", "worker_metrics_port": 0}
        with one.inside(), own_name("one"):
            alone = stack.worker("alone")
        until(lambda: ready(alone), "a worker that is alone on loopback")
        with two.inside(), own_name("two"):
            wrong, right = stack.worker("wrong", **home), stack.worker("right", **elsewhere)
            gateway = stack.run("service.gateway", "gateway", **elsewhere)
            lost = stack.run("service.gateway", "lost", gateway_port=free_port(), **home)
        [refused] = until(lambda: wrong.events("start_failed"), "the worker's refusal")
        assert "they cannot reach 127.0.0.1" in str(refused["cause"])
        assert "Set BATCH_HOST" in str(refused["advice"])
        assert wrong.process.wait(30) == 1
        [refused] = until(lambda: lost.events("start_failed"), "the gateway's refusal")
        assert "Set BATCH_HOST" in str(refused["cause"])
        assert lost.process.wait(30) == 1
        until(lambda: gateway.events("accepting"), "the gateway to accept")
        assert [str(event["worker_id"]).endswith(":alone") for event in gateway.events("worker_not_reachable")] == [
            True
        ]
        called = {event["address"] for event in gateway.events("worker_contact")}
        assert f"{two.address}:{right.port}" in called
        assert f"127.0.0.1:{alone.port}" not in called
        assert alone.process.poll() is None


def shown(stack: FullStack, network: Network) -> dict[str, Any]:
    """What the watchdog of this stack says of its worker."""
    with network.inside():
        command = [BIN / "vllm-batch", "recovery", "status", "--json"]
        env = stack.env | {"BATCH_WATCHDOG_TARGET": f"{stack.env['BATCH_HOST']}:{stack.env['BATCH_WATCHDOG_PORT']}"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout, done.stderr
    status: dict[str, Any] = next(
        one for one in map(json.loads, done.stdout.splitlines()) if "worker" in one["worker_id"]
    )
    return status


def start(stack: FullStack, network: Network, script: str = "start-all.sh") -> "subprocess.CompletedProcess[str]":
    with network.inside():
        return stack.script(script)


def names(stack: FullStack) -> list[tuple[Any, ...]]:
    """Who has the worker's name."""
    with psycopg2.connect(stack.env["DATABASE_URL"]) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT incarnation, machine FROM heartbeats")
        return cursor.fetchall()


@pytest.mark.thorough
@needs_root
def test_two_machines_of_one_name(postgres: str) -> None:
    """The second host of a name is refused in words with both addresses, its watchdog neither says HEALTHY nor starts
    it again and again nor spends a budget, nothing of the first is touched, and when the first ends it takes over."""
    with new_database(postgres) as url, networks(2) as (here, there), ExitStack() as open_stacks:
        settings = SIMULATED | {"DATABASE_URL": url, "BATCH_ALLOW_INSECURE": "true"}
        first = open_stacks.enter_context(full_stack(**settings, BATCH_HOST=here.address))
        second = open_stacks.enter_context(full_stack(**settings, BATCH_HOST=there.address))
        started = start(first, here)
        assert started.returncode == 0, started.stdout + started.stderr + first.logs()
        before, pid = names(first), first.pid("worker")
        addresses = [f"{stack.env['BATCH_HOST']}:{stack.env['BATCH_WORKER_PORT']}" for stack in (first, second)]
        refused = start(second, there)
        assert refused.returncode == 1
        assert "WRONG   name: another machine runs as" in refused.stderr
        assert all(address in refused.stderr for address in addresses)
        # As systemd starts it, which asks nobody.
        with there.inside():
            second.script("supervisord.sh")
        until((second.home / "log/worker.log").exists, "the second worker")
        [failed] = until(lambda: second.events("worker", "start_failed"), "the refusal of the worker")
        assert all(address in failed["cause"] for address in addresses)
        status = until(
            lambda: found if (found := shown(second, there))["verdict"].endswith("NAME_TAKEN") else None,
            "the verdict of the second watchdog",
        )
        assert addresses[0] in status["reason"]
        assert status["budget_left"] == status["budget_limit"]
        assert (names(first), first.pid("worker")) == (before, pid)
        assert shown(first, here)["verdict"].endswith("HEALTHY")
        stopped = start(first, here, "stop-all.sh")
        assert stopped.returncode == 0, stopped.stderr
        until(lambda: shown(second, there)["verdict"].endswith("HEALTHY"), "the second to take over")
        [(_, machine)] = names(second)
        assert machine == (second.home / "machine-id").read_text().strip() != before[0][1]


@pytest.mark.thorough
@needs_root
def test_an_address_that_vanishes_restarts_nothing() -> None:
    """When the address of a host vanishes, as without carrier, its watchdog goes on calling its worker healthy."""
    with networks(1) as (network,):
        settings = SIMULATED | {"BATCH_HOST": network.address, "BATCH_ALLOW_INSECURE": "true"}
        with full_stack(**settings) as stack:
            started = start(stack, network)
            assert started.returncode == 0, started.stdout + started.stderr + stack.logs()
            until(lambda: shown(stack, network)["verdict"].endswith("HEALTHY"), "a healthy worker")
            pid, before = stack.pid("worker"), stack.sql("SELECT clock_timestamp()")[0][0]
            # Nobody else may ask; only the embedded Postgres, which has a user of its own, may pass the folder.
            assert (stack.home / "run/worker.sock").stat().st_mode & 0o777 == 0o700
            assert (stack.home / "run").stat().st_mode & 0o066 == 0
            network.ip(f"address delete {network.address}/32 dev lo")
            # A watchdog that asks at the address restarts the worker within 20 s.
            beaten = "SELECT 1 FROM heartbeats WHERE last_seen > %s::timestamptz + interval '40 s'"
            until(lambda: stack.sql(beaten % f"'{before}'"), "heartbeats for 40 s")
            network.ip(f"address add {network.address}/32 dev lo")
            status = shown(stack, network)
            assert status["verdict"].endswith("HEALTHY")
            # It was the verdict all the time.
            assert datetime.fromisoformat(status["verdict_time"]) < before
            assert stack.pid("worker") == pid


@needs_root
def test_a_name_that_moves_is_found_again(stack: Stack, tmp_path: Path) -> None:
    """A gateway calls a worker at the address for which its name stands since its next start; it does not wait for the
    half minute after which gRPC would ask for the name again."""
    with moving_name(tmp_path) as move:
        gateway, worker = stack.gateway(), stack.worker(host="moving", allow_insecure="true")
        stack.wait_until_accepting()
        for lives, address in ((2, "127.0.0.3"), (3, "127.0.0.4")):
            worker.terminate()
            gateway.mark = gateway.log.stat().st_size
            move(address)
            worker.start()
            until(lambda lives=lives: len(worker.events("identity_locked")) == lives, "the worker's next life")  # type: ignore[misc]
            until(lambda: serving(gateway), f"the link to {address}", 20)


def serving(gateway: Server) -> int:
    """How often a link to a worker came up."""
    return sum(event["health"] == "serving" for event in gateway.events("worker_contact"))


@pytest.mark.thorough
@pytest.mark.timeout(120)
def test_a_host_that_is_renamed_while_it_runs() -> None:
    """Programs that start after their host was renamed go by the name that it had: a healthy worker is known to a new
    watchdog, and one that dies is restarted once."""
    settings = {"BATCH_ENGINE": "simulated", "BATCH_HEARTBEAT_INTERVAL_S": "1"}
    with full_stack(**settings) as stack, own_name("before"):
        stack.start_all()
        worker, watchdog = stack.pid("worker"), stack.pid("watchdog")
        subprocess.run(["hostname", "after"], check=True, timeout=10)
        os.kill(watchdog, signal.SIGKILL)
        until(lambda: stack.pid("watchdog") not in (0, watchdog), "another watchdog")
        until(lambda: stack.status().verdict == rpb.VERDICT_HEALTHY, "its first verdict")
        assert (stack.status().worker_id, stack.pid("worker"), stack.restarts()) == ("before:worker", worker, [])
        os.kill(worker, signal.SIGKILL)
        until(lambda: stack.recovered(1), "recovery", 60)
        assert [event.worker_id for event in stack.restarts()] == ["before:worker"]


def test_a_machine_has_one_id(tmp_path: Path) -> None:
    """Programs of one home that start at the same time agree on the machine's id, and so do later ones."""
    program = (
        "from pathlib import Path; import sys; from service import machine; print(machine.settle(Path(sys.argv[1])))"
    )
    command = [BIN / "python", "-c", program, tmp_path / "home"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=BIN.parents[1]) for _ in range(4)]
    told = {process.communicate(timeout=60)[0] for process in running}
    assert len(told) == 1
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["machine-id"]
