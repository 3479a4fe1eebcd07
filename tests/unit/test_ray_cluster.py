"""Which placement groups and actors of a Ray cluster belong to earlier lives of a worker."""

import asyncio
import importlib.util
import json
import os
from types import SimpleNamespace

import pytest

from service.worker.engine import ray_cluster
from service.worker.engine.cause import Failure, explain
from service.worker.engine.protocol import EngineStartError

NEED = ray_cluster.Need("GPU", 2, here=2)


def job(number: int, **metadata: str) -> SimpleNamespace:
    """A job as Ray describes it."""
    identity = number.to_bytes(4, "little")
    return SimpleNamespace(job_id=identity, config=SimpleNamespace(metadata=metadata))


def test_only_jobs_of_the_same_worker() -> None:
    """Jobs of other workers, and of programs that are not ours, are left alone."""
    jobs = [job(1, vllm_batch_worker="a:worker"), job(2, vllm_batch_worker="b:worker"), job(3), job(4, user="a:worker")]
    assert ray_cluster.jobs_of("a:worker", dict(enumerate(jobs))) == {"01000000"}


def test_belongs_to_a_job_by_its_id() -> None:
    """What a job has made has ids that end with the job's."""
    ids = ["ab01000000", "0100000002000000", "cd03000000"]
    assert ray_cluster.of_jobs(ids, {"01000000", "03000000"}) == {"ab01000000", "cd03000000"}


def test_a_cluster_of_its_own_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without RAY_ADDRESS nothing is swept, and Ray starts a cluster for this life whose job names the worker."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: SimpleNamespace())
    monkeypatch.setattr(os, "environ", {})
    asyncio.run(ray_cluster.prepare("a:worker", NEED))
    assert os.environ["RAY_ADDRESS"] == "local"
    assert json.loads(os.environ[ray_cluster.JOB_CONFIG]) == {"metadata": {"vllm_batch_worker": "a:worker"}}


def test_too_few_gpus_for_a_cluster_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that needs more GPUs than this host has is refused at once, instead of waiting half an hour for them."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: SimpleNamespace())
    monkeypatch.setattr(os, "environ", {})
    with pytest.raises(EngineStartError, match="over 4 GPUs, and this host has 2") as failed:
        asyncio.run(ray_cluster.prepare("a:worker", ray_cluster.Need("GPU", 4, here=2)))
    assert "RAY_ADDRESS" in failed.value.cause.advice


def test_ray_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package the start fails at once, with what to type."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(EngineStartError) as failed:
        asyncio.run(ray_cluster.prepare("a:worker", NEED))
    assert ".[ray]" in failed.value.cause.advice


@pytest.mark.parametrize(
    "text",
    [
        "Cannot provide a placement group of placement_group_specs=[{'GPU': 1.0}] within 1800 seconds.",
        "Current node has no GPU available. current_node_resource={'CPU': 2.0}. vLLM engine cannot start without GPU.",
    ],
)
def test_too_few_gpus(text: str) -> None:
    """vLLM's messages about a cluster without enough GPUs come with advice."""
    assert "ray status" in explain([Failure("ValueError", text)]).advice
