"""What lives of a worker leave in a Ray cluster of two hosts, by an engine of actors that stands for vLLM's.

Each host is a network namespace with a Ray node, where those can be made, and has two GPUs as far as Ray knows: vLLM's
executor needs real ones and does not run. An engine that needs three has actors on both hosts.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.fleet import Machine
from tests.support.networks import Network, network
from tests.support.waiting import until

pytest.importorskip("ray", reason="needs the extra `ray`")

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).resolve().parents[2]
ENGINE = (sys.executable, "-m", "tests.support.ray_engine")
RAY = str(Path(sys.executable).with_name("ray"))
PORT = 6379
# The engine exits with these.
LOST_AN_ACTOR, NOT_STARTED = 3, 4
# Ray takes a host for dead after five checks of 10 s, 3 s apart.
NOTICED_S = 120


class Host(Machine):
    """A machine with a Ray node, started as docs/fleet.md has it."""

    def environment(self, **more: str) -> dict[str, str]:
        """They share a home with Ray's token, but not Ray's files."""
        own = {"HOME": str(self.home.parent), "RAY_TMPDIR": str(self.home), "RAY_AUTH_MODE": "token"}
        own["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
        return {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | own | more

    def ray(self, *arguments: str) -> None:
        """Runs a command of Ray's."""
        command = [*self.net.prefix(self.name), RAY, *arguments]
        done = subprocess.run(command, env=self.environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    def start_ray(self, *role: str) -> None:
        """Starts its node; `role` says of which cluster."""
        self.ray("start", *role, f"--node-ip-address={self.address}", "--num-gpus=2", "--num-cpus=2")

    def processes(self) -> list[psutil.Process]:
        """Those of Ray; its workers are children of what has the address, or the head's files, in its arguments."""
        own = re.compile(rf"node.ip.address={re.escape(self.address)}(\s|$)|{re.escape(str(self.home))}/")
        roots = [each for each in psutil.process_iter(["cmdline"]) if own.search(" ".join(each.info["cmdline"] or ()))]
        return [each for root in roots for each in (root, *root.children(recursive=True))]

    def kill(self) -> None:
        """Kills all its processes."""
        ended = self.processes()
        for process in ended:
            process.kill()
        psutil.wait_procs(ended, 10)

    def lose_power(self) -> None:
        """Everything on it ends at once, and nobody hears of it."""
        self.net.unplug(self.name)
        self.kill()
        self.net.remove(self.name)


class Cluster:
    """Two hosts, and the engines that were started on the first."""

    def __init__(self, net: Network, home: Path) -> None:
        self.head, self.other = (Host(net, name, home / name) for name in ("a", "b"))
        self.address = f"{self.head.address}:{PORT}"
        self.engines: list[subprocess.Popen[str]] = []
        self.head.others, self.other.others = [self.other], [self.head]
        self.head.ray("get-auth-token", "--generate")
        self.head.start_ray("--head", "--port", str(PORT), "--include-dashboard=false")
        try:
            self.join()
        except BaseException:
            self.close()
            raise

    def join(self) -> None:
        """Starts the other host's node."""
        self.other.start_ray("--address", self.address)

    def engine(
        self, *more: str, worker: str = "host:worker", gpus: int = 3, patience_s: int = 60, address: str | None = None
    ) -> "subprocess.Popen[str]":
        """Starts an engine as a worker does."""
        engine = subprocess.Popen(
            [*self.head.net.prefix("a"), *ENGINE, worker, str(gpus), str(patience_s), *more],
            env=self.head.environment(RAY_ADDRESS=address or self.address),
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.engines.append(engine)
        return engine

    def close(self) -> None:
        """Ends everything."""
        self.end_engines()
        for host in (self.head, self.other):
            host.kill()

    def end_engines(self) -> None:
        """Kills all drivers."""
        for engine in self.engines:
            engine.kill()
            engine.wait(30)
        self.engines.clear()


@pytest.fixture(scope="module")
def made() -> Iterator[Cluster]:
    """Two hosts, for all tests."""
    # Not pytest's tmp_path, which is too long for socket paths.
    home = Path(tempfile.mkdtemp(prefix="vbr-"))
    net = network()
    try:
        made = Cluster(net, home)
        yield made
        made.close()
    finally:
        net.close()
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def cluster(made: Cluster) -> Iterator[Cluster]:
    """The same without drivers."""
    yield made
    made.end_engines()


def said(engine: "subprocess.Popen[str]") -> str:
    """The pids of its actors, or why it did not start; its log is left out."""
    assert engine.stdout is not None
    lines = (line.partition(": ") for line in engine.stdout)
    return next(text for what, _, text in lines if what in ("actors", "failed"))


def pids(engine: "subprocess.Popen[str]") -> list[int]:
    """Its actors."""
    return [int(pid) for pid in said(engine).split()]


def alive(actors: list[int]) -> list[int]:
    """Those that run."""
    return [pid for pid in actors if psutil.pid_exists(pid)]


def test_a_killed_driver(cluster: Cluster) -> None:
    """After SIGKILL of the driver, the next start finds the cluster free of its actors."""
    engine = cluster.engine()
    actors = pids(engine)
    assert len(alive(actors)) == 3
    engine.kill()
    new = pids(cluster.engine())
    assert alive(actors) == []
    assert len(alive(new)) == 3


def test_a_life_that_is_still_there(cluster: Cluster) -> None:
    """Driver and actors that hang are gone before the next start, and another worker's keep running."""
    engine = cluster.engine()
    other = cluster.engine(worker="other:worker", gpus=1)
    hung, others = pids(engine), pids(other)
    for pid in (engine.pid, *hung):
        os.kill(pid, signal.SIGSTOP)
    new = pids(cluster.engine())
    assert alive(hung) == []
    assert len(alive(new)) == 3
    assert other.poll() is None
    assert len(alive(others)) == 1


def test_data_parallel(cluster: Cluster) -> None:
    """Engines of data parallelism, each in a placement group on a host of its own, are swept like one."""
    engine = cluster.engine("data", gpus=2)
    actors = pids(engine)
    engine.kill()
    new = pids(cluster.engine("data", gpus=2))
    assert alive(actors) == []
    assert len(alive(new)) == 2


def test_a_host_loses_power(cluster: Cluster) -> None:
    """The engine ends; starts fail with what is missing until the host is back, then work."""
    engine = cluster.engine()
    actors = pids(engine)
    cluster.other.lose_power()
    assert engine.wait(NOTICED_S) == LOST_AN_ACTOR
    without = cluster.engine(patience_s=15)
    assert "has 2 free GPUs and the model needs 3 (hosts in the cluster: 1)" in said(without)
    assert without.wait(30) == NOT_STARTED
    cluster.other.net.add("b")
    cluster.join()
    new = pids(cluster.engine())
    assert alive(actors) == []
    assert len(alive(new)) == 3


def test_a_cut_between_the_hosts(cluster: Cluster) -> None:
    """The engine ends though no process died; no start is let through before the old life's actors are gone."""
    engine = cluster.engine()
    actors = pids(engine)
    cluster.other.cut_off()
    assert engine.wait(NOTICED_S) == LOST_AN_ACTOR
    assert alive(actors)
    without = cluster.engine(patience_s=15)
    assert "(hosts in the cluster: 1)" in said(without)
    cluster.other.heal()
    # Ray ends a node that was taken for dead, once it hears so, but not its log monitor: as `ray stop --force`.
    until(lambda: not alive(actors), "the actors of the node that was cut off to end", NOTICED_S)
    cluster.other.kill()
    cluster.join()
    new = pids(cluster.engine())
    assert alive(actors) == []
    assert len(alive(new)) == 3


def test_a_cluster_of_its_own(cluster: Cluster) -> None:
    """Without RAY_ADDRESS each life starts a cluster, also right after one whose processes were all killed."""
    for _ in range(2):
        engine = cluster.engine(gpus=1, address="local")
        actors = pids(engine)
        assert len(alive(actors)) == 1
        children = psutil.Process(engine.pid).children(recursive=True)
        for process in (engine, *children):
            process.kill()
        engine.wait(30)
        until(lambda: not alive([child.pid for child in children]), "the processes of the cluster to end")  # noqa: B023


def test_a_cluster_that_is_away(cluster: Cluster) -> None:
    """A cluster that does not answer is the cause of the failed start, within the deadline."""
    away = cluster.engine(patience_s=15, address="127.0.0.1:1")
    assert "RAY_ADDRESS=127.0.0.1:1" in said(away)
    assert away.wait(30) == NOT_STARTED
