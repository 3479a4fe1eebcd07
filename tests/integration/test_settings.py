"""Settings as whole stacks see them: in `.env` only, among foreign variables, behind a proxy."""

import json
import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from ipaddress import ip_network
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import HealthServicer

from service.processes import Mark, marked
from tests.support.batches import lines
from tests.support.stacks import FullStack, full_stack
from tests.support.waiting import until
from tests.unit.test_kubernetes import manifests
from tests.unit.test_variables import FOREIGN, links
from vllm_batch import Client
from vllm_batch.channel import open_channel
from vllm_batch.v1 import recovery_service_pb2 as rpb

pytestmark = pytest.mark.timeout(300)

# Has no address anywhere.
NAME = "gpu-1.internal.invalid"


def complete(stack: FullStack, model: str = "tiny") -> None:
    """Runs a batch to completion."""
    given = [line.replace(b'"tiny"', json.dumps(model).encode()) for line in lines(5)]
    with Client(stack.target) as client:
        *_, done = client.watch(client.submit_lines(given).id)
    assert done.counts.completed == 5


def test_all_settings_in_the_file(postgres: str, database_url: str, tmp_path: Path) -> None:
    """With all settings in `.env` every script uses them, and foreign variables get one warning each."""
    with full_stack(BATCH_ENGINE="simulated", DATABASE_URL=database_url) as stack:
        moved = {name: stack.env.pop(name) for name in list(stack.env) if name.startswith(("BATCH_", "DATABASE_"))}
        env_file = tmp_path / "env"
        env_file.write_text("".join(f"{name}='{value}'\n" for name, value in moved.items() if name != "BATCH_ENV_FILE"))
        others = dict.fromkeys(FOREIGN, "1") | links("", 80) | links("_GATEWAY", 50051)
        stack.env |= others | {"BATCH_ENV_FILE": str(env_file)}
        for _ in range(2):
            started = stack.script("start-all.sh")
            assert started.returncode == 0, started.stdout + started.stderr + stack.logs()
            assert started.stderr.count("BATCH_TASK_INDEX: no setting of this server; ignored") == 1
            assert "STOPPED" in stack.supervisorctl("status", "postgres")
        assert not (stack.home / "pgdata").exists()
        complete(stack)
        assert stack.script("stop-all.sh").returncode == 0
        assert marked(Mark(stack.home)) == []


def test_typing_errors_in_the_file_stop_the_start(tmp_path: Path) -> None:
    """A misspelt name in `.env` stops the start, and the right name is suggested."""
    with full_stack(BATCH_ENGINE="simulated") as stack:
        env_file = tmp_path / "env"
        env_file.write_text("BATCH_GATEWAY_PROT=1\n")
        stack.env["BATCH_ENV_FILE"] = str(env_file)
        started = stack.script("start-all.sh")
        assert (started.returncode, stack.script("supervisord.sh").returncode) == (2, 2)
        assert "BATCH_GATEWAY_PROT: no such setting; BATCH_GATEWAY_PORT is meant" in started.stderr
        assert not (stack.home / "run/supervisord.pid").exists()


@contextmanager
def black_hole() -> Iterator[tuple[str, list[object]]]:
    """The URL of a proxy that accepts connections and never answers, and a list of those connections."""
    came: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    came.append(server.accept())
                except OSError:
                    return

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}", came
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


def own_address() -> str:
    """An address at which other machines reach this one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        try:
            one.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("the machine has no address but loopback")
        return str(one.getsockname()[0])


@pytest.mark.parametrize(
    "host", ["127.0.0.1", *(pytest.param(host, marks=pytest.mark.thorough) for host in ("::1", "own"))]
)
def test_no_call_of_ours_goes_through_a_proxy(host: str) -> None:
    """With every proxy variable set, a stack starts, works and shows its status without ever contacting the proxy."""
    host = own_address() if host == "own" else host
    shown = f"[{host}]" if ":" in host else host
    with black_hole() as (url, came):
        names = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")
        proxies = dict.fromkeys([*names, *map(str.upper, names)], url)
        given = {"BATCH_ENGINE": "simulated", "BATCH_HOST": host, "BATCH_ALLOW_INSECURE": "true"}
        with full_stack(**given, **proxies) as stack:
            for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
                stack.env.pop(name, None)
            stack.target, stack.watchdog = (
                f"{shown}:{each.rpartition(':')[2]}" for each in (stack.target, stack.watchdog)
            )
            stack.start_all()
            complete(stack)
            status = stack.script("status.sh")
            assert status.returncode == 0, status.stdout + status.stderr
            assert stack.status().verdict in (rpb.VERDICT_HEALTHY, rpb.VERDICT_STARTING)
        assert came == []


@pytest.mark.parametrize(
    ("host", "given", "is_direct"),
    [
        ("{own}", {}, False),
        ("{own}", {"no_proxy": "{own}"}, True),
        ("{own}", {"no_proxy": "gpu-1,.internal.example.com,{range}"}, True),
        ("{own}", {"no_proxy": "198.51.100.0/24"}, False),
        ("{own}", {"no_grpc_proxy": "{range}"}, True),
        ("{own}", {"no_grpc_proxy": "gpu-1", "no_proxy": "{own}"}, False),
        ("{own}", {"NO_PROXY": "{own}"}, False),
        ("{own}", {"no_proxy": "*"}, False),
        (NAME, {}, False),
        (NAME, {"no_proxy": f"gpu-2,{NAME}"}, True),
        (NAME, {"no_proxy": ".internal.invalid"}, True),
        (NAME, {"no_proxy": "internal.invalid"}, True),
        (NAME, {"no_grpc_proxy": ".internal.invalid"}, True),
        (NAME, {"no_proxy": "*.internal.invalid"}, False),
        # The proxy resolves names, so gRPC does not know the address.
        (NAME, {"no_proxy": "0.0.0.0/0"}, False),
    ],
)
def test_clients_follow_no_proxy(
    host: str, given: dict[str, str], is_direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client's call to another machine's address or name goes to the proxy, unless `no_proxy` contains it."""
    own = own_address()
    names = {"own": own, "range": str(ip_network(f"{own}/24", strict=False))}
    for variable in ("no_proxy", "NO_PROXY", "no_grpc_proxy", "grpc_proxy", "https_proxy"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in given.items():
        monkeypatch.setenv(variable, value.format(**names))
    with black_hole() as (url, came), ThreadPoolExecutor(1) as threads:
        monkeypatch.setenv("http_proxy", url)
        server = grpc.server(threads)
        health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(), server)
        port = server.add_insecure_port(f"{own}:0")
        server.start()
        try:
            with open_channel(f"{host.format(**names)}:{port}") as channel:
                call = health_pb2_grpc.HealthStub(channel).Check.future(health_pb2.HealthCheckRequest(), timeout=60)
                until(lambda: came or call.done(), "the call to arrive at the proxy, or to end")
                assert bool(came) != is_direct
                if is_direct and host == NAME:
                    assert f"resolving {NAME}" in call.exception().details()
                elif is_direct:
                    assert call.result().status == health_pb2.HealthCheckResponse.SERVING
        finally:
            server.stop(None)


def test_kubernetes_manifest(postgres: str, database_url: str) -> None:
    """The container of docs/kubernetes.md starts with its address and secret filled in, runs a batch and stops."""
    [container] = manifests()["StatefulSet"]["spec"]["template"]["spec"]["containers"]
    host = own_address()
    filled = (
        {"fieldRef": {"fieldPath": "status.podIP"}},
        {"secretKeyRef": {"name": "vllm-batch", "key": "database-url"}},
    )
    values = dict(zip(map(str, filled), (host, database_url), strict=True))
    given = {one["name"]: one["value"] if "value" in one else values[str(one["valueFrom"])] for one in container["env"]}
    with full_stack(**given | {"BATCH_ENGINE": "simulated"}) as stack:
        stack.target = f"{host}:{stack.target.rpartition(':')[2]}"
        script, *arguments = container["command"]
        command = [stack.root / script.removeprefix("/opt/vllm-batch/"), *arguments]
        with subprocess.Popen(
            command, env=stack.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as supervisord:
            try:
                with Client(stack.target) as client:
                    until(lambda: not client.accepting(), "the pod to accept new work")
                complete(stack, given["BATCH_MODEL"])
            finally:
                supervisord.terminate()
                supervisord.wait(120)
        assert marked(Mark(stack.home)) == []
