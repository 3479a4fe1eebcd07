"""The demo: a batch on real vLLM, whose worker is killed halfway. Called by scripts/demo.sh."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NoReturn

import grpc
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_batch import CallError, Client
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import recovery_service_pb2 as rpb
from vllm_batch.v1 import recovery_service_pb2_grpc
from watchdog.supervisor import Supervisor

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "chat-200.jsonl"
# The worker is killed once this many requests are done.
KILL_AT = 30
RECOVERY_TIMEOUT_S = 300.0
BATCH_TIMEOUT_S = 600.0

console = Console(highlight=False, soft_wrap=True)


class DemoError(Exception):
    """A promise was not kept."""


def say(text: str) -> None:
    """Prints one line of progress."""
    console.print(f"demo: {text}", markup=False)


def free_ports(count: int) -> list[int]:
    """Returns free ports."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def environment(home: Path, ports: list[int]) -> dict[str, str]:
    """Returns the environment of a separate stack, with none of the user's settings, database or ports."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BATCH_")}
    for name in ("DATABASE_URL", "SENTRY_DSN"):
        kept.pop(name, None)
    return kept | {
        "BATCH_ENV_FILE": "/dev/null",
        "BATCH_HOME": str(home),
        "BATCH_GATEWAY_PORT": str(ports[0]),
        "BATCH_WORKER_PORT": str(ports[1]),
        "BATCH_WATCHDOG_PORT": str(ports[2]),
        "BATCH_HTTP_PORT": str(ports[3]),
        "BATCH_GATEWAY_METRICS_PORT": "0",
        "BATCH_WORKER_METRICS_PORT": "0",
        "BATCH_WATCHDOG_METRICS_PORT": "0",
        "BATCH_HTTP_METRICS_PORT": "0",
        # With more requests at a time, so small a model would be done before it can be killed.
        "BATCH_WINDOW": "24",
    }


class Recovery:
    """Prints what the watchdog sees and does until the worker is healthy again."""

    def __init__(self, target: str) -> None:
        self.is_over = threading.Event()
        self.event: rpb.RecoveryEvent | None = None
        self.took_s = 0.0
        self._begin = time.monotonic()
        self._channel = grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)])
        self._stub = recovery_service_pb2_grpc.RecoveryServiceStub(self._channel)
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        said = ""
        said_at = 0.0
        while not self.is_over.is_set() and time.monotonic() - self._begin < RECOVERY_TIMEOUT_S:
            with suppress(grpc.RpcError):
                [worker] = self._stub.GetStatus(rpb.GetStatusRequest(), timeout=5).workers
                verdict = rpb.Verdict.Name(worker.verdict).removeprefix("VERDICT_")
                action = rpb.Action.Name(worker.action).removeprefix("ACTION_").lower()
                now = f"{verdict} → {action}: {worker.reason}"
                since_s = time.monotonic() - self._begin
                key = f"{verdict} {action}"
                if key != said or time.monotonic() - said_at > 10:
                    say(f"watchdog, {since_s:.1f} s after the kill: {now}")
                    said, said_at = key, time.monotonic()
                events = self._stub.ListEvents(rpb.ListEventsRequest(page_size=20), timeout=5).events
                self.event = next((event for event in events if event.kind == "restart"), None)
                if self.event is not None and self.event.outcome == "recovered":
                    self.took_s = since_s
                    self.is_over.set()
            time.sleep(0.2)

    def wait(self) -> rpb.RecoveryEvent:
        """Returns the restart once the worker is healthy again. Raises DemoError."""
        self.is_over.wait(RECOVERY_TIMEOUT_S)
        self._channel.close()
        if self.event is None or not self.is_over.is_set():
            raise DemoError("the watchdog did not bring the worker back")
        return self.event


def run(home: Path, ports: list[int], env: dict[str, str]) -> str:
    """Runs the demo. Returns its last line. Raises DemoError."""
    say(f"starting the stack in {home} (loading vLLM takes a while)")
    # Progress goes to stdout; the last line on stderr becomes the demo's last line.
    command = [str(ROOT / "scripts/start-all.sh")]
    started = subprocess.run(command, env=env, timeout=1200, stderr=subprocess.PIPE, text=True)
    if started.returncode != 0:
        *before, last = started.stderr.strip().splitlines() or [""]
        print("\n".join(before), file=sys.stderr)
        raise DemoError(f"the stack did not start: {last.removeprefix('start: FAILED: ')}")
    with Client(f"127.0.0.1:{ports[0]}", on_retry=lambda error, _: say(f"gateway says: {error.message}")) as client:
        asked = [line for line in EXAMPLE.read_text().splitlines() if line]
        say(f"submitting {EXAMPLE.relative_to(ROOT)}: {len(asked)} requests")
        with EXAMPLE.open("rb") as file:
            batch = client.submit(file)
        say(f"{batch.id} is stored; the worker gets a SIGKILL once {KILL_AT} requests are done")
        recovery = follow(client, batch.id, home, f"127.0.0.1:{ports[2]}")
        event = recovery.wait()
        took = ", ".join(f"{timing.phase} {timing.duration.ToMilliseconds() / 1000:.1f} s" for timing in event.timings)
        say(f"audit log, event {event.id}: {event.reason}; {event.outcome}; {took}")
        results = Counter(result.custom_id for result in client.results(batch.id))
        done = client.get(batch.id)
    return judge(asked, results, done, recovery)


def follow(client: Client, batch_id: str, home: Path, watchdog: str) -> Recovery:
    """Watches the batch until it ends and kills the worker on the way."""
    recovery: Recovery | None = None
    shown_at = time.monotonic()
    begin = time.monotonic()
    bar = Progress(
        TextColumn("demo: {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar as progress:
        task = progress.add_task(batch_id)
        for batch in client.watch(batch_id):
            done, total = batch.counts.completed + batch.counts.failed, batch.counts.total
            progress.update(task, completed=done, total=total)
            if not console.is_terminal and (time.monotonic() - shown_at > 2 or done == total):
                say(f"{batch_id}: {done} of {total} requests done")
                shown_at = time.monotonic()
            if recovery is None and done >= KILL_AT:
                if done == total:
                    raise DemoError("the batch was done before the worker could be killed")
                pid = Supervisor(f"unix://{home}/run/supervisor.sock", 30).info("worker").pid
                say(f"SIGKILL to the worker, pid {pid}, with {done} of {total} requests done")
                os.kill(pid, signal.SIGKILL)
                recovery = Recovery(watchdog)
            if time.monotonic() - begin > BATCH_TIMEOUT_S:
                raise DemoError(f"the batch was not done within {BATCH_TIMEOUT_S:.0f} s")
    if recovery is None:
        raise DemoError("the batch ended before the worker could be killed")
    return recovery


def judge(asked: list[str], results: Counter[str], batch: pb.Batch, recovery: Recovery) -> str:
    """Returns the last line if every promise held. Raises DemoError."""
    import json

    wanted = {json.loads(line)["custom_id"] for line in asked}
    lost = len(wanted - results.keys())
    duplicated = sum(count - 1 for count in results.values())
    foreign = len(results.keys() - wanted)
    line = (
        f"{len(wanted)} requests, {len(results)} results, {lost} lost, {duplicated} duplicated,"
        f" recovered in {recovery.took_s:.1f} s"
    )
    if lost or duplicated or foreign or batch.counts.completed != len(wanted):
        raise DemoError(f"{line}; {foreign} foreign, {batch.counts.failed} failed")
    return line


def stop(env: dict[str, str]) -> None:
    """Stops the stack, whatever state it is in."""
    say("stopping everything")
    subprocess.run([str(ROOT / "scripts/stop-all.sh")], env=env, timeout=300, stdout=subprocess.DEVNULL, check=True)


def end_by_signal(number: int, _: object) -> NoReturn:
    """Raises SystemExit, so that `finally` cleans up."""
    raise SystemExit(128 + number)


def main() -> int:
    """Returns 0 only if every promise held."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end_by_signal)
    # The user's TLS and token belong to another stack.
    for name in [name for name in os.environ if name.startswith("BATCH_")]:
        del os.environ[name]
    home = Path(tempfile.mkdtemp(prefix="vllm-batch-demo-"))
    ports = free_ports(4)
    env = environment(home, ports)
    last_line, is_good = "", False
    try:
        last_line = run(home, ports, env)
        is_good = True
    except (DemoError, CallError) as error:
        last_line = f"FAILED: {error}"
    except KeyboardInterrupt:
        last_line = "interrupted"
    finally:
        # A second Ctrl-C must not interrupt the cleanup.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        stop(env)
    if is_good:
        shutil.rmtree(home, ignore_errors=True)
    else:
        say(f"the logs are in {home / 'log'}")
    say(last_line)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
