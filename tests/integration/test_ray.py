"""What lives of a worker leave in a Ray cluster of two hosts, by an engine of actors that stands for vLLM's.

Ray's own processes run, on this machine; vLLM's executor needs GPUs and does not.
"""

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from service.worker.engine import ray_cluster
from service.worker.engine.protocol import EngineStartError
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
    """Two hosts with room for two engines."""
    from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
    from ray.cluster_utils import Cluster

    ensure_token_if_auth_enabled(create_token_if_missing=True)
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    made.add_node(num_cpus=2)
    made.wait_for_nodes()
    yield made
    made.shutdown()


@pytest.fixture
def start(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts an engine as a worker does; gives its process and the pids of its actors."""
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    monkeypatch.setenv(ray_cluster.JOB_CONFIG, "")
    started = []

    def run(worker_id: str, hosts: int = 2) -> tuple["subprocess.Popen[str]", list[int]]:
        os.environ.pop(ray_cluster.JOB_CONFIG)
        asyncio.run(ray_cluster.prepare(worker_id))
        engine = subprocess.Popen([*ENGINE, str(hosts)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        started.append(engine)
        assert engine.stdout is not None
        return engine, [int(pid) for pid in engine.stdout.readline().split()]

    yield run
    for engine in started:
        engine.kill()
        engine.wait(30)


def alive(pids: list[int]) -> list[int]:
    """Those that run."""
    return [pid for pid in pids if psutil.pid_exists(pid)]


def test_a_killed_driver(start: Start) -> None:
    """After SIGKILL of the driver, the next start finds the cluster free of its actors."""
    engine, actors = start("host:worker")
    assert len(alive(actors)) == 2
    engine.kill()
    _, new = start("host:worker")
    assert alive(actors) == []
    assert len(alive(new)) == 2


def test_a_life_that_is_still_there(start: Start) -> None:
    """Driver and actors that hang are gone before the next start, and another worker's keep running."""
    engine, hung = start("host:worker")
    other, others = start("other:worker")
    for pid in (engine.pid, *hung):
        os.kill(pid, signal.SIGSTOP)
    _, new = start("host:worker")
    assert alive(hung) == []
    assert len(alive(new)) == 2
    assert other.poll() is None
    assert len(alive(others)) == 2


def test_another_host_is_lost(cluster: Any, start: Start) -> None:
    """When the other host's part is gone, the engine ends; the next start works once the host is back."""
    engine, actors = start("host:worker")
    lost = cluster.worker_nodes.copy().pop()
    cluster.remove_node(lost, allow_graceful=False)
    assert engine.wait(60) == 3
    cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    _, new = start("host:worker")
    assert alive(actors) == []
    assert len(alive(new)) == 2


def test_a_cluster_of_its_own(home: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without RAY_ADDRESS each life starts a cluster, also right after one whose processes were all killed."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv(ray_cluster.JOB_CONFIG, "")
    asyncio.run(ray_cluster.prepare("host:worker"))
    for _ in range(2):
        with subprocess.Popen([*ENGINE, "1"], stdout=subprocess.PIPE, text=True, start_new_session=True) as engine:
            assert engine.stdout is not None
            assert len(engine.stdout.readline().split()) == 1
            children = psutil.Process(engine.pid).children(recursive=True)
            engine.kill()
        for child in children:
            child.kill()
        until(lambda: not alive([child.pid for child in children]), "the processes of the cluster to end")  # noqa: B023


def test_a_cluster_that_is_away(home: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that does not answer is the cause of the failed start, within the deadline."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv(ray_cluster.JOB_CONFIG, "")
    with pytest.raises(EngineStartError, match=re.escape("RAY_ADDRESS=127.0.0.1:1")):
        asyncio.run(ray_cluster.prepare("host:worker", timeout_s=15))
