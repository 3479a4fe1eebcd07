"""Faults for a whole stack, each by its name. What is frozen for a while goes on by itself; the rest must be healed."""

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil
import psycopg2

from tests.stacks import FullStack
from tests.waiting import until

# Those after which the worker has to be restarted by the watchdog.
OF_THE_WORKER = frozenset({"kill_worker", "kill_engine", "freeze_worker", "freeze_engine"})


@dataclass
class Faults:
    """Does things to `stack`, as `dice` has it. Remembers how many of them cost the worker its life."""

    stack: FullStack
    dice: random.Random
    done: list[str] = field(default_factory=list)

    def strike(self, name: str) -> None:
        """Does the fault of that name."""
        self.done.append(name)
        BY_NAME[name](self)

    @property
    def of_the_worker(self) -> int:
        """How many faults so far call for a restart."""
        return sum(name in OF_THE_WORKER for name in self.done)

    def kill_worker(self) -> None:
        self._signal_program("worker", signal.SIGKILL)

    def freeze_worker(self) -> None:
        self._signal_program("worker", signal.SIGSTOP)

    def kill_engine(self) -> None:
        self._signal_engine(signal.SIGKILL)

    def freeze_engine(self) -> None:
        self._signal_engine(signal.SIGSTOP)

    def kill_gateway(self) -> None:
        self._signal_program("gateway", signal.SIGKILL)

    def freeze_gateway(self) -> None:
        self._freeze([psutil.Process(self._pid("gateway"))])

    def kill_watchdog(self) -> None:
        self._signal_program("watchdog", signal.SIGKILL)

    def kill_postgres(self) -> None:
        self._signal_program("postgres", signal.SIGKILL)

    def freeze_postgres(self) -> None:
        server = psutil.Process(self._pid("postgres"))
        self._freeze([server, *server.children(recursive=True)])

    def cut_connections(self) -> None:
        url = f"postgresql:///batch?host={self.stack.home}/run/pg&user=postgres"
        connection = psycopg2.connect(url, connect_timeout=30)
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
        connection.close()

    def kill_supervisord(self) -> None:
        # Then it is started again, as systemd would.
        os.kill(int((self.stack.home / "run/supervisord.pid").read_text()), signal.SIGKILL)
        started = self.stack.script("start-all.sh")
        assert started.returncode == 0, started.stdout + started.stderr

    def redeploy_worker(self) -> None:
        self.stack.supervisorctl("restart", "worker")

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

    def _freeze(self, processes: list[psutil.Process]) -> None:
        for process in processes:
            process.suspend()
        # Not a wait for anything: the length of the fault.
        time.sleep(self.dice.uniform(1, 6))
        for process in processes:
            process.resume()


BY_NAME: dict[str, Callable[[Faults], None]] = {
    name: value
    for name, value in vars(Faults).items()
    if callable(value) and name.split("_")[0] in ("kill", "freeze", "cut", "redeploy")
}
