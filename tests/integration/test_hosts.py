"""Hosts as things: listed from any gateway, drained and given work again, forgotten; losses are reported by others."""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from unittest.mock import Mock
from uuid import NAMESPACE_OID, uuid4, uuid5

import peewee
import pytest
from pydantic import SecretStr

from service import machine
from service.clock import SystemClock
from service.config import Settings
from service.db import heartbeats, hosts, losses, schema, server_beats, watchdogs
from service.db.availability import DatabaseAwayError
from service.db.connection import Database
from service.db.database_clock import DatabaseClock
from service.db.heartbeats import Beat, Phase
from service.gateway.housekeeping import Housekeeping
from service.gateway.metrics import GatewayCollector
from service.insight.host_messages import host_message
from service.insight.presence import MOST_GONE, Presence
from service.insight.routing import Freshness
from service.machine import Place
from tests.support.batches import finished, lines, refused
from tests.support.namespaces import own_name
from tests.support.ports import free_port
from tests.support.sentry_receiver import receiving
from tests.support.servers import Stack, new_stack
from tests.support.stacks import BIN
from tests.support.waiting import until
from vllm_batch import Client
from vllm_batch.v1 import host_service_pb2 as pb
from watchdog.alerts import Alerts
from watchdog.host import Host as Guards
from watchdog.neighbours import Neighbours
from watchdog.self_report import Report
from watchdog.supervisor import Supervisor

LIMIT_S = 60.0
NOWHERE = Place()
# What is gone in a test, and of which kind it is.
LOST = (("lost", "host"), ("rare", "model"), ("half", "watchdog"))


@pytest.fixture(scope="module")
def fleet(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A gateway here, and a worker on each of the hosts `alpha` and `beta`."""
    with new_stack(postgres, tmp_path_factory.mktemp("fleet")) as stack:
        stack.gateway()
        for name in ("alpha", "beta"):
            with own_name(name):
                # Sockets and logs of both are in one folder, so their names differ.
                stack.worker(f"worker-{name}", window=8, simulated_window=8)
        with Client(stack.target) as client:
            until(lambda: {"alpha", "beta"} <= {one.name for one in client.hosts() if serves(one)}, "both")
        stack.wait_until_accepting()
        yield stack


def serves(host: pb.Host) -> bool:
    return any(worker.phase == "ready" for worker in host.workers)


def command(stack: Stack, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """A `vllm-batch` command at the stack's gateway."""
    return subprocess.run(
        [str(BIN / "vllm-batch"), "--target", stack.target, *arguments], capture_output=True, text=True, timeout=60
    )


def holders(database: Database) -> set[str]:
    """The workers that have a lease."""
    rows = database.call(
        lambda db: db.execute_sql("SELECT DISTINCT worker_id FROM chunks WHERE state = 'leased'").fetchall()
    )
    return {name for (name,) in rows}


def test_every_host_is_listed_from_a_gateway(fleet: Stack) -> None:
    """The gateway lists the hosts of all programs with their versions, by name and by page; so does the command."""
    with Client(fleet.target) as client:
        found = {host.name: host for host in client.hosts()}
        [alone] = client.hosts("beta")
        assert list(client.hosts("gamma")) == []
    assert len(found) == 3
    for name in ("alpha", "beta"):
        [worker] = found[name].workers
        [program] = found[name].programs
        assert (worker.worker_id, worker.phase, list(worker.models)) == (f"{name}:worker-{name}", "ready", ["tiny"])
        assert (program.version, program.schema_version) == (schema.VERSION, schema.known())
        assert found[name].state == pb.HOST_STATE_ALIVE
        assert list(found[name].notes) == ["no watchdog guards its workers"]
    assert alone.name == "beta"
    [own] = found.keys() - {"alpha", "beta"}
    assert [program.name for program in found[own].programs] == ["gateway"]
    shown = command(fleet, "hosts").stdout
    assert "alpha" in shown
    assert "worker-beta ready" in shown


def test_a_drained_host_gets_nothing_and_gives_back(fleet: Stack) -> None:
    """`hosts drain --wait` returns once the host holds nothing; batches go to others until `hosts resume`."""
    database, gateway = Database(fleet.database_url, "test"), fleet.servers[0]
    try:
        with Client(fleet.target) as client:
            batch = client.submit_lines(lines(600, vllm_xargs={"simulate": 0.2}))
            until(lambda: len(holders(database)) == 2, "both hosts to work")
            done = command(fleet, "hosts", "drain", "alpha", "--wait", "--reason", "new disk")
            assert done.returncode == 0, done.stderr
            assert holders(database) == {"beta:worker-beta"}
            [alpha] = client.hosts("alpha")
            assert (alpha.drain.is_complete, alpha.drain.held, alpha.drain.reason) == (True, 0, "new disk")
            assert "drained (new disk)" in command(fleet, "hosts").stdout
            before = len(gateway.events("batch_forwarded"))
            for _ in range(4):
                client.submit_lines(lines(1))
            forwarded = gateway.events("batch_forwarded")[before:]
            assert {event["worker_id"] for event in forwarded} == {"beta:worker-beta"}
            assert holders(database) == {"beta:worker-beta"}
            # Now it is the only one: what it does not get, waits and says why.
            client.drain_host("beta")
            until(lambda: "drained" in client.accepting(), "new work to be refused")
            until(lambda: "drained" in client.get(batch.id).wait.message, "the batch to say what it waits for")
            assert command(fleet, "hosts", "resume", "alpha").returncode == 0
            until(lambda: holders(database) == {"alpha:worker-alpha"}, "the host to work again")
            # It has not ended: if it dies later, what is in its engine counts a death.
            assert not [*fleet.folder.rglob("*.farewell")]
            client.resume_host("beta")
            assert finished(client, batch.id).counts.completed == 600
            kinds = database.call(
                lambda db: db.execute_sql("SELECT worker_id, kind FROM recovery_events ORDER BY id").fetchall()
            )
            assert kinds == [(name, f"host_{what}") for what in ("drained", "resumed") for name in ("alpha", "beta")]
    finally:
        database.close()


def test_an_order_to_drain_outlasts_who_waits_for_it(fleet: Stack) -> None:
    """Ctrl-C ends `--wait` and not the order, and says so; the order given again keeps its reason."""
    with Client(fleet.target) as client:
        batch = client.submit_lines(lines(16, vllm_xargs={"simulate": 60}))
        until(lambda: client.get(batch.id).counts.running == 16, "both hosts to work")
        whole = [
            str(BIN / "vllm-batch"),
            "--target",
            fleet.target,
            "hosts",
            "drain",
            "alpha",
            "--wait",
            "--reason",
            "disk",
        ]
        with subprocess.Popen(whole, stderr=subprocess.PIPE, text=True) as waiting:
            assert waiting.stderr is not None
            until(lambda: next(client.hosts("alpha")).HasField("drain"), "the order")
            assert "alpha holds" in waiting.stderr.readline()
            waiting.send_signal(signal.SIGINT)
            told = waiting.communicate(timeout=30)[1]
        assert waiting.returncode == 130
        assert "the order holds; `vllm-batch hosts resume alpha` takes it back" in told
        client.drain_host("alpha")
        assert next(client.hosts("alpha")).drain.reason == "disk"
        client.cancel(batch.id)
        client.resume_host("alpha")


def test_a_host_is_forgotten_only_when_it_is_gone(fleet: Stack) -> None:
    """Orders about unknown hosts, `resume` without an order and `forget` of a living host are refused in words; so is
    `forget` of one that has just been stopped, in others."""
    with Client(fleet.target, patience_s=0) as client:
        assert "'gamma' does not exist" in refused(lambda: client.drain_host("gamma")).message
        assert "is not drained" in refused(lambda: client.resume_host("alpha")).message
        assert "is alive: its worker-alpha was seen" in refused(lambda: client.forget_host("alpha")).message
        database = Database(fleet.database_url, "test")
        beat(database, "gone:worker", phase=Phase.STOPPING)
        why = refused(lambda: client.forget_host("gone")).message
        assert "was last seen 0 s ago; wait until that is" in why
        age(database, "gone", 100)
        assert "gone" in {host.name for host in client.hosts()}
        assert command(fleet, "hosts", "forget", "gone").returncode == 0
        assert "gone" not in {host.name for host in client.hosts()}
        database.close()


def test_status_counts_the_hosts(fleet: Stack) -> None:
    """`status` says how many hosts are there and names those that are lost, beside the workers of one watchdog; in JSON
    each of them."""
    asked = ("status", "--watchdog-target", f"127.0.0.1:{free_port()}")
    database = Database(fleet.database_url, "test")
    try:
        assert "hosts     3 of 3 there (vllm-batch hosts)" in command(fleet, *asked).stdout
        beat(database, "gone:worker", "tiny")
        age(database, "gone", 100)
        assert "hosts     3 of 4 there; lost: gone (vllm-batch hosts)" in command(fleet, *asked).stdout
        states = {host["name"]: host["state"] for host in json.loads(command(fleet, *asked, "--json").stdout)["hosts"]}
        assert (len(states), states["alpha"], states["gone"]) == (4, "HOST_STATE_ALIVE", "HOST_STATE_LOST")
    finally:
        database.close()
    assert command(fleet, "hosts", "forget", "gone").returncode == 0


def test_programs_that_end_because_their_parent_died_were_not_stopped(stack: Stack) -> None:
    """When supervisord is killed, its programs end in order, and yet the host is lost, and not stopped."""
    stack.prefix = ("sh", "-c", '"$@" & wait', "sh")
    servers = [stack.gateway(), stack.worker()]
    stack.wait_until_accepting()
    for server in servers:
        server.kill()
    until(lambda: servers[0].events("gateway_ended") and servers[1].events("worker_ended"), "both to end")
    database = Database(stack.database_url, "test")
    [host] = database.call(hosts.read, 2)
    assert {program.program: program.is_ended for program in host.programs} == {"gateway": False, "worker": False}
    assert host.state(0) is hosts.State.LOST
    assert dict(database.call(hosts.survey, 0).counts) == {"lost": 1}
    database.close()


def beat(database: Database, worker_id: str, *models: str, phase: Phase = Phase.READY, place: Place = NOWHERE) -> None:
    # One life: another would first have to take the name over.
    life = uuid5(NAMESPACE_OID, worker_id)
    assert database.call(heartbeats.write, Beat(worker_id, life, "a:1", phase, 1, models, place=place))


def age(database: Database, host: str, age_s: float) -> None:
    """Makes everything that was seen of a host older."""

    def make_older(db: peewee.PostgresqlDatabase) -> None:
        for table, name in (("heartbeats", "worker_id"), ("watchdogs", "watchdog_id"), ("servers", "server_id")):
            db.execute_sql(
                f"UPDATE {table} SET last_seen = last_seen - make_interval(secs => %s) WHERE host_of({name}) = %s",
                (age_s, host),
            )

    database.call(make_older)


def watching(database: Database, host: str, alerts: Alerts) -> Neighbours:
    """The watchdog of a host, which has beaten for long enough to judge others."""
    nowhere = Supervisor("unix:///nowhere", 1)
    report = Report(nowhere, Guards(nowhere, Mock()), Guards(nowhere, Mock()), 10, list)
    found = Neighbours(database, host, "", report, LIMIT_S, 1000, LIMIT_S, SystemClock(), alerts, lambda: None)
    found.beat()
    found._database_clock = DatabaseClock(0, 1000)
    return found


def looking(
    database: Database, monkeypatch: pytest.MonkeyPatch, own: Neighbours
) -> Callable[..., list[tuple[str, str]]]:
    """Has a watchdog that has just been started look at some time, and returns the events that there are then.

    Postgres' clock was set by `set_by_s`.
    """
    clock = Mock(now=SystemClock().now)
    monkeypatch.setattr("service.db.recoveries.uptime_s", lambda db: 1e6)
    own.clock = clock
    own.__post_init__()

    def look(now_s: float, set_by_s: float = 0) -> list[tuple[str, str]]:
        clock.monotonic.return_value = now_s
        monkeypatch.setattr("service.db.chunks.time_s", lambda db: now_s + set_by_s)
        own.look()
        return events(database)

    return look


def events(database: Database) -> list[tuple[str, str]]:
    rows = database.call(
        lambda db: db.execute_sql("SELECT worker_id, kind FROM recovery_events ORDER BY id").fetchall()
    )
    return [(host, kind) for host, kind in rows]


def test_one_of_those_left_reports_what_is_gone(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost host, its model and a dead watchdog are in the audit log and at Sentry once, and once they are back."""
    monkeypatch.setattr("service.db.recoveries.uptime_s", lambda db: 1e6)
    with receiving() as receiver:
        alerts = Alerts(Settings(sentry_dsn=SecretStr(receiver.dsn)))
        left = [watching(database, name, alerts) for name in ("left", "other")]
        database.call(watchdogs.write, "lost", 1)
        database.call(watchdogs.write, "half", 1)
        database.call(watchdogs.write, "stopped", 1)
        database.call(watchdogs.end, "stopped", 1)
        database.call(server_beats.write, "drained:gateway", "gateway", "a:1", 1)
        database.call(hosts.drain, "drained", "")
        beat(database, "lost:worker", "rare", "common")
        for name in ("lost", "half", "stopped", "drained"):
            age(database, name, 100)
        beat(database, "half:worker", "common")
        for each in (*left, *left):
            each.look()
        assert events(database)[1:] == [(subject, f"{kind}_lost") for subject, kind in LOST]
        until(lambda: len(receiver.events) == 3, "three alerts")
        found = left[0].survey
        assert {(loss.kind, loss.subject) for loss in found.lost} == {(kind, host) for host, kind in LOST}
        assert found.counts == {"alive": 3, "stopped": 2, "lost": 1}
        beat(database, "lost:worker", "rare")
        database.call(watchdogs.write, "half", 1)
        database.call(watchdogs.write, "lost", 2)
        for each in left:
            each.look()
        assert set(events(database)[4:]) == {(subject, f"{kind}_back") for subject, kind in LOST}
        alerts.close()
        assert len(receiver.events) == 3


def test_what_gateways_saw_of_earlier_lives_is_removed(database: Database) -> None:
    """Once nobody repeats that a worker is reached or not, as after it was stopped, it is removed."""
    old, new = uuid4(), uuid4()
    database.call(losses.report, "b:gateway", {old: False, new: False})
    sql = "UPDATE losses SET report_time = report_time - interval '2 hours' WHERE incarnation = %s"
    database.call(lambda db: db.execute_sql(sql, (str(old),)))
    watching(database, "left", Alerts(Settings())).look()
    assert database.call(lambda db: db.execute_sql("SELECT incarnation FROM losses").fetchall()) == [(new,)]


def test_after_an_outage_nobody_is_reported(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A watchdog whose own beats have just begun to arrive waits until every host had time for another one."""
    alerts = Alerts(Settings())
    own = watching(database, "left", alerts)
    look = looking(database, monkeypatch, own)
    for now_s in (0, LIMIT_S):
        assert look(now_s) == []
    with monkeypatch.context() as away:
        away.setattr(watchdogs, "write", Mock(side_effect=DatabaseAwayError("away"), __name__="write"))
        own.beat()
    beat(database, "lost:worker", "rare")
    age(database, "lost", 100)
    assert look(LIMIT_S + 1) == []
    assert len(own.survey.lost) == 2
    assert look(2 * LIMIT_S + 1) == [("lost", "host_lost"), ("rare", "model_lost")]
    alerts.close()


def test_a_watchdog_that_looks_rarely_reports_too(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """With heartbeats that count as lost sooner than others are looked at again, what is gone is reported too."""
    alerts = Alerts(Settings())
    own = watching(database, "left", alerts)
    # The least for beats every 20 s, and three of them.
    own.timeout_s, own.interval_s = 40.0, 60.0
    look = looking(database, monkeypatch, own)
    beat(database, "lost:worker", "rare")
    age(database, "lost", 100)
    assert look(0) == []
    assert look(60.5) == [("lost", "host_lost"), ("rare", "model_lost")]
    alerts.close()


def test_when_the_clock_of_postgres_is_set_nobody_is_reported(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All heartbeats look old after a jump of the clock: the watchdog waits until every host had time for another."""
    alerts = Alerts(Settings())
    look = looking(database, monkeypatch, watching(database, "left", alerts))
    for now_s in (0, LIMIT_S):
        assert look(now_s) == []
    beat(database, "lost:worker", "rare")
    age(database, "lost", 100)
    assert look(LIMIT_S + 1, 100) == []
    assert look(2 * LIMIT_S + 1, 100) == [("lost", "host_lost"), ("rare", "model_lost")]
    alerts.close()


def test_two_machines_of_one_name_are_told(database: Database) -> None:
    """A watchdog whose name another machine's has says so once, when that one cannot be gone; `hosts` notes it too."""
    clock = Mock(now=SystemClock().now)
    with receiving() as receiver:
        alerts = Alerts(Settings(sentry_dsn=SecretStr(receiver.dsn)))
        database.call(watchdogs.write, "twice", 1, "first", {"network": "n1", "address": "10.0.0.1"})
        own = watching(database, "twice", alerts)
        own.machine, own.clock, own._namesake_since_s = "second", clock, None
        # Nor does its end touch the first, whose pid is the same in many containers.
        database.call(lambda db: db.execute_sql("UPDATE watchdogs SET pid = %s", (os.getpid(),)))
        own.end()
        beat(database, "twice:worker", "tiny", place=Place("second", "", "n2"))
        for clock.monotonic.return_value in (0.0, 70.0, 80.0, 200.0):
            own.beat()
        [first] = database.call(watchdogs.read)
        assert (first.machine, first.is_ended) == ("first", False)
        [host] = database.call(hosts.read, 1)
        told = "2 machines have this name (watchdog at 10.0.0.1 and worker at a:1): give each host a name of its own"
        assert any(note.startswith(told) for note in host_message(host, LIMIT_S, schema.known()).notes)
        alerts.close()
        assert len(receiver.events) == 1


def test_dead_hosts_cost_little_and_are_forgotten(database: Database) -> None:
    """What gateways read and export does not grow with hosts that are gone; those are forgotten by themselves."""

    def many(db: peewee.PostgresqlDatabase) -> None:
        db.execute_sql(
            "INSERT INTO heartbeats (worker_id, incarnation, address, phase, pid, models, detail, last_seen)"
            " SELECT 'dead' || n || ':worker', gen_random_uuid(), 'a:1', 'ready', 1, '{rare}', '{}',"
            " clock_timestamp() - make_interval(secs => 100 + n) FROM generate_series(1, 500) n"
        )
        db.execute_sql(
            "INSERT INTO recovery_events (worker_id, kind, verdict, reason, evidence, start_time)"
            " SELECT 'dead' || n || ':worker', 'verdict', '', '', '{}', clock_timestamp() - interval '1 day'"
            " FROM generate_series(1, 500) n"
        )

    database.call(many)
    beat(database, "alive:worker", "tiny")
    recent = database.call(heartbeats.read_recent, LIMIT_S, MOST_GONE)
    assert len(recent) == MOST_GONE
    assert "alive:worker" in {seen.beat.worker_id for seen in recent}

    async def ignore(_: bool) -> None:
        return None

    presence = Presence(database, None, SystemClock(), LIMIT_S, ignore, machine.here())  # type: ignore[arg-type]
    presence.freshness = Freshness(recent, SystemClock().monotonic())
    samples = [one for metric in GatewayCollector(presence, database, 60).collect() for one in metric.samples]
    ready = [one.labels for one in samples if one.name == "vllm_batch_worker_phase" and one.value]
    assert ready == [{"worker_id": "alive:worker", "phase": "ready"}]
    assert len([one for one in samples if one.name == "vllm_batch_lost_age_seconds"]) == hosts.MOST_LOST
    assert next(one.value for one in samples if one.name == "vllm_batch_hosts" and one.labels["state"] == "lost") == 500

    keeping = Housekeeping(database, retention_s=0, is_unserved=lambda models: False, host_forgotten_s=350)
    for _ in range(4):
        database.call(keeping.forget_hosts)
    left = database.call(hosts.read, 1000)
    # Seen before 101 to 600 s; some of them a few seconds ago in this test.
    assert 200 < len(left) <= 251
    assert "host_forgotten" in {kind for _, kind in events(database)}
    assert database.call(hosts.prune_events, 3600, 10_000) == 501 - len(left)
    assert "dead1:worker" in {host for host, _ in events(database)}


def test_a_gateway_ends_for_no_other_machine(database: Database) -> None:
    """Of two gateways of one name and pid, as in containers, the end of one is not taken for that of the other."""
    ended = []
    for address in ("10.0.0.1:1", "10.0.0.2:1"):
        database.call(server_beats.write, "a:gateway", "gateway", address, 7)
    for address in ("10.0.0.1:1", "10.0.0.2:1"):
        database.call(server_beats.end, "a:gateway", address, 7)
        ended += database.call(lambda db: db.execute_sql("SELECT is_ended FROM servers").fetchall())
    assert ended == [(False,), (True,)]
