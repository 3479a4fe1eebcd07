"""The scripts that users run, on a whole stack under supervisord, with the simulated engine."""

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.processes import Mark, marked
from tests.support.batches import lines
from tests.support.stacks import BIN, ROOT, FullStack, full_stack
from tests.support.waiting import until
from vllm_batch import CallError, Client
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import recovery_service_pb2 as rpb
from watchdog.policy import State

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def stack() -> Iterator[FullStack]:
    """One stack for the tests that leave it running."""
    with full_stack(BATCH_ENGINE="simulated", BATCH_HEARTBEAT_INTERVAL_S="1") as stack:
        stack.start_all()
        yield stack


def test_start_all_waits_and_says_how_to_use_it(stack: FullStack) -> None:
    """start-all.sh can be repeated without effect, and the submit command that it prints works."""
    before = {name: stack.pid(name) for name in ("gateway", "worker", "watchdog", "postgres")}
    again = stack.script("start-all.sh")
    assert again.returncode == 0
    assert {name: stack.pid(name) for name in before} == before
    printed = [text.strip() for text in again.stdout.splitlines()]
    submit = next(text for text in printed if text.startswith(".venv/bin/vllm-batch"))
    arguments = submit.replace("results.jsonl", str(stack.home / "results.jsonl"))
    done = subprocess.run(arguments.split(), cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len((stack.home / "results.jsonl").read_text().splitlines()) == 200
    assert any(text.startswith("grpcurl") for text in printed)
    assert any(text.startswith("grpc_health_probe") for text in printed)


def test_supervisorctl_needs_no_environment(stack: FullStack) -> None:
    """`supervisorctl -c HOME/supervisord.conf status` needs no environment and shows all four programs running."""
    states = dict(text.split()[:2] for text in stack.supervisorctl("status").splitlines())
    assert states == dict.fromkeys(("gateway", "http", "postgres", "watchdog", "worker"), "RUNNING")


def test_shipped_configuration_needs_no_environment() -> None:
    """In the checkout, `supervisorctl -c conf/supervisord.conf status` needs no environment."""
    command = [str(BIN / "supervisorctl"), "-c", "conf/supervisord.conf", "status"]
    done = subprocess.run(command, cwd=ROOT, env={}, capture_output=True, text=True, timeout=30)
    assert "var/run/supervisor.sock" in done.stdout or "gateway" in done.stdout
    assert "Error" not in done.stderr


def test_status_is_one_screen(stack: FullStack) -> None:
    """status.sh shows processes, verdict, heartbeat and batches in at most 25 lines."""
    until(lambda: stack.status().verdict == rpb.VERDICT_HEALTHY, "the first verdict")
    shown = stack.script("status.sh")
    assert shown.returncode == 0, shown.stderr
    for expected in ("RUNNING", "HEALTHY", "heartbeat", "accepts new work", "batch"):
        assert expected in shown.stdout
    assert len(shown.stdout.splitlines()) <= 25


def test_sockets_are_private(stack: FullStack) -> None:
    """The sockets of supervisord and Postgres are accessible to their owner only."""
    assert (stack.home / "run" / "supervisor.sock").stat().st_mode & 0o777 == 0o700
    assert (stack.home / "run" / "pg").stat().st_mode & 0o777 == 0o700


def test_killed_worker_comes_back(stack: FullStack) -> None:
    """After SIGKILL in the middle of a batch there is one restart in the audit log and one result per request."""
    before = len(stack.restarts())
    with Client(stack.target) as client:
        batch = client.submit_lines(lines(3000))
        until(lambda: client.get(batch.id).counts.completed > 100, "part of the batch")
        os.kill(stack.pid("worker"), signal.SIGKILL)
        *_, done = client.watch(batch.id)
        assert done.counts.completed == 3000
        assert [r.custom_id for r in client.results(batch.id)] == [f"c{i}" for i in range(3000)]
    until(lambda: stack.recovered(before + 1), "the restart to be closed as recovered")
    assert len(stack.restarts()) == before + 1
    restart = stack.restarts()[-1]
    assert restart.verdict == rpb.VERDICT_CRASHED
    [folder] = (stack.home / "crash").glob(f"*-event-{restart.id}")
    assert '"CRASHED"' in (folder / "event.json").read_text()
    assert "phase_entered" in (folder / "worker.log").read_text()


def recovery(stack: FullStack, *arguments: str) -> str:
    """The output of a `vllm-batch recovery` command."""
    command = [str(BIN / "vllm-batch"), "recovery", "--watchdog-target", stack.watchdog, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_recovery_is_paused_and_resumed(stack: FullStack) -> None:
    """While recovery is paused nothing is restarted and the status shows why; resuming restarts the worker."""
    before = len(stack.restarts())
    assert "paused until" in recovery(stack, "pause", "an upgrade", "--minutes", "5")
    os.kill(stack.pid("worker"), signal.SIGKILL)
    until(lambda: stack.status().verdict == rpb.VERDICT_PAUSED, "the pause to take effect")
    shown = recovery(stack, "status")
    assert "PAUSED" in shown
    assert "an upgrade" in shown
    assert len(stack.restarts()) == before
    recovery(stack, "resume")
    until(lambda: stack.recovered(before + 1), "the worker to be recovered")
    told = recovery(stack, "events", "--limit", "10")
    for expected in ("restart CRASHED → recovered", "paused", "resumed"):
        assert expected in told


@pytest.mark.thorough
def test_budget_spent_and_given_back() -> None:
    """When the budget is exhausted, clients and operators see what to do; after a reset the worker is restarted."""
    with full_stack(BATCH_ENGINE="simulated", BATCH_HEARTBEAT_INTERVAL_S="1", BATCH_MAX_RESTARTS_PER_HOUR="1") as stack:
        assert stack.script("start-all.sh").returncode == 0
        os.kill(stack.pid("worker"), signal.SIGKILL)
        until(lambda: stack.recovered(1), "the one allowed restart to be recovered")
        os.kill(stack.pid("worker"), signal.SIGKILL)
        with Client(stack.target, patience_s=0) as client:
            until(lambda: "vllm-batch recovery reset" in client.accepting(), "the gateway to name the reset command")
            with pytest.raises(CallError) as caught:
                client.submit_lines(lines(1))
        assert caught.value.reason == "RECOVERY_GAVE_UP"
        assert "gave up" in recovery(stack, "status")
        with grpc.insecure_channel(stack.watchdog) as channel:
            health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING
        recovery(stack, "reset", "the test is over")
        until(lambda: stack.recovered(2), "the worker to be recovered")


@pytest.mark.parametrize("program", ["gateway", "watchdog", "postgres"])
def test_other_programs_are_restarted_by_supervisord(stack: FullStack, program: str) -> None:
    """Killing the gateway, watchdog or Postgres restarts no worker, and the running batch completes."""
    before, worker = len(stack.restarts()), stack.pid("worker")
    with Client(stack.target) as client:
        batch = client.submit_lines(lines(2000))
        pid = stack.pid(program)
        os.kill(pid, signal.SIGKILL)
        until(lambda: stack.pid(program) not in (0, pid), f"another {program}")
        *_, done = client.watch(batch.id)
        assert done.state == pb.BATCH_STATE_COMPLETED
        assert len({r.custom_id for r in client.results(batch.id)}) == 2000
    until(lambda: stack.recovered(before), "the worker to be healthy")
    assert (len(stack.restarts()), stack.pid("worker")) == (before, worker)


@pytest.mark.thorough
def test_two_stacks_side_by_side(stack: FullStack) -> None:
    """A second home runs beside the first, can be stopped and restarted, and does not affect the first."""
    mine = stack.pid("worker")
    with full_stack(BATCH_ENGINE="simulated") as other:
        assert other.script("start-all.sh").returncode == 0, other.logs()
        with Client(other.target) as client:
            *_, done = client.watch(client.submit_lines(lines(10)).id)
            assert done.counts.completed == 10
        assert len(marked(Mark(other.home))) >= 4
        assert other.script("stop-all.sh").returncode == 0
        assert marked(Mark(other.home)) == []
        assert other.script("stop-all.sh").returncode == 0
        assert other.script("start-all.sh").returncode == 0, other.logs()
        with Client(other.target) as client:
            assert client.get(done.id).counts.completed == 10
    assert stack.pid("worker") == mine


@pytest.mark.thorough
def test_stop_all_ends_what_was_left_behind() -> None:
    """If supervisord was killed, stop-all.sh still ends every process of the home."""
    with full_stack(BATCH_ENGINE="simulated") as stack:
        assert stack.script("start-all.sh").returncode == 0, stack.logs()
        supervisord = stack.pid("")
        os.kill(supervisord, signal.SIGKILL)
        psutil.wait_procs([psutil.Process(supervisord)] if psutil.pid_exists(supervisord) else [], timeout=10)
        assert stack.script("stop-all.sh").returncode == 0
        assert marked(Mark(stack.home)) == []


@pytest.mark.thorough
def test_scripts_at_once_take_turns() -> None:
    """Two starts, two stops, and a start during a stop all do what they say; what was started holds up nobody."""
    with full_stack(BATCH_ENGINE="simulated") as stack, ThreadPoolExecutor(2) as running:
        for name in ("start-all.sh", "stop-all.sh", "start-all.sh"):
            for done in running.map(stack.script, [name] * 2):
                assert (done.returncode, done.stderr) == (0, ""), done.stdout
            assert bool(marked(Mark(stack.home))) is (name == "start-all.sh")
        mark = stack.mark("supervisord")
        stopping, log = running.submit(stack.script, "stop-all.sh"), stack.home / "log/supervisord.log"
        until(lambda: b"stopped: watchdog" in log.read_bytes()[mark:], "the first program to be stopped")
        stack.start_all()
        assert (stopping.result().returncode, stopping.result().stderr) == (0, "")
        assert stack.supervisor.states().keys() == {"gateway", "http", "postgres", "watchdog", "worker"}


@pytest.mark.thorough
def test_a_start_after_a_stop_that_was_interrupted() -> None:
    """After Ctrl-C in stop-all.sh, while the worker drains, a start waits for the end of that and starts it again."""
    with full_stack(BATCH_ENGINE="simulated", BATCH_SIMULATED_REQUEST_S="4") as stack:
        stack.start_all()
        worker = stack.pid("worker")
        with Client(stack.target) as client:
            batch = client.submit_lines(lines(100))
            until(lambda: client.get(batch.id).counts.completed, "the first results")
            command = [ROOT / "scripts/stop-all.sh"]
            stop = subprocess.Popen(command, env=stack.env, stdout=subprocess.DEVNULL, start_new_session=True)
            until(lambda: stack.supervisor.info("worker").state is State.STOPPING, "the worker to drain")
            os.killpg(stop.pid, signal.SIGINT)
            stop.wait(30)
            stack.start_all()
            assert stack.pid("worker") not in (0, worker)
            *_, done = client.watch(batch.id)
            assert done.counts.completed == 100


@pytest.mark.thorough
def test_what_is_started_keeps_no_descriptor() -> None:
    """supervisord keeps nothing of its caller open, such as the lock of `flock FILE start-all.sh` in a crontab."""
    with full_stack(BATCH_ENGINE="simulated") as stack:
        path = stack.home / "lock"
        stack.prefix = ["flock", str(path)]
        try:
            stack.start_all()
        finally:
            stack.prefix = ()
        with path.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.thorough
def test_external_postgres(postgres: str, database_url: str) -> None:
    """With DATABASE_URL the embedded Postgres is not started and the stack uses the given database."""
    with full_stack(BATCH_ENGINE="simulated", DATABASE_URL=database_url) as stack:
        assert stack.script("start-all.sh").returncode == 0, stack.logs()
        assert "STOPPED" in stack.supervisorctl("status", "postgres")
        assert not (stack.home / "pgdata").exists()
        with Client(stack.target) as client:
            *_, done = client.watch(client.submit_lines(lines(5)).id)
            assert done.counts.completed == 5


def test_wrong_settings_stop_the_start() -> None:
    """start-all.sh reports invalid settings and starts nothing."""
    with full_stack(BATCH_ENGINE="nonsense") as stack:
        started = stack.script("start-all.sh")
        assert started.returncode == 2
        assert "BATCH_ENGINE" in started.stderr
        assert not (stack.home / "run").exists()


def test_watchdog_check() -> None:
    """`python -m watchdog --check` reports invalid settings."""
    env = {"PATH": os.environ["PATH"], "BATCH_ENV_FILE": "/dev/null", "BATCH_MAX_RESTARTS_PER_HOUR": "many"}
    command = [sys.executable, "-m", "watchdog", "--check"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "BATCH_MAX_RESTARTS_PER_HOUR" in done.stderr
