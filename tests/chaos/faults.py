"""Faults for a whole stack, each by its name.

Some last until they are mended: `strike` returns how. Those that freeze something for a while end by themselves; the
others have to be healed by the stack.
"""

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil

from service.processes import is_alive
from tests.stacks import FullStack
from tests.waiting import until
from vllm_batch.v1 import recovery_service_pb2 as rpb

# What chaos draws from: what needs no mending.
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
# Those after which the worker has to be restarted by the watchdog.
OF_THE_WORKER = frozenset({"kill_worker", "kill_engine", "freeze_worker", "freeze_engine"})

# What is concluded of a heartbeat that is an hour off, by what the worker does.
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
from service.worker.simulated_engine import SimulatedEngine
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
    """Does things to `stack`, as `dice` has it. Remembers how many of them cost the worker its life."""

    stack: FullStack
    dice: random.Random
    done: list[str] = field(default_factory=list)

    def strike(self, name: str) -> Mend | None:
        """Does the fault of that name. Returns how to end it where it does not end by itself and nobody heals it."""
        self.done.append(name)
        mend: Mend | None = getattr(self, name)()
        return mend

    @property
    def of_the_worker(self) -> int:
        """How many faults so far call for a restart."""
        return sum(name in OF_THE_WORKER for name in self.done)

    def kill_worker(self) -> None:
        self._signal_program("worker", signal.SIGKILL)

    def freeze_worker(self) -> None:
        self._signal_program("worker", signal.SIGSTOP)

    def exit_worker(self) -> None:
        """By itself, and with status 0."""
        self._inject("worker", EXIT)

    def block_loop(self) -> None:
        """The worker's main loop, for good."""
        self._inject("worker", BLOCK_LOOP)

    def stop_heart(self) -> None:
        """The thread that writes the heartbeat ends; nothing else does."""
        self._inject("worker", STOP_HEART)

    def kill_engine(self) -> None:
        self._signal_engine(signal.SIGKILL)

    def freeze_engine(self) -> None:
        self._signal_engine(signal.SIGSTOP)

    def orphan_engine(self) -> None:
        """An engine that outlives its worker: nobody looks until that is so."""
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
        """The kernel's answer to a process that writes to a full /dev/shm."""
        self._signal_engine(signal.SIGBUS)

    def refuse_shm(self) -> None:
        """The engine is refused what it asks of a full /dev/shm while it loads."""
        self._inject("worker", NO_SPACE)

    def kill_gateway(self) -> None:
        self._signal_program("gateway", signal.SIGKILL)

    def freeze_gateway(self) -> None:
        self._freeze([psutil.Process(self._pid("gateway"))])

    def kill_watchdog(self) -> None:
        self._signal_program("watchdog", signal.SIGKILL)

    def kill_watchdog_before_start(self) -> None:
        """Between stop and start of the restart that a dead engine calls for."""
        self._inject("watchdog", DIE_BEFORE_START)
        self.kill_engine()

    def kill_postgres(self) -> None:
        self._signal_program("postgres", signal.SIGKILL)

    def freeze_postgres(self) -> None:
        self._freeze(self._postgres())

    def restart_postgres(self) -> None:
        self.stack.supervisorctl("restart", "postgres")

    def stop_postgres(self) -> Mend:
        """Until the worker has noticed, and longer."""
        end_of_log = self.stack.mark("worker")
        self.stack.supervisorctl("stop", "postgres")
        until(lambda: self.stack.events("worker", "database_away", end_of_log), "the worker to notice")
        return lambda: self.stack.supervisorctl("start", "postgres")

    def slow_postgres(self) -> Mend:
        """So slow that nothing is answered in time."""
        end_of_log = self.stack.mark("worker")
        processes = self._postgres()
        for process in processes:
            process.suspend()
        until(lambda: self.stack.events("worker", "database_away", end_of_log), "the worker to notice")
        return lambda: [process.resume() for process in processes]

    def cut_connections(self) -> None:
        self.stack.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")

    def shift_clock(self) -> None:
        """The database's clock jumps by an hour, on and back. It cannot be set here: what is written moves instead."""
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
        """supervisord's. It does not make another; put back, it is the same."""
        path = self.stack.home / "run/supervisor.sock"
        kept = path.with_suffix(".kept")
        path.rename(kept)
        return lambda: kept.rename(path)

    def kill_supervisord(self) -> None:
        # Then it is started again, as systemd would.
        os.kill(int((self.stack.home / "run/supervisord.pid").read_text()), signal.SIGKILL)
        started = self.stack.script("start-all.sh")
        assert started.returncode == 0, started.stdout + started.stderr

    def redeploy_worker(self) -> None:
        self.stack.supervisorctl("restart", "worker")

    def stop_worker(self) -> Mend:
        """As an operator does."""
        self.stack.supervisorctl("stop", "worker")
        return lambda: self.stack.supervisorctl("start", "worker")

    def _inject(self, program: str, code: str) -> None:
        """Has a program run this; see tests/chaos/inject."""
        (self.stack.home / "inject.py").write_text(code)
        self._signal_program(program, signal.SIGUSR2)

    def _pid(self, program: str) -> int:
        """The program's process, once it has one."""
        return until(lambda: self.stack.pid(program), f"{program} to run", 60)

    def _signal_program(self, name: str, number: int) -> None:
        os.kill(self._pid(name), number)

    def _signal_engine(self, number: int) -> None:
        until(self._engine, "the engine to run", 120).send_signal(number)

    def _engine(self) -> psutil.Process | None:
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
        # Not a wait for anything: the length of the fault.
        time.sleep(self.dice.uniform(1, 6))
        for process in processes:
            process.resume()
