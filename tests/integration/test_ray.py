"""What lives of a worker leave in a Ray cluster of two hosts, by an engine of actors that stands for vLLM's.

Ray's own processes run, on this machine; vLLM's executor needs GPUs and does not.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from tests.support.waiting import until

pytest.importorskip("ray", reason="needs the extra `ray`")

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(300)]

ENGINE = (sys.executable, "-m", "tests.support.ray_engine")
Start = Callable[..., tuple["subprocess.Popen[str]", list[int]]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A home of its own for the token by which Ray's processes know each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        yield


@pytest.fixture(scope="module")
def cluster(home: None) -> Iterator[Any]:
    """Two hosts of two GPUs, as far as Ray knows: an engine that needs three has actors on both."""
    from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
    from ray.cluster_utils import Cluster

    ensure_token_if_auth_enabled(create_token_if_missing=True)
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 2, "include_dashboard": False})
    made.add_node(num_cpus=2, num_gpus=2)
    made.wait_for_nodes()
    yield made
    made.shutdown()


@pytest.fixture
def start(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts an engine as a worker does; gives its process and the pids of its actors."""
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    started = []

    def run(worker_id: str, *how: str, gpus: int = 3) -> tuple["subprocess.Popen[str]", list[int]]:
        engine = process(worker_id, gpus, 60, *how)
        started.append(engine)
        return engine, pids(engine)

    yield run
    for engine in started:
        engine.kill()
        engine.wait(30)


def process(worker_id: str, gpus: int, patience_s: int, *how: str) -> "subprocess.Popen[str]":
    """An engine that stands for a worker's."""
    arguments = (worker_id, str(gpus), str(patience_s), *how)
    return subprocess.Popen([*ENGINE, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def said(engine: "subprocess.Popen[str]") -> str:
    """The pids of its actors, or why it did not start; its log is left out."""
    assert engine.stdout is not None
    lines = (line.partition(": ") for line in engine.stdout)
    return next(text for what, _, text in lines if what in ("actors", "failed"))


def pids(engine: "subprocess.Popen[str]") -> list[int]:
    """Its actors."""
    return [int(pid) for pid in said(engine).split()]


def alive(pids: list[int]) -> list[int]:
    """Those that run."""
    return [pid for pid in pids if psutil.pid_exists(pid)]


def test_a_killed_driver(start: Start) -> None:
    """After SIGKILL of the driver, the next start finds the cluster free of its actors."""
    engine, actors = start("host:worker")
    assert len(alive(actors)) == 3
    engine.kill()
    _, new = start("host:worker")
    assert alive(actors) == []
    assert len(alive(new)) == 3


def test_a_life_that_is_still_there(start: Start) -> None:
    """Driver and actors that hang are gone before the next start, and another worker's keep running."""
    engine, hung = start("host:worker")
    other, others = start("other:worker", gpus=1)
    for pid in (engine.pid, *hung):
        os.kill(pid, signal.SIGSTOP)
    _, new = start("host:worker")
    assert alive(hung) == []
    assert len(alive(new)) == 3
    assert other.poll() is None
    assert len(alive(others)) == 1


def test_another_host_is_lost(cluster: Any, start: Start) -> None:
    """The engine ends; starts fail with what is missing until the host is back, then work."""
    engine, actors = start("host:worker")
    lost = cluster.worker_nodes.copy().pop()
    cluster.remove_node(lost, allow_graceful=False)
    assert engine.wait(60) == 3
    without = process("host:worker", 3, 15)
    assert "has 2 free GPUs and the model needs 3 (hosts in the cluster: 1)" in said(without)
    assert without.wait(30) == 4
    cluster.add_node(num_cpus=2, num_gpus=2)
    cluster.wait_for_nodes()
    _, new = start("host:worker")
    assert alive(actors) == []
    assert len(alive(new)) == 3


def test_data_parallel(start: Start) -> None:
    """Engines of data parallelism, each in a placement group of its own, are swept like one."""
    engine, actors = start("host:worker", "data", gpus=2)
    engine.kill()
    _, new = start("host:worker", "data", gpus=2)
    assert alive(actors) == []
    assert len(alive(new)) == 2


def test_a_cluster_of_its_own(home: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without RAY_ADDRESS each life starts a cluster, also right after one whose processes were all killed."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for _ in range(2):
        with process("host:worker", 1, 60) as engine:
            assert len(pids(engine)) == 1
            children = psutil.Process(engine.pid).children(recursive=True)
            engine.kill()
        for child in children:
            child.kill()
        until(lambda: not alive([child.pid for child in children]), "the processes of the cluster to end")  # noqa: B023


def test_a_cluster_that_is_away(home: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that does not answer is the cause of the failed start, within the deadline."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    away = process("host:worker", 1, 15)
    assert "RAY_ADDRESS=127.0.0.1:1" in said(away)
    assert away.wait(30) == 4
