"""Exit status 0 if a program of this host is SERVING: `python -m scripts.probe gateway`, or worker, or watchdog.

With the name of a service behind it: if that is.

Asks at its Unix socket, so it needs no certificates. For Kubernetes' probes where TLS is on.
"""

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service import config

TIMEOUT_S = 5


def main(program: str, service: str = "") -> int:
    """Prints what is wrong."""
    settings = config.load(warns=False)
    with grpc.insecure_channel(settings.probe_address(program)) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_S
            )
        except grpc.RpcError as error:
            print(f"{program} does not answer: {error.details()}")
            return 1
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        print(f"{service or program} is {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
