"""The watchdog with real supervisord, real Postgres, and a stand-in worker that fails on request."""

import json
import mmap
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import psycopg2
import pytest
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service import processes
from service.clock import SystemClock
from service.config import Settings
from service.database_url import parse
from service.db import heartbeats, recoveries, watchdogs
from service.db.connection import Database
from service.db.recoveries import Event
from service.rpc import pages
from tests.support.ports import free_port
from tests.support.sentry_receiver import Receiver, receiving
from tests.support.servers import ROOT
from tests.support.standin_worker import is_alive
from tests.support.waiting import until
from vllm_batch.v1 import recovery_service_pb2 as pb
from vllm_batch.v1 import recovery_service_pb2_grpc
from watchdog.alerts import Alerts
from watchdog.guard import Snapshot
from watchdog.host import Host
from watchdog.observe.stall_detector import StallDetector
from watchdog.policy import Action, State, Verdict
from watchdog.supervisor import Supervisor, SupervisorAwayError
from watchdog.wiring import GuardFactory, limits_of

# Whose watchdog is asked for.
WORKER_ID = f"{socket.gethostname()}:worker"
CONF = """
[unix_http_server]
file={home}/run/supervisor.sock
[supervisord]
nodaemon=true
logfile={home}/supervisord.log
pidfile={home}/run/supervisord.pid
directory={root}
[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
[supervisorctl]
serverurl=unix://{home}/run/supervisor.sock
[program:worker]
command={command}
autorestart=false
startsecs=0
stopwaitsecs=600
redirect_stderr=true
stdout_logfile={home}/worker.log
"""


@dataclass
class SupervisedHost:
    """A supervisord with one worker, in a home of its own."""

    home: Path
    database: Database
    settings: Settings
    env: dict[str, str]
    supervisor: Supervisor
    guards: list[Host] = field(default_factory=list)
    children: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    def fault(self, name: str) -> Path:
        """Switches a fault on; unlink the returned path to end it."""
        path = self.home / "faults" / name
        path.touch()
        return path

    def lives(self) -> list[dict[str, Any]]:
        """What each life of the worker has reported about itself."""
        path = self.home / "lives"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def orphans(self) -> list[int]:
        """All children that lives of the worker have left behind."""
        path = self.home / "children"
        return [int(pid) for pid in path.read_text().split()] if path.exists() else []

    def shared_memory(self) -> list[Path]:
        """What a life of the worker has mapped: two files that it writes and one that it reads."""
        path = self.home / "mapped"
        return [Path(line) for line in path.read_text().splitlines()] if path.exists() else []

    def run(self, *arguments: str, **more: str) -> "subprocess.Popen[bytes]":
        """Starts a program in this home's environment; it is killed after the test."""
        with (self.home / "programs.log").open("ab") as log:
            self.children.append(subprocess.Popen(arguments, env=self.env | more, cwd=ROOT, stdout=log, stderr=log))
        return self.children[-1]

    def is_up(self) -> bool:
        """True when supervisord answers."""
        try:
            return bool(self.supervisor.processes("worker"))
        except SupervisorAwayError:
            return False

    def supervisorctl(self, *arguments: str) -> None:
        """Runs an operator's command."""
        command = [f"{sys.prefix}/bin/supervisorctl", "-c", str(self.home / "supervisord.conf"), *arguments]
        subprocess.run(command, check=True, timeout=30, cwd=ROOT, stdout=subprocess.DEVNULL)

    def guard(self, database: Database | None = None, clock: SystemClock | None = None) -> Host:
        """Starts guarding in this process, with short confirmation times."""
        limits = replace(
            limits_of(self.settings),
            confirm_interval_s=0.05,
            confirm_s=0.3,
            wedged_confirm_s=1,
            not_ready_confirm_s=3,
            restless_interval_s=0.1,
            backoff_s=0.1,
        )
        database = database or self.database
        alerts = Alerts(self.settings)
        clock = clock or SystemClock()
        factory = GuardFactory(
            self.settings, limits, self.supervisor, database, clock, StallDetector(clock), lambda: None, alerts
        )
        guards = Host(self.supervisor, factory.make)
        self.guards.append(guards)
        guards.discover()
        return guards

    def events(self) -> list[Event]:
        """The audit log, oldest first."""
        return self.database.call(recoveries.list_page, WORKER_ID, None, 1000)[::-1]

    def cut(self) -> None:
        """Breaks every connection to the database but ours."""
        self.database.call(
            lambda db: db.execute_sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )

    def restarts(self) -> list[Event]:
        """The restarts in the audit log, oldest first."""
        return [event for event in self.events() if event.kind == "restart"]


def snapshot(guards: Host) -> Snapshot | None:
    return guards.by_worker[WORKER_ID].snapshot


def until_verdict(guards: Host, verdict: Verdict, look: Callable[[Snapshot], bool] = lambda _: True) -> Snapshot:
    """Waits until the guard has this verdict."""

    def seen() -> Snapshot | None:
        now = snapshot(guards)
        return now if now is not None and now.decision.verdict is verdict and look(now) else None

    return until(seen, verdict)  # type: ignore[return-value]


def until_healthy(guards: Host) -> int:
    """Waits until the worker is healthy and no restart is open. Returns its pid."""
    now = until_verdict(guards, Verdict.HEALTHY, lambda seen: seen.intent is None)
    return now.evidence.process.pid if now.evidence.process else 0


def look_again(guards: Host, times: int = 3) -> list[Snapshot]:
    """Has the guard check several more times, and returns what it saw."""
    seen = []
    for _ in range(times):
        before = snapshot(guards)
        guards.by_worker[WORKER_ID].wake()
        seen.append(until(lambda before=before: (now := snapshot(guards)) is not before and now, "another check"))  # type: ignore[misc]
    return seen  # type: ignore[return-value]


@pytest.fixture
def host(database: Database, database_url: str, request: pytest.FixtureRequest) -> Iterator[SupervisedHost]:
    """A supervisord with a worker that has just been started, through a shell if the parameter says so."""
    command = f"{sys.executable} -m tests.support.standin_worker"
    if getattr(request, "param", None) == "through a shell":
        command = f"sh -c '{command}; true'"
    with tempfile.TemporaryDirectory(prefix="vbw-", ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        (home / "run").mkdir()
        (home / "faults").mkdir()
        (home / "supervisord.conf").write_text(CONF.format(home=home, root=ROOT, command=command))
        given: dict[str, Any] = {
            "home": home,
            "worker_port": free_port(),
            "watchdog_port": free_port(),
            "watchdog_metrics_port": 0,
            "heartbeat_interval_s": 0.1,
            "heartbeat_timeout_s": 1,
            "check_interval_s": 1,
            "probe_timeout_s": 0.5,
            "stop_timeout_s": 1,
            "max_restarts_per_hour": 3,
        }
        settings = Settings(**(given | {"DATABASE_URL": database_url}))
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("BATCH_", "SUPERVISOR_"))}
        env = kept | {
            "BATCH_ENV_FILE": "/dev/null",
            "DATABASE_URL": database_url,
            **{f"BATCH_{name.upper()}": str(value) for name, value in given.items()},
        }
        host = SupervisedHost(home, database, settings, env, Supervisor(settings.supervisor_url, 5))
        host.run(f"{sys.prefix}/bin/supervisord", "-c", str(home / "supervisord.conf"))
        try:
            until(host.is_up, "supervisord")
            yield host
        finally:
            for guards in host.guards:
                guards.stop()
            for child in host.children:
                child.kill()
                child.wait(10)
            processes.end(processes.marked(processes.Mark(home)), 5, (signal.SIGKILL,))
            for path in host.shared_memory():
                path.unlink(missing_ok=True)
            for pid in host.orphans():
                if is_alive(pid):
                    os.kill(pid, signal.SIGKILL)


def test_killed_worker_is_restarted_and_the_event_says_recovered(host: SupervisedHost) -> None:
    """SIGKILL leads to one restart, closed as recovered with the time of each phase and both incarnations."""
    guards = host.guard()
    pid = until_healthy(guards)
    os.kill(pid, signal.SIGKILL)
    until(lambda: len(host.lives()) == 2, "a second life")
    assert until_healthy(guards) != pid
    (event,) = host.restarts()
    assert (event.verdict, event.outcome) == ("CRASHED", "recovered")
    assert list(event.timings) == list(recoveries.PHASES)
    assert [str(event.old_incarnation), str(event.new_incarnation)] == [state["incarnation"] for state in host.lives()]
    assert event.end_time is not None
    assert event.evidence["process"]["state"] == "EXITED"


def test_exit_with_status_0_is_a_crash(host: SupervisedHost) -> None:
    """A worker that exits with status 0 is restarted too."""
    guards = host.guard()
    os.kill(until_healthy(guards), signal.SIGUSR1)
    until(lambda: len(host.lives()) == 2, "a second life")
    until_healthy(guards)
    assert [(event.verdict, event.outcome) for event in host.restarts()] == [("CRASHED", "recovered")]


def test_orphans_are_swept_before_the_next_life_and_nobody_else_is(host: SupervisedHost) -> None:
    """Orphans of the dead worker, marked or not, are gone before the next life starts, and nothing else is."""
    sleep = ["sleep", "1000"]
    marks = {"BATCH_HOME": str(host.home), "SUPERVISOR_PROCESS_NAME": "worker"}
    innocent = [
        subprocess.Popen(sleep),
        subprocess.Popen(sleep, env={}, start_new_session=True),
        subprocess.Popen(sleep, env=marks | {"BATCH_HOME": "/elsewhere"}),
        subprocess.Popen(sleep, env=marks | {"SUPERVISOR_PROCESS_NAME": "gateway"}),
    ]
    host.children += innocent
    fault = host.fault("orphans")
    guards = host.guard()
    pid = until_healthy(guards)
    assert [is_alive(child) for child in host.orphans()] == [True] * 3
    fault.unlink()
    os.kill(pid, signal.SIGKILL)
    until(lambda: len(host.lives()) == 2, "a second life")
    assert host.lives()[1]["orphans"] == []
    assert all(child.poll() is None for child in innocent)


def test_leaked_shared_memory_is_gone_before_the_next_life_and_nothing_else_is(host: SupervisedHost) -> None:
    """Shared memory mapped for writing by the dead worker alone is removed; what others map, or it only read, stays."""
    fault = host.fault("shared_memory")
    guards = host.guard()
    pid = until_healthy(guards)
    leaked, shared, read = until(host.shared_memory, "the worker to map shared memory")
    look_again(guards)
    with leaked.open("rb"), shared.open("r+b") as file, mmap.mmap(file.fileno(), 0):
        fault.unlink()
        os.kill(pid, signal.SIGKILL)
        until(lambda: len(host.lives()) == 2, "a second life")
        assert (leaked.exists(), shared.exists(), read.exists()) == (False, True, True)
        until_healthy(guards)
    assert [event.outcome for event in host.restarts()] == ["recovered"]


def test_operator_stop_stays(host: SupervisedHost) -> None:
    """A worker stopped with supervisorctl stays stopped, even if it was loading after a restart of ours."""
    guards = host.guard()
    pid = until_healthy(guards)
    loading = host.fault("loading")
    os.kill(pid, signal.SIGKILL)
    until_verdict(guards, Verdict.STARTING, lambda seen: seen.intent is not None and seen.intent.step == "loading")
    host.supervisorctl("stop", "worker")
    until_verdict(guards, Verdict.OPERATOR_STOP)
    assert {seen.decision.action for seen in look_again(guards)} == {Action.HOLD}
    assert host.supervisor.info("worker:worker").state is State.STOPPED
    assert [event.outcome for event in host.restarts()] == ["superseded"]

    loading.unlink()
    host.supervisorctl("start", "worker")
    until_healthy(guards)
    assert len(host.restarts()) == 1


def test_lost_heartbeat_restarts(host: SupervisedHost) -> None:
    """A worker that serves but no longer beats is restarted."""
    guards = host.guard()
    until_healthy(guards)
    fault = host.fault("no_heartbeat")
    until(lambda: len(host.lives()) == 2, "a second life")
    fault.unlink()
    until_healthy(guards)
    assert [(event.verdict, event.outcome) for event in host.restarts()] == [("HEARTBEAT_LOST", "recovered")]


def test_refused_rpc_restarts(host: SupervisedHost) -> None:
    """A worker that beats but whose port is closed is restarted."""
    guards = host.guard()
    until_healthy(guards)
    fault = host.fault("no_rpc")
    until(lambda: len(host.lives()) == 2, "a second life")
    fault.unlink()
    until_healthy(guards)
    assert [(event.verdict, event.outcome) for event in host.restarts()] == [("RPC_WEDGED", "recovered")]


def test_stopped_process_is_killed_when_it_does_not_stop(host: SupervisedHost) -> None:
    """A worker under SIGSTOP, which cannot react to SIGTERM, is killed at the deadline and restarted."""
    guards = host.guard()
    os.kill(until_healthy(guards), signal.SIGSTOP)
    until(lambda: len(host.lives()) == 2, "a second life")
    until_healthy(guards)
    (event,) = host.restarts()
    assert event.verdict in ("FROZEN", "RPC_WEDGED")
    assert (event.outcome, is_alive(host.lives()[0]["pid"])) == ("recovered", False)


def test_loading_is_held(host: SupervisedHost) -> None:
    """A worker that is loading is left alone until it serves."""
    host.supervisorctl("stop", "worker")
    fault = host.fault("loading")
    guards = host.guard()
    host.supervisorctl("start", "worker")
    until_verdict(guards, Verdict.STARTING, lambda seen: seen.evidence.heartbeat is not None)
    assert {seen.decision.verdict for seen in look_again(guards, 10)} == {Verdict.STARTING}
    fault.unlink()
    until_healthy(guards)
    assert host.restarts() == []


@pytest.mark.parametrize("host", ["through a shell"], indirect=True)
def test_worker_behind_a_wrapper_and_on_another_port_is_found(host: SupervisedHost) -> None:
    """A worker behind a wrapper is recognized by its process group, and probed at the address in its heartbeat."""
    host.settings = host.settings.model_copy(update={"worker_port": free_port()})
    guards = host.guard()
    pid = until_healthy(guards)
    assert pid != until(host.lives, "the worker's first life")[0]["pid"]
    assert {seen.decision.verdict for seen in look_again(guards)} == {Verdict.HEALTHY}


def test_interrupted_restart_is_finished_by_the_next_watchdog(host: SupervisedHost) -> None:
    """A restart interrupted between stop and start is finished, including the sweep, at no further cost of budget."""
    fault = host.fault("orphans")
    in_group, _, out_of_group = until(lambda: host.orphans(), "the first life and its children")
    fault.unlink()
    until(lambda: host.database.call(heartbeats.read, WORKER_ID), "the worker's heartbeat")
    host.supervisor.stop("worker:worker")
    until(lambda: host.supervisor.info("worker:worker").state is State.STOPPED, "the worker to stop")
    now, timings = datetime.now(UTC), {"detect": 1.0}
    intent = Event(
        0, uuid4(), WORKER_ID, "restart", "FROZEN", "test", {}, "stopping", "open", timings, now, None, None, None
    )
    host.database.call(recoveries.put, intent)

    guards = host.guard()
    until_healthy(guards)
    (event,) = host.restarts()
    assert (event.verdict, event.outcome) == ("FROZEN", "recovered")
    assert list(event.timings) == ["detect", "stop", "sweep", "gpu", "start", "load"]
    assert len(host.lives()) == 2
    assert not {in_group, out_of_group} & set(host.lives()[1]["orphans"])
    assert until_verdict(guards, Verdict.HEALTHY).budget_left == host.settings.max_restarts_per_hour - 1


class Watchdog:
    """The watchdog's own process, and its RPCs."""

    def __init__(self, host: SupervisedHost, **env: str) -> None:
        self.process = host.run(sys.executable, "-m", "watchdog", **env)
        self._channel = grpc.insecure_channel(f"127.0.0.1:{host.settings.watchdog_port}")
        self.recovery = recovery_service_pb2_grpc.RecoveryServiceStub(self._channel)
        self.health = health_pb2_grpc.HealthStub(self._channel)
        grpc.channel_ready_future(self._channel).result(timeout=30)

    def worker(self) -> pb.WorkerStatus:
        """The watchdog's status of the worker."""
        workers = self.recovery.GetStatus(pb.GetStatusRequest(), timeout=5).workers
        return workers[0] if workers else pb.WorkerStatus()

    def until(self, verdict: pb.Verdict, action: pb.Action = pb.ACTION_HOLD) -> pb.WorkerStatus:
        """Waits until the watchdog reports this."""

        def said() -> pb.WorkerStatus | None:
            now = self.worker()
            return now if (now.verdict, now.action) == (verdict, action) and not now.HasField("intent") else None

        return until(said, pb.Verdict.Name(verdict))  # type: ignore[return-value]

    def is_serving(self) -> bool:
        """True if its health is SERVING, which must be the same under both names."""
        names = ("", "vllm_batch.v1.RecoveryService")
        said = [self.health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5).status for name in names]
        assert said[0] == said[1]
        return bool(said[0] == health_pb2.HealthCheckResponse.SERVING)

    def kill(self) -> None:
        """Kills it with SIGKILL."""
        self._channel.close()
        self.process.kill()
        self.process.wait(10)


@pytest.mark.parametrize("ends", [True, False], ids=["it stops", "it is still stopping"])
def test_watchdog_killed_between_stop_and_start_is_finished_by_its_successor(host: SupervisedHost, ends: bool) -> None:
    """If the watchdog is killed while a worker is being stopped, its successor finishes the restart.

    A worker that does not stop is killed by the successor, long before supervisord would.
    """
    watchdog = Watchdog(host, BATCH_STOP_TIMEOUT_S="30")
    pid = watchdog.until(pb.VERDICT_HEALTHY).pid
    os.kill(pid, signal.SIGSTOP)
    until(lambda: host.supervisor.info("worker:worker").state is State.STOPPING, "the watchdog to stop the worker")
    watchdog.kill()
    if ends:
        os.kill(pid, signal.SIGCONT)
        until(lambda: host.supervisor.info("worker:worker").state is State.STOPPED, "the worker to stop")
    assert [event.outcome for event in host.restarts()] == ["open"]

    status = Watchdog(host).until(pb.VERDICT_HEALTHY)
    assert status.pid != pid
    assert [event.outcome for event in host.restarts()] == ["recovered"]
    assert status.budget_left == host.settings.max_restarts_per_hour - 1


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """A local stand-in for Sentry."""
    with receiving() as server:
        yield server


def test_spent_budget_gives_up_across_deaths_of_the_watchdog_until_reset(
    host: SupervisedHost, receiver: Receiver
) -> None:
    """Once the budget is exhausted, the watchdog and its successors hold and are NOT_SERVING until ResetBudget.

    Sentry gets each failure, the end of the budget and the recovery, once.
    """
    few = {"BATCH_MAX_RESTARTS_PER_HOUR": "2", "SENTRY_DSN": receiver.dsn}
    watchdog = Watchdog(host, **few)
    pid = watchdog.until(pb.VERDICT_HEALTHY).pid
    assert watchdog.is_serving()
    crash = host.fault("crash")
    os.kill(pid, signal.SIGKILL)
    status = watchdog.until(pb.VERDICT_CRASHED, pb.ACTION_GIVE_UP)
    assert (status.gave_up, status.budget_left, status.budget_limit) == (True, 0, 2)
    until(lambda: not watchdog.is_serving(), "health to be NOT_SERVING")
    assert [event.kind for event in host.events() if event.kind != "verdict"] == ["restart", "restart", "gave_up"]
    assert [event.outcome for event in host.restarts()] == ["failed", "failed"]
    assert len(host.lives()) == 3

    watchdog.kill()
    host.database.call(
        lambda db: db.execute_sql("UPDATE recovery_events SET start_time = start_time - '2 h'::interval")
    )
    watchdog = Watchdog(host, **few)
    assert watchdog.until(pb.VERDICT_CRASHED, pb.ACTION_GIVE_UP).gave_up
    until(lambda: not watchdog.is_serving(), "health to be NOT_SERVING")
    assert len(host.lives()) == 3

    crash.unlink()
    watchdog.recovery.ResetBudget(pb.ResetBudgetRequest(reason="the disk is repaired"), timeout=5)
    assert not watchdog.until(pb.VERDICT_HEALTHY).gave_up
    until(watchdog.is_serving, "health to be SERVING")
    until(lambda: len(receiver.events) == 4, "all alerts")
    assert [event["fingerprint"] for event in receiver.events] == [
        ["recovery_failed", "CRASHED"],
        ["recovery_failed", "CRASHED"],
        ["budget_spent", "CRASHED"],
        ["worker_recovered", "CRASHED"],
    ]
    told = receiver.events[-1]["contexts"]["recovery"]
    assert (told["evidence"]["process"]["state"], set(told["timings"]) >= {"stop", "load"}) == ("EXITED", True)
    assert host.settings.postgres_url.encode() not in receiver.raw


def test_pause_holds_and_resume_lets_go(host: SupervisedHost) -> None:
    """While recovery is paused a crash is not acted on, not even by the next watchdog; after resuming it is."""
    watchdog = Watchdog(host)
    pid = watchdog.until(pb.VERDICT_HEALTHY).pid
    for bad in (
        pb.PauseRecoveryRequest(reason="x"),
        pb.PauseRecoveryRequest(duration=Duration(seconds=60)),
        pb.PauseRecoveryRequest(duration=Duration(seconds=24 * 3600 + 1), reason="x"),
        pb.PauseRecoveryRequest(duration=Duration(seconds=60), reason="x\0"),
    ):
        with pytest.raises(grpc.RpcError) as refused:
            watchdog.recovery.PauseRecovery(bad, timeout=5)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    pause = pb.PauseRecoveryRequest(duration=Duration(seconds=600), reason="new driver", worker_id=WORKER_ID)
    end = watchdog.recovery.PauseRecovery(pause, timeout=5).end_time
    watchdog.until(pb.VERDICT_PAUSED)
    os.kill(pid, signal.SIGKILL)
    until(lambda: host.supervisor.info("worker:worker").state is State.EXITED, "the worker to die")
    watchdog.kill()
    watchdog = Watchdog(host)
    status = watchdog.until(pb.VERDICT_PAUSED)
    assert (status.pause_end_time, status.pause_reason) == (end, "new driver")
    assert (len(host.lives()), host.restarts()) == (1, [])

    watchdog.recovery.ResumeRecovery(pb.ResumeRecoveryRequest(), timeout=5)
    assert watchdog.until(pb.VERDICT_HEALTHY).pid != pid
    assert len(host.lives()) == 2


def test_events_are_listed_in_pages_newest_first(host: SupervisedHost) -> None:
    """Pages of the audit log add up to the whole log, and invalid requests are rejected with the reason."""
    watchdog = Watchdog(host)
    os.kill(watchdog.until(pb.VERDICT_HEALTHY).pid, signal.SIGKILL)
    until(lambda: len(host.lives()) == 2, "a second life")
    watchdog.until(pb.VERDICT_HEALTHY)
    watchdog.recovery.ResetBudget(pb.ResetBudgetRequest(reason="for the test"), timeout=5)
    request = pb.ListEventsRequest(page_size=1, worker_id=WORKER_ID)
    listed: list[pb.RecoveryEvent] = []
    while True:
        page = watchdog.recovery.ListEvents(request, timeout=5)
        listed += page.events
        assert len(page.events) == 1
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert [event.id for event in listed] == [event.id for event in host.events()[::-1]]
    reset, restart = (event for event in listed if event.kind != "verdict")
    assert (reset.kind, reset.reason, reset.outcome) == ("budget_reset", "for the test", "")
    assert (restart.kind, restart.verdict, restart.outcome) == ("restart", pb.VERDICT_CRASHED, "recovered")
    assert [timing.phase for timing in restart.timings] == list(recoveries.PHASES)
    assert json.loads(restart.evidence_json)["process"]["state"] == "EXITED"
    for bad, why in (
        (pb.ListEventsRequest(page_token="x"), "page_token: is not a token issued by this method"),
        (pb.ListEventsRequest(page_token=str(listed[0].id)), "page_token: is not a token issued by this method"),
        (pb.ListEventsRequest(page_token=pages.token("batches", 1)), "page_token: is not a token"),
        (pb.ListEventsRequest(worker_id="\0"), "worker_id: must not contain NUL"),
        (pb.ListEventsRequest(page_size=1001), "page_size: is 1001, must be from 0 to 1000"),
        (pb.ListEventsRequest(page_size=-1), "page_size: is -1, must be from 0 to 1000"),
    ):
        with pytest.raises(grpc.RpcError, match=why) as refused:
            watchdog.recovery.ListEvents(bad, timeout=5)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not watchdog.recovery.ListEvents(pb.ListEventsRequest(worker_id="nobody"), timeout=5).events


def test_without_postgres_it_serves_and_restarts_what_died(host: SupervisedHost) -> None:
    """While Postgres is away crashes are still handled, within the budget across watchdogs, and recorded afterwards."""
    proxy = host.home / "pg"
    proxy.mkdir()
    real = host.settings.postgres_url
    real_socket = Path(real.split("host=")[1].split("&")[0]) / ".s.PGSQL.5432"
    way = proxy / real_socket.name
    through = {"DATABASE_URL": real.replace(str(real_socket.parent), str(proxy)), "BATCH_MAX_RESTARTS_PER_HOUR": "2"}

    watchdog = Watchdog(host, **through)
    pid = watchdog.until(pb.VERDICT_DATABASE_AWAY).pid
    os.kill(pid, signal.SIGKILL)
    # It cannot know yet what was spent before.
    assert "cannot be recorded" in watchdog.until(pb.VERDICT_CRASHED).reason
    assert host.run(sys.executable, "-m", "watchdog", "--check", **through).wait(30) == 1
    way.symlink_to(real_socket)
    pid = watchdog.until(pb.VERDICT_HEALTHY).pid

    way.unlink()
    host.cut()
    watchdog.until(pb.VERDICT_DATABASE_AWAY)
    with pytest.raises(grpc.RpcError) as refused:
        watchdog.recovery.ListEvents(pb.ListEventsRequest(), timeout=5)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    pause = pb.PauseRecoveryRequest(duration=Duration(seconds=600), reason="let me look")
    watchdog.recovery.PauseRecovery(pause, timeout=5)
    watchdog.kill()
    os.kill(pid, signal.SIGKILL)
    watchdog = Watchdog(host, **through)
    assert watchdog.until(pb.VERDICT_PAUSED).pause_reason == "let me look"
    watchdog.recovery.ResumeRecovery(pb.ResumeRecoveryRequest(), timeout=5)
    until(lambda: len(host.lives()) == 3, "a third life")
    # Without an intent: the restart has ended, so its outcome is in the journal.
    watchdog.until(pb.VERDICT_DATABASE_AWAY)
    watchdog.kill()
    os.kill(host.lives()[-1]["pid"], signal.SIGKILL)
    watchdog = Watchdog(host, **through)
    assert watchdog.until(pb.VERDICT_CRASHED, pb.ACTION_GIVE_UP).budget_left == 0
    assert (len(host.lives()), len(host.restarts())) == (3, 1)

    way.symlink_to(real_socket)
    until(lambda: host.database.call(recoveries.given_up, [WORKER_ID]) == {WORKER_ID}, "the journal to be merged")
    assert [event.kind for event in host.events() if event.kind != "verdict"] == [
        "restart",
        "paused",
        "resumed",
        "restart",
        "gave_up",
    ]
    watchdog.recovery.ResetBudget(pb.ResetBudgetRequest(reason="seen to"), timeout=5)
    watchdog.until(pb.VERDICT_HEALTHY)
    assert [event.outcome for event in host.restarts()] == ["recovered"] * 3


def test_postgres_that_takes_no_writes_is_away(host: SupervisedHost, database_url: str) -> None:
    """While Postgres is read-only no worker can beat: DATABASE_AWAY, and no restart however long it lasts."""
    own = Database(database_url, "guards")
    guards = host.guard(own)
    until_healthy(guards)
    name = parse(database_url)["dbname"]
    host.database.call(lambda db: db.execute_sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on"))
    # It applies to new sessions.
    host.cut()
    timeout_s = host.settings.heartbeat_timeout_s

    def age_s() -> float:
        return host.database.call(heartbeats.read, WORKER_ID)[0].age_s

    until(lambda: age_s() > 3 * timeout_s, "a heartbeat that is long stale")
    for seen in look_again(guards):
        assert (seen.decision.verdict, seen.decision.action) == (Verdict.DATABASE_AWAY, Action.HOLD)
    host.database.call(lambda db: db.execute_sql(f"ALTER DATABASE {name} RESET default_transaction_read_only"))
    host.cut()
    until_healthy(guards)
    assert (len(host.lives()), host.restarts()) == (1, [])
    own.close()


def test_a_heartbeat_that_others_have_locked_is_no_lost_one(host: SupervisedHost, database_url: str) -> None:
    """While an operator's open transaction has the worker's row locked: DATABASE_AWAY, and no restart."""
    own = Database(database_url, "guards", 0.3)
    guards = host.guard(own)
    until_healthy(guards)
    timeout_s = host.settings.heartbeat_timeout_s
    with psycopg2.connect(database_url) as operator, operator.cursor() as cursor:
        cursor.execute("SELECT FROM heartbeats FOR UPDATE")
        until(
            lambda: host.database.call(heartbeats.read, WORKER_ID)[0].age_s > 3 * timeout_s,
            "a heartbeat that is long stale",
        )
        for seen in look_again(guards):
            assert (seen.decision.verdict, seen.decision.action) == (Verdict.DATABASE_AWAY, Action.HOLD)
    until_healthy(guards)
    assert (len(host.lives()), host.restarts()) == (1, [])
    own.close()


@pytest.mark.parametrize(
    ("refuse", "allow"),
    [
        # A role's lock, a changed password or pg_hba.conf, or no connection that is free: those that there are stay.
        ("ALTER DATABASE {name} ALLOW_CONNECTIONS false", "ALTER DATABASE {name} ALLOW_CONNECTIONS true"),
        (
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql"
            " AS $$ BEGIN RAISE EXCEPTION USING ERRCODE = '42501'; END $$;"
            "CREATE TRIGGER refuse BEFORE INSERT ON heartbeats FOR EACH STATEMENT EXECUTE FUNCTION refuse()",
            "DROP FUNCTION refuse CASCADE",
        ),
    ],
    ids=["new sessions", "inserts"],
)
def test_postgres_that_refuses_only_the_worker_is_away(
    host: SupervisedHost, database_url: str, postgres: str, refuse: str, allow: str
) -> None:
    """While Postgres serves the watchdog but refuses what the worker needs to beat, a new session or the right to write
    its row: DATABASE_AWAY, and no restart."""
    own = Database(database_url, "guards", 2)
    guards = host.guard(own)
    until_healthy(guards)
    timeout_s, name = host.settings.heartbeat_timeout_s, parse(database_url)["dbname"]
    # No database can be closed to new sessions from within.
    with closing(psycopg2.connect(postgres % "postgres")) as outside, closing(psycopg2.connect(database_url)) as inside:
        outside.autocommit = inside.autocommit = True
        admin = (outside if "ALTER DATABASE" in refuse else inside).cursor()
        admin.execute(refuse.format(name=name))
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE '%standin'")

        def is_stale() -> bool:
            with inside.cursor() as cursor:
                cursor.execute(
                    "SELECT clock_timestamp() - last_seen > make_interval(secs => %s) FROM heartbeats", (3 * timeout_s,)
                )
                return bool(cursor.fetchone()[0])

        until(is_stale, "a heartbeat that is long stale")
        for seen in look_again(guards):
            assert (seen.decision.verdict, seen.decision.action) == (Verdict.DATABASE_AWAY, Action.HOLD)
        admin.execute(allow.format(name=name))
    until_healthy(guards)
    assert (len(host.lives()), host.restarts()) == (1, [])
    own.close()


class SetClock(SystemClock):
    """The system clock, set forward by `set_by_s`."""

    set_by_s = 0.0

    def now(self) -> datetime:
        return super().now() + timedelta(seconds=self.set_by_s)


def test_a_clock_that_is_set_restarts_nobody_and_gives_no_budget_back(host: SupervisedHost) -> None:
    """When the clocks are set back or forward by an hour, nothing is restarted, and the restart of before still counts
    against the budget, for this watchdog and the next."""
    clock = SetClock()
    guards = host.guard(clock=clock)
    os.kill(until_healthy(guards), signal.SIGKILL)
    until(lambda: len(host.lives()) == 2, "a second life")
    until_healthy(guards)
    for hours in (-1, 1):
        clock.set_by_s = 3600.0 * hours
        # As if the database's clock had been set, too.
        host.database.call(
            lambda db, hours=hours: db.execute_sql(  # type: ignore[misc]
                f"UPDATE heartbeats SET last_seen = last_seen - interval '{hours} hour',"
                f" start_time = start_time - interval '{hours} hour'"
            )
        )
        look_again(guards, 5)
        until_healthy(guards)
        guards.stop()
        guards = host.guard(clock=clock)
        until_healthy(guards)
        assert until_verdict(guards, Verdict.HEALTHY).budget_left == 2
    assert (len(host.lives()), len(host.restarts())) == (2, 1)


def test_command_line_shows_and_orders(host: SupervisedHost) -> None:
    """`vllm-batch recovery` prints the state and the audit log, and its orders take effect."""
    watchdog = Watchdog(host)
    watchdog.until(pb.VERDICT_HEALTHY)

    def run(*arguments: str, status: int = 0) -> str:
        target = ["--watchdog-target", f"127.0.0.1:{host.settings.watchdog_port}"]
        command = [f"{sys.prefix}/bin/vllm-batch", "recovery", *target, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=host.env | {"COLUMNS": "400"})
        assert done.returncode == status, done.stderr
        return done.stdout + done.stderr

    assert re.search(rf"{WORKER_ID} +HEALTHY +RUNNING pid \d+ +health SERVING .* budget 3/3", run("status"))
    assert run("pause", "new driver", "--minutes", "5").startswith("paused until ")
    watchdog.until(pb.VERDICT_PAUSED)
    assert "new driver" in run("status")
    run("resume", "--worker", WORKER_ID)
    watchdog.until(pb.VERDICT_HEALTHY)
    run("reset", "for the test")
    said = [json.loads(line) for line in run("events", "--json").splitlines()]
    assert [event["kind"] for event in said if event["kind"] != "verdict"] == ["budget_reset", "resumed", "paused"]
    assert len(run("events", "--limit", "2").splitlines()) == 2
    assert "host:nobody" in run("resume", "--worker", "host:nobody", status=3)
    watchdog.kill()
    assert "Traceback" not in run("status", status=4)


def test_dry_run_says_what_it_would_do_and_does_nothing(host: SupervisedHost) -> None:
    """`--dry-run` reports what it would do about a dead worker, but starts, records and serves nothing."""
    host.run(sys.executable, "-m", "watchdog", "--dry-run")

    def decisions() -> list[tuple[str, str]]:
        lines = (host.home / "programs.log").read_text().splitlines()
        said = [json.loads(line) for line in lines if '"would_decide"' in line]
        return [(line["verdict"], line["action"]) for line in said]

    until(lambda: ("HEALTHY", "HOLD") in decisions(), "the dry run to see the worker")
    os.kill(host.lives()[0]["pid"], signal.SIGKILL)
    until(lambda: decisions()[-1] == ("CRASHED", "RESTART"), "the dry run to see the crash")
    host.fault("crash")
    host.supervisorctl("start", "worker")
    until(lambda: len(host.lives()) == 2, "a second life, by an operator")
    until(lambda: host.supervisor.info("worker:worker").state is State.EXITED, "the worker to exit")
    assert len(host.lives()) == 2
    assert host.events() == []
    assert host.database.call(watchdogs.read) == []
    assert {path.name for path in host.home.iterdir()} == {
        "run",
        # The worker's own.
        "machine-id",
        "faults",
        "lives",
        "supervisord.conf",
        "supervisord.log",
        "programs.log",
        "worker.log",
    }
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", host.settings.watchdog_port), timeout=5)


def test_watchdog_is_seen_in_postgres_while_it_lives(host: SupervisedHost) -> None:
    """A watchdog's row in Postgres is fresh while it runs and ages once it is gone."""
    watchdog = Watchdog(host)
    until(
        lambda: [each.watchdog_id for each in host.database.call(watchdogs.read)] == [socket.gethostname()],
        "a row",
    )
    until(lambda: host.database.call(watchdogs.read)[0].age_s < 1, "a young row")
    watchdog.kill()
    until(lambda: host.database.call(watchdogs.read)[0].age_s > 1, "the row to age")


def test_the_id_of_the_machine_that_is_deleted_comes_back(host: SupervisedHost) -> None:
    """The watchdog restores the file with the machine's id, so that what starts later is on the same machine."""
    Watchdog(host)
    until(lambda: host.database.call(watchdogs.read), "a row")
    # This one would make another id with its next beat.
    host.supervisorctl("stop", "worker")
    path = host.home / "machine-id"
    machine = path.read_text()
    path.unlink()
    assert until(lambda: path.exists() and path.read_text(), "the id again") == machine


def test_a_folder_of_logs_that_is_deleted_comes_back(host: SupervisedHost) -> None:
    """The watchdog restores it: without it supervisord can start nothing."""
    Watchdog(host)
    path = host.home / "log"
    until(path.exists, "the folder")
    path.rename(host.home / "moved")
    until(path.exists, "the folder again")
    assert path.stat().st_mode & 0o777 == 0o700


def test_one_watchdog_per_port_ends_when_told(host: SupervisedHost) -> None:
    """`--check` accepts good settings, a second watchdog on the same port exits, and SIGTERM ends the first with 0."""
    assert host.run(sys.executable, "-m", "watchdog", "--check", BATCH_PROGRAMS="worker,watchdog").wait(30) == 0
    assert host.run(sys.executable, "-m", "watchdog", "--check", BATCH_CHECK_INTERVAL_S="no").wait(30) == 2
    watchdog = Watchdog(host)
    assert host.run(sys.executable, "-m", "watchdog").wait(30) == 1
    watchdog.process.terminate()
    assert watchdog.process.wait(10) == 0


@contextmanager
def frozen(pids: Iterable[int]) -> Iterator[None]:
    """Keeps these processes stopped by SIGSTOP meanwhile."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def test_it_answers_and_ends_while_postgres_is_frozen(host: SupervisedHost) -> None:
    """Calls blocked by a frozen Postgres delay neither other calls nor the watchdog's end."""
    proxy = host.home / "pg"
    proxy.mkdir()
    real = host.settings.postgres_url
    real_socket = Path(real.split("host=")[1].split("&")[0]) / ".s.PGSQL.5432"
    way = proxy / real_socket.name
    way.symlink_to(real_socket)
    watchdog = Watchdog(host, DATABASE_URL=real.replace(str(real_socket.parent), str(proxy)))
    watchdog.until(pb.VERDICT_HEALTHY)
    health = watchdog.health.Watch(health_pb2.HealthCheckRequest())
    assert next(health).status == health_pb2.HealthCheckResponse.SERVING
    theirs = (
        "SELECT pid FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name LIKE 'vllm-batch-watchdog%%'"
    )
    sessions = [pid for (pid,) in host.database.call(lambda db: db.execute_sql(theirs).fetchall())]
    with socket.socket(socket.AF_UNIX) as silent, frozen(sessions):
        way.unlink()
        silent.bind(str(way))
        silent.listen(100)
        reading = [watchdog.recovery.ListEvents.future(pb.ListEventsRequest()) for _ in range(20)]
        pause = pb.PauseRecoveryRequest(duration=Duration(seconds=600), reason="let me look")
        ordering = [watchdog.recovery.PauseRecovery.future(pause) for _ in range(20)]
        listed = watchdog.health.List(health_pb2.HealthListRequest(), timeout=5).statuses
        assert set(listed) == {"", "vllm_batch.v1.RecoveryService"}
        assert watchdog.worker().worker_id == WORKER_ID
        assert not any(call.done() for call in (*reading, *ordering))
        watchdog.process.terminate()
        assert watchdog.process.wait(15) == 0
        for call in (*reading, *ordering):
            assert call.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        with pytest.raises(grpc.RpcError, match="the server is shutting down"):
            list(health)
