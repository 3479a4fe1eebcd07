"""Stands for a worker with vLLM on Ray: prepares Ray, then drives an actor on each GPU, in bundles of placement groups.

`WORKER GPUS SECONDS`: one engine of them all. `WORKER GPUS SECONDS data`: an engine on each host, in a group that names
the host, as vLLM places data parallelism. Prints `actors: ` and their pids, then steps them for ever; exits with 3 when
an actor is gone, as vLLM's engine does, and with 4 after `failed: ` and the cause.
"""

import asyncio
import os
import sys
from typing import Any

import ray

from service.worker.engine import ray_cluster
from service.worker.engine.protocol import EngineStartError


@ray.remote(num_cpus=0, num_gpus=1, max_restarts=0)
class Part:
    """What runs on one GPU."""

    def pid(self) -> int:
        return os.getpid()

    def step(self) -> None:
        pass


def one_engine(gpus: int) -> list[Any]:
    return [ray.util.placement_group([{"GPU": 1}] * gpus, strategy="PACK")]


def data_parallel(gpus: int) -> list[Any]:
    hosts = sorted(node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"])
    assert len(hosts) == gpus
    bundles = [[{"GPU": 1, f"node:{host}": 0.001}, {"CPU": 1, f"node:{host}": 0.001}] for host in hosts]
    return [ray.util.placement_group(each, strategy="STRICT_PACK") for each in bundles]


def main(worker_id: str, gpus: int, patience_s: float, place: str = "") -> None:
    try:
        asyncio.run(ray_cluster.prepare(worker_id, ray_cluster.Need("GPU", gpus, here=gpus), patience_s))
    except EngineStartError as failed:
        sys.stdout.write(f"failed: {failed}\n")
        sys.exit(4)
    own = {"num_gpus": gpus} if os.environ["RAY_ADDRESS"] == ray_cluster.OWN_CLUSTER else {}
    ray.init(log_to_driver=False, configure_logging=False, **own)
    groups = data_parallel(gpus) if place else one_engine(gpus)
    ray.get([group.ready() for group in groups])
    strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
    parts = [
        Part.options(scheduling_strategy=strategy(group, index)).remote()
        for group in groups
        for index, bundle in enumerate(group.bundle_specs)
        if "GPU" in bundle
    ]
    pids = ray.get([part.pid.remote() for part in parts])
    sys.stdout.write(f"actors: {' '.join(map(str, pids))}\n")
    sys.stdout.flush()
    while True:
        try:
            ray.get([part.step.remote() for part in parts])
        except ray.exceptions.RayActorError:
            sys.exit(3)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), *sys.argv[4:])
