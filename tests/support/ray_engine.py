"""Stands for vLLM on Ray: a driver with one actor per host, each in a bundle of a placement group.

Prints the pids of its actors, then steps them for ever; exits with 3 when an actor is gone, as vLLM's engine does.
"""

import os
import sys

import ray


@ray.remote(num_cpus=1, max_restarts=0)
class Part:
    """What runs on one host."""

    def pid(self) -> int:
        return os.getpid()

    def step(self) -> None:
        pass


def main(hosts: int) -> None:
    ray.init(log_to_driver=False, configure_logging=False)
    group = ray.util.placement_group([{"CPU": 1}] * hosts, strategy="STRICT_SPREAD")
    ray.get(group.ready(), timeout=60)
    strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
    parts = [Part.options(scheduling_strategy=strategy(group, index)).remote() for index in range(hosts)]
    pids = ray.get([part.pid.remote() for part in parts], timeout=60)
    sys.stdout.write(" ".join(map(str, pids)) + "\n")
    sys.stdout.flush()
    while True:
        try:
            ray.get([part.step.remote() for part in parts])
        except ray.exceptions.RayActorError:
            sys.exit(3)


if __name__ == "__main__":
    main(int(sys.argv[1]))
