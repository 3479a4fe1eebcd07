"""Faults for a whole stack, by name.

Some last until the test ends them with the function that `strike` returns. Short freezes end by themselves; the stack
has to recover from the others.
"""

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import psutil

from service.processes import is_alive
from tests.support.stacks import FullStack
from tests.support.waiting import until
from vllm_batch.v1 import recovery_service_pb2 as rpb

# Faults that chaos tests draw from: they need no repair.
AT_RANDOM = (
    "cut_connections",
    "freeze_engine",
    "freeze_gateway",
    "freeze_postgres",
    "freeze_worker",
    "kill_engine",
    "kill_gateway",
    "kill_postgres",
    "kill_supervisord",
    "kill_watchdog",
    "kill_worker",
    "redeploy_worker",
)
# Settings of a stack that is to recover from many faults in a row, each soon.
RECOVERS_SOON = {
    "BATCH_HEARTBEAT_INTERVAL_S": "1",
    "BATCH_HEARTBEAT_TIMEOUT_S": "15",
    "BATCH_LEASE_S": "15",
    "BATCH_CHECK_INTERVAL_S": "5",
    "BATCH_MAX_RESTARTS_PER_HOUR": "1000",
    "BATCH_RESTART_BACKOFF_MAX_S": "2",
}
# Faults after which the watchdog has to restart the worker.
OF_THE_WORKER = frozenset({"kill_worker", "kill_engine", "freeze_worker", "freeze_engine"})

# Verdicts on a heartbeat that is an hour off, depending on the worker's phase.
JUMP_SEEN = (rpb.VERDICT_HEARTBEAT_LOST, rpb.VERDICT_STARTING, rpb.VERDICT_DRAINING)

BLOCK_LOOP = """
import time
while True:
    time.sleep(1)
"""
EXIT = "import os; os._exit(0)"
STOP_HEART = """
import ctypes, threading
heart = next(thread for thread in threading.enumerate() if thread.name == "heart")
ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(heart.ident), ctypes.py_object(SystemExit))
"""
NO_SPACE = """
from service.worker.engine.simulated import SimulatedEngine
async def run(*_):
    raise OSError(28, "No space left on device", "/dev/shm/psm_engine")
SimulatedEngine.run = run
"""
DIE_BEFORE_START = """
import os, signal
from watchdog.supervisor import Supervisor
Supervisor.start = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
"""

Mend = Callable[[], object]


@dataclass
class Faults:
    """Injects faults into `stack`, with durations from `dice`, and keeps a list of them."""

    stack: FullStack
    dice: random.Random
    done: list[str] = field(default_factory=list)

    def strike(self, name: str) -> Mend | None:
        """Injects the named fault. Returns a function that ends it, if neither time nor the stack does."""
        self.done.append(name)
        mend: Mend | None = getattr(self, name)()
        return mend

    @property
    def of_the_worker(self) -> int:
        """Number of faults so far that require a restart."""
        return sum(name in OF_THE_WORKER for name in self.done)

    def kill_worker(self) -> None:
        self._signal_program("worker", signal.SIGKILL)

    def freeze_worker(self) -> None:
        self._signal_program("worker", signal.SIGSTOP)

    def exit_worker(self) -> None:
        """Makes the worker exit with status 0."""
        self._inject("worker", EXIT)

    def block_loop(self) -> None:
        """Blocks the worker's main loop for good."""
        self._inject("worker", BLOCK_LOOP)

    def stop_heart(self) -> None:
        """Ends the thread that writes the heartbeat, and nothing else."""
        self._inject("worker", STOP_HEART)

    def kill_engine(self) -> None:
        self._signal_engine(signal.SIGKILL)

    def freeze_engine(self) -> None:
        self._signal_engine(signal.SIGSTOP)

    def orphan_engine(self) -> None:
        """Leaves an engine that outlives its worker; the watchdog is suspended until it does."""
        engine = until(self._engine, "the engine to run")
        worker, watchdog = psutil.Process(self._pid("worker")), psutil.Process(self._pid("watchdog"))
        watchdog.suspend()
        try:
            worker.kill()
            until(lambda: not is_alive(worker), "the worker to die")
            assert is_alive(engine)
        finally:
            watchdog.resume()

    def overflow_shm(self) -> None:
        """Sends SIGBUS to the engine, as the kernel does to a process that writes to a full /dev/shm."""
        self._signal_engine(signal.SIGBUS)

    def refuse_shm(self) -> None:
        """Makes the engine's calls fail as if /dev/shm were full."""
        self._inject("worker", NO_SPACE)

    def kill_gateway(self) -> None:
        self._signal_program("gateway", signal.SIGKILL)

    def freeze_gateway(self) -> None:
        self._freeze([psutil.Process(self._pid("gateway"))])

    def stop_answering(self) -> None:
        """Suspends the gateway for good."""
        self._signal_program("gateway", signal.SIGSTOP)

    def stop_gateway(self) -> Mend:
        """Stops the gateway as an operator does."""
        self.stack.supervisorctl("stop", "gateway")
        return lambda: self.stack.supervisorctl("start", "gateway")

    def kill_watchdog(self) -> None:
        self._signal_program("watchdog", signal.SIGKILL)

    def kill_watchdog_before_start(self) -> None:
        """Kills the engine, and the watchdog between stop and start of the restart that follows."""
        self._inject("watchdog", DIE_BEFORE_START)
        self.kill_engine()

    def kill_postgres(self) -> None:
        self._signal_program("postgres", signal.SIGKILL)

    def freeze_postgres(self) -> None:
        self._freeze(self._postgres())

    def restart_postgres(self) -> None:
        self.stack.supervisorctl("restart", "postgres")

    def stop_postgres(self) -> Mend:
        """Stops Postgres until mended; returns once the worker has noticed."""
        end_of_log = self.stack.mark("worker")
        self.stack.supervisorctl("stop", "postgres")
        until(lambda: self.stack.events("worker", "database_away", end_of_log), "the worker to notice the outage")
        return lambda: self.stack.supervisorctl("start", "postgres")

    def slow_postgres(self) -> Mend:
        """Suspends Postgres until mended, so that nothing is answered in time; returns once the worker has noticed."""
        end_of_log = self.stack.mark("worker")
        processes = self._postgres()
        for process in processes:
            process.suspend()
        until(lambda: self.stack.events("worker", "database_away", end_of_log), "the worker to notice the outage")
        return lambda: [process.resume() for process in processes]

    def cut_connections(self) -> None:
        self.stack.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")

    def shift_clock(self) -> None:
        """Simulates jumps of the database's clock by an hour, forward and back, by moving the stored timestamps."""
        for hour in ("- interval '1 hour'", "+ interval '1 hour'"):

            def is_seen(hour: str = hour) -> bool:
                self.stack.sql(
                    f"UPDATE heartbeats SET last_seen = clock_timestamp() {hour};"
                    f" UPDATE chunks SET lease_until = clock_timestamp() {hour} WHERE state = 'leased'"
                )
                status = self.stack.status()
                is_judged = status.verdict in JUMP_SEEN
                return is_judged and abs(status.heartbeat_age.ToTimedelta().total_seconds()) > 1800

            until(is_seen, "the watchdog to see the jump")

    def remove_socket(self) -> Mend:
        """Removes supervisord's socket until mended: supervisord does not recreate it."""
        path = self.stack.home / "run/supervisor.sock"
        kept = path.with_suffix(".kept")
        path.rename(kept)
        return lambda: kept.rename(path)

    def kill_supervisord(self) -> None:
        # And start it again, as systemd would.
        os.kill(int((self.stack.home / "run/supervisord.pid").read_text()), signal.SIGKILL)
        started = self.stack.script("start-all.sh")
        assert started.returncode == 0, started.stdout + started.stderr

    def redeploy_worker(self) -> None:
        self.stack.supervisorctl("restart", "worker")

    def stop_worker(self) -> Mend:
        """Stops the worker as an operator does."""
        self.stack.supervisorctl("stop", "worker")
        return lambda: self.stack.supervisorctl("start", "worker")

    def _inject(self, program: str, code: str) -> None:
        """Makes a program run this code; see tests/chaos/inject."""
        (self.stack.home / "inject.py").write_text(code)
        self._signal_program(program, signal.SIGUSR2)

    def _pid(self, program: str) -> int:
        """Waits for the program to run. Returns its pid."""
        return until(lambda: self.stack.pid(program), f"{program} to run", 60)

    def _signal_program(self, name: str, number: int) -> None:
        os.kill(self._pid(name), number)

    def _signal_engine(self, number: int) -> None:
        until(self._engine, "the engine to run", 120).send_signal(number)

    def _engine(self) -> psutil.Process | None:
        # One that was killed a moment ago is a zombie, or gone.
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self._pid("worker")).children(recursive=True):
                command = child.cmdline()
                if "simulated-engine" in command or (command and "VLLM::EngineCore" in command[0]):
                    return child
        return None

    def _postgres(self) -> list[psutil.Process]:
        server = psutil.Process(self._pid("postgres"))
        return [server, *server.children(recursive=True)]

    def _freeze(self, processes: list[psutil.Process]) -> None:
        for process in processes:
            process.suspend()
        # The duration of the fault, not a wait for a condition.
        time.sleep(self.dice.uniform(1, 6))
        for process in processes:
            process.resume()
