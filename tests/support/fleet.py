"""Several hosts with one Postgres: they lose power, are cut off from one another, return.

    with fleet(3) as all_hosts:
        a, b, c = all_hosts.hosts            # named "a", "b", "c"
        for host in (a, b, c):
            host.start()                     # a gateway and a worker with the simulated engine
        all_hosts.wait_until_accepting()
        with b.client() as client: ...       # of b's gateway
        a.lose_power()                       # all its processes at once, and nobody hears of it
        a.return_power(); a.start()
        b.cut_off(all_hosts.postgres)        # packets between the two are lost; also b.cut_off(c), b.cut_off()
        b.heal()
        all_hosts.sql("SELECT ...")

`host.start("gateway")` starts some programs only, `host.start(simulated_request_s=1)` gives settings, `host.run(module,
name, **settings)` starts any program. `host.supervised(**settings)` starts the whole stack under supervisord instead,
with its watchdog, and returns its FullStack. Lines can be cut only where `all_hosts.can_cut`: see networks.py.
"""

import contextlib
import shutil
import signal
import string
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg2

from service import embedded_postgres, processes
from service.processes import Mark
from tests.support.namespaces import own_pids
from tests.support.networks import Network, network
from tests.support.ports import free_port
from tests.support.servers import Server, Stack
from tests.support.stacks import ROOT, FullStack
from tests.support.waiting import until
from vllm_batch import Client

# As users have it, unlike the short interval of other tests' stacks.
SETTINGS = {"heartbeat_interval_s": 5, "allow_insecure": "true"}
# Twenty hosts start at once.
MAX_CONNECTIONS = 300


class Machine:
    """A place in the network."""

    def __init__(self, net: Network, name: str, home: Path) -> None:
        self.net, self.name, self.home = net, name, home
        self.others: list[Machine] = []
        home.mkdir(exist_ok=True)
        self.address = net.add(name)

    def cut_off(self, *others: "Machine") -> None:
        """Loses all packets between it and the others; without others between it and everybody."""
        for other in others or self.others:
            self.net.cut(self.name, other.name)

    def heal(self) -> None:
        """Ends all its cuts."""
        for other in self.others:
            self.net.heal(self.name, other.name)


class PostgresMachine(Machine):
    """Postgres on a machine of its own."""

    def __init__(self, net: Network, name: str, home: Path) -> None:
        super().__init__(net, name, home)
        self.port = free_port()
        self.url = f"postgresql://postgres@{self.address}:{self.port}/batch"
        embedded_postgres.bootstrap(home)
        with (home / "pgdata" / "pg_hba.conf").open("a") as rules:
            rules.write("host all all 0.0.0.0/0 trust\n")
        self.start()

    def start(self) -> None:
        """Starts the server, and waits until it answers."""
        owner = embedded_postgres.unprivileged()
        ids = () if owner is None else (f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups")
        command = [*self.net.prefix(self.name), *(("setpriv", *ids) if ids else ())]
        command += embedded_postgres.command(self.home)
        command += ["-c", "listen_addresses=*", "-p", str(self.port), "-c", f"max_connections={MAX_CONNECTIONS}"]
        with (self.home / "postgres.log").open("ab") as log:
            self.process = subprocess.Popen(command, cwd="/", stdout=log, stderr=log)
        until(self._answers, "Postgres to answer")

    def _answers(self) -> bool:
        assert self.process.poll() is None, (self.home / "postgres.log").read_text()
        with contextlib.suppress(psycopg2.OperationalError):
            psycopg2.connect(self.local_url, connect_timeout=2).close()
            return True
        return False

    @property
    def local_url(self) -> str:
        """For the test: no cut concerns it."""
        return f"postgresql:///batch?host={self.home}/run/pg&port={self.port}&user=postgres"

    def stop(self) -> None:
        """Shuts the server down at once."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(30)


class Host(Machine):
    """A machine of the fleet. What runs on it is in `servers`."""

    def __init__(self, net: Network, name: str, home: Path, database_url: str) -> None:
        super().__init__(net, name, home)
        self._stack = Stack(database_url, home, free_port(), [], host=self.address, prefix=net.prefix(name))
        self.full: FullStack | None = None
        self._ports = {name: free_port() for name in ("worker", "http")}
        self.is_off = False

    @property
    def target(self) -> str:
        """Address of the gateway."""
        return self.full.target if self.full else self._stack.target

    @property
    def servers(self) -> dict[str, Server]:
        """What `run` and `start` have started, by name."""
        return {server.log.stem: server for server in self._stack.servers}

    def in_containers(self) -> None:
        """What is started from now on has a container of its own, in which it has the same pid as on other hosts."""
        self._stack.prefix = [*self._stack.prefix, *own_pids()]

    def start(self, *programs: str, **settings: object) -> None:
        """Starts programs, by default a gateway and a worker; those that ran before with their settings."""
        for name in programs or ("gateway", "worker"):
            if (server := self.servers.get(name)) is not None and not settings:
                server.start()
            else:
                self.run(f"service.{name}", name, **settings)

    def run(self, module: str, name: str, **settings: object) -> Server:
        """Starts a program under this name."""
        ports = {f"{of}_port": port for of, port in self._ports.items()}
        self._stack.servers[:] = [server for server in self._stack.servers if server.log.stem != name]
        return self._stack.run(module, name, **SETTINGS | ports | settings)

    def supervised(self, root: Path = ROOT, **settings: object) -> FullStack:
        """Starts the stack under supervisord, or starts it again, and waits until it accepts new work.

        `root` is the checkout that it runs.
        """
        if self.full is None:
            given = {f"BATCH_{key.upper()}": str(value) for key, value in (SETTINGS | settings).items()}
            own = {"BATCH_HOST": self.address, "DATABASE_URL": self._stack.database_url, "BATCH_ENGINE": "simulated"}
            self.full = FullStack(self.home, own | given)
            self.full.prefix = self._stack.prefix
        self.full.root = root
        started = self.full.script("start-all.sh")
        assert started.returncode == 0, started.stdout + started.stderr
        return self.full

    @property
    def worker_pid(self) -> int:
        """The pid of its worker; 0 while none runs."""
        if self.full is not None:
            return 0 if self.is_off else self.full.pid("worker")
        server = self.servers.get("worker")
        return server.process.pid if server is not None and server.process.poll() is None else 0

    def client(self, patience_s: float = 0) -> Client:
        """A client of its gateway."""
        return Client(self.target, patience_s=patience_s)

    def events(self, program: str, name: str) -> list[dict[str, Any]]:
        """The events of this name in a program's log."""
        return self.full.events(program, name) if self.full else self.servers[program].events(name)

    def lose_power(self) -> None:
        """Ends everything on it at once. In namespaces nobody hears of it: no connection is closed."""
        self.net.unplug(self.name)
        # Not marked, because it is not one of its own programs; and first, because it starts again what ends.
        assert not processes.end(processes.supervisords(self.home), 10, (signal.SIGKILL,))
        assert not processes.end(processes.marked(Mark(self.home)), 10, (signal.SIGKILL,))
        for server in self.servers.values():
            server.process.wait(10)
        self.net.remove(self.name)
        self.is_off = True

    def return_power(self) -> None:
        """The machine is there again; nothing runs on it yet."""
        assert self.net.add(self.name) == self.address
        self.is_off = False

    def close(self) -> None:
        """Ends what runs on it."""
        if not self.is_off:
            if self.full is not None:
                self.full.script("stop-all.sh")
            self._stack.end()


class Fleet:
    """All hosts and their Postgres."""

    def __init__(self, net: Network, home: Path, names: Sequence[str]) -> None:
        self._net = net
        self.can_cut = net.can_cut
        self.postgres = PostgresMachine(net, "pg", home / "pg")
        self.hosts = [Host(net, name, home / name, self.postgres.url) for name in names]
        machines = [self.postgres, *self.hosts]
        for machine in machines:
            machine.others = [other for other in machines if other is not machine]

    def sql(self, statement: str, *params: object) -> list[tuple[Any, ...]]:
        """Runs a statement on Postgres. Returns its rows, if any."""
        with contextlib.closing(psycopg2.connect(self.postgres.local_url, connect_timeout=10)) as connection:
            connection.autocommit = True
            cursor = connection.cursor()
            cursor.execute(statement, params or None)
            return cursor.fetchall() if cursor.description else []

    def supervise_all(self, **settings: object) -> None:
        """Starts the stack under supervisord on all hosts at once, and waits until all accept new work."""
        with ThreadPoolExecutor(len(self.hosts)) as pool:
            list(pool.map(lambda host: host.supervised(**settings), self.hosts))
        self.wait_until_accepting()

    def wait_until_accepting(self) -> None:
        """Waits until each gateway that runs accepts new work, and each worker that runs is ready."""
        for host in self.hosts:
            if not host.is_off and ("gateway" in host.servers or host.full):
                with host.client() as client:
                    until(lambda client=client: not client.accepting(), f"{host.name} to accept new work")
        pids = {host.worker_pid for host in self.hosts} - {0}
        until(lambda: pids <= self._working(), "all workers to be ready")

    def _working(self) -> set[int]:
        """The pids of the workers that are ready; no machine has pids of its own."""
        return {pid for (pid,) in self.sql("SELECT pid FROM heartbeats WHERE phase = 'ready'")}

    def close(self) -> None:
        """Ends everything."""
        for host in self.hosts:
            if host.full is not None and not host.is_off:
                host.heal()
        # An orderly end waits more than it computes.
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(Host.close, self.hosts))
        self.postgres.stop()


@contextmanager
def fleet(hosts: int = 3) -> Iterator[Fleet]:
    """A fleet on which nothing but Postgres runs yet; ends and removes everything at the end."""
    # Not pytest's tmp_path, which is too long for socket paths.
    home = Path(tempfile.mkdtemp(prefix="vbf-"))
    home.chmod(0o755)
    net = network()
    try:
        made = Fleet(net, home, string.ascii_lowercase[:hosts])
        try:
            yield made
        finally:
            made.close()
    finally:
        net.close()
        shutil.rmtree(home, ignore_errors=True)
