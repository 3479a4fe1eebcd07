"""Prepares Ray for vLLM: marks what this worker will run in a cluster, and removes what its earlier lives left there.

Then it waits until the GPUs that vLLM needs are free.

Processes on this host are ended by the watchdog. Ray's are on other hosts too, where a placement group that is still
held would keep the next start waiting for its GPUs. So would a host that is away: vLLM waits half an hour for it, and
says so only then. The sweep is a process of its own, since connecting may hang and vLLM has to make its own connection:
`RAY_ADDRESS=... python -m service.worker.engine.ray_cluster WORKER DEVICE COUNT SECONDS`.
"""

import asyncio
import importlib.util
import json
import os
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from service.telemetry import logs
from service.worker.engine.cause import Cause
from service.worker.engine.protocol import EngineStartError

# Ray reads the description of a job from it.
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
OWNER = "vllm_batch_worker"
# A cluster that ends with the worker. Ray's default would be one that ran on this machine before, dead or not.
OWN_CLUSTER = "local"
# Ray kills an actor that does not end by itself, and takes a host for dead after 65 s of silence.
SWEEP_TIMEOUT_S = 90.0
# By then the sweep has ended by itself, unless it cannot connect.
CONNECT_TIMEOUT_S = 10.0
LOOK_INTERVAL_S = 0.2
WAITED_IN_VAIN = 2

log = logs.get("ray")


class _WaitedInVainError(Exception):
    """What is not as it has to be, to be said of the cluster."""


@dataclass(frozen=True)
class Need:
    """What vLLM reserves in the cluster: `count` of what Ray calls `device`. This host has `here` of them."""

    device: str
    count: int
    here: int


async def prepare(worker_id: str, need: Need, timeout_s: float = SWEEP_TIMEOUT_S) -> None:
    """Sets the environment from which Ray starts, and waits until no earlier life of this worker holds anything.

    Raises EngineStartError, also if what it needs does not become free.
    """
    if importlib.util.find_spec("ray") is None:
        advice = "On each host: .venv/bin/pip install -e '.[ray]'"
        raise EngineStartError(Cause.of("Ray is not installed", advice, recurs=True))
    address = os.environ.setdefault("RAY_ADDRESS", OWN_CLUSTER)
    environment = dict(os.environ)
    os.environ[JOB_CONFIG] = json.dumps({"metadata": {OWNER: worker_id}})
    if address == OWN_CLUSTER:
        if need.here < need.count:
            text = f"the model is spread over {need.count} {need.device}s, and this host has {need.here}"
            raise EngineStartError(Cause.of(text, "Set RAY_ADDRESS to the address of the cluster's head."))
        return
    sweep = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", __name__, worker_id, need.device, str(need.count), str(timeout_s)),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        said, failed = await asyncio.wait_for(sweep.communicate(), timeout_s + CONNECT_TIMEOUT_S)
    except TimeoutError:
        raise EngineStartError(
            Cause.of(
                f"the Ray cluster at RAY_ADDRESS={address} did not answer within {timeout_s:.0f} s",
                "ray status --address ADDRESS shows the cluster.",
            )
        ) from None
    finally:
        if sweep.returncode is None:
            sweep.kill()
            await sweep.wait()
    if sweep.returncode == WAITED_IN_VAIN:
        raise EngineStartError(
            Cause.of(
                f"the Ray cluster at RAY_ADDRESS={address} {said.decode().strip()}; waited {timeout_s:.0f} s",
                "ray status --address ADDRESS shows hosts and GPUs, ray list placement-groups what holds them. A host"
                " that was away joins again with: ray stop --force, then ray start --address ADDRESS",
            )
        )
    if sweep.returncode != 0:
        lines = failed.decode(errors="replace").strip().splitlines() or ["no message"]
        raise EngineStartError(
            Cause.of(
                f"the Ray cluster at RAY_ADDRESS={address} cannot be used: {lines[-1]}",
                "It must run the same version of Ray and of Python, and be reachable: ray status --address ADDRESS."
                " With a token, each host needs it and RAY_AUTH_MODE=token, as does .env.",
            )
        )
    if removed := said.decode().split():
        log.warning("ray_swept", placement_groups=removed)


def jobs_of(worker_id: str, jobs: dict[Any, Any]) -> set[str]:
    """The ids of the jobs that lives of this worker have started."""
    return {job.job_id.hex() for job in jobs.values() if job.config.metadata.get(OWNER) == worker_id}


def of_jobs(ids: Collection[str], jobs: set[str]) -> set[str]:
    """Those placement groups or actors that belong to the jobs: their ids end with the job's."""
    return {each for each in ids if any(each.endswith(job) for job in jobs)}


def _sweep(worker_id: str, device: str, count: int, timeout_s: float) -> set[str]:
    """Removes the placement groups of all jobs of a worker.

    Returns once neither they nor any actor is left, and enough devices are free. Raises _WaitedInVainError.
    """
    deadline_s = time.monotonic() + timeout_s
    import ray
    from ray._private.state import actors
    from ray._raylet import PlacementGroupID

    ray.init(log_to_driver=False, configure_logging=False)
    worker = ray._private.worker.global_worker
    removed: set[str] = set()
    while True:
        jobs = jobs_of(worker_id, worker.gcs_client.get_all_job_info())
        table = ray.util.placement_group_table()
        groups = of_jobs([name for name, one in table.items() if one["state"] != "REMOVED"], jobs)
        # vLLM's actors live in placement groups, and end with them.
        for group in groups - removed:
            worker.core_worker.remove_placement_group(PlacementGroupID.from_hex(group))
        removed |= groups
        left = of_jobs([name for name, one in actors().items() if one["State"] != "DEAD"], jobs)
        free = int(ray.available_resources().get(device, 0))
        if not groups and not left and free >= count:
            return removed
        if time.monotonic() > deadline_s:
            if groups or left:
                raise _WaitedInVainError("still holds what an earlier life of this worker started")
            hosts = sum(node["Alive"] for node in ray.nodes())
            found = f"{free} free {device}s and the model needs {count} (hosts in the cluster: {hosts})"
            raise _WaitedInVainError(f"has {found}")
        time.sleep(LOOK_INTERVAL_S)


def _main(worker_id: str, device: str, count: str, timeout_s: str) -> None:
    """The caller reads what it prints."""
    try:
        print(*_sweep(worker_id, device, int(count), float(timeout_s)), sep="\n")  # noqa: T201
    except _WaitedInVainError as waited:
        print(waited)  # noqa: T201
        sys.exit(WAITED_IN_VAIN)


if __name__ == "__main__":
    _main(*sys.argv[1:])
