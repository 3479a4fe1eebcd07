"""The scripts and the watchdog with TLS, client certificates and tokens switched on, as docs/security.md has it."""

import os
import shlex
import signal
import subprocess
from pathlib import Path

from service import tokens
from service.roles import Role
from tests.certificates import Authority, replace
from tests.stacks import ROOT, full_stack
from tests.waiting import until
from vllm_batch.channel import open_channel
from vllm_batch.v1 import recovery_service_pb2 as rpb
from vllm_batch.v1 import recovery_service_pb2_grpc


def test_secured_stack(tmp_path: Path) -> None:
    """It starts, its scripts work, the command they print runs; and a certificate that has expired kills no worker."""
    servers, clients = Authority(tmp_path, "servers"), Authority(tmp_path, "clients")
    server, client = servers.issue(), clients.issue()
    secret, token = tokens.new("operator", Role.OPERATE)
    hashes, token_file = tmp_path / "hashes", tmp_path / "token"
    for file, text in ((hashes, token.line()), (token_file, secret)):
        file.touch(0o600)
        file.write_text(text + "\n")
    given = {
        "SERVER_CERT": server[0],
        "SERVER_KEY": server[1],
        "CLIENT_CA": clients.file,
        "TLS_CA": servers.file,
        "TLS_CERT": client[0],
        "TLS_KEY": client[1],
        "TOKEN_HASHES": hashes,
        "TOKEN_FILE": token_file,
    }
    settings = {f"BATCH_{name}": str(path) for name, path in given.items()}
    with full_stack(BATCH_ENGINE="simulated", BATCH_HEARTBEAT_INTERVAL_S="1", **settings) as stack:
        # In a file alone, as in .env: the scripts find it there.
        env_file = tmp_path / "env"
        env_file.write_text("".join(f"{name}={stack.env.pop(name)}\n" for name in settings))
        stack.env["BATCH_ENV_FILE"] = str(env_file)
        stack.security = {"tls_ca": str(servers.file), "tls_cert": str(client[0]), "tls_key": str(client[1])}
        stack.security["token"] = secret
        started = stack.script("start-all.sh")
        assert started.returncode == 0, started.stderr + stack.logs()

        printed = [text.strip() for text in started.stdout.splitlines()]
        submit = next(text for text in printed if text.startswith(".venv/bin/vllm-batch"))
        arguments = shlex.split(submit.replace("results.jsonl", str(tmp_path / "results.jsonl")))
        env = {name: value for name, value in os.environ.items() if not name.startswith("BATCH_")}
        done = subprocess.run(arguments, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 200

        until(lambda: stack.status().verdict == rpb.VERDICT_HEALTHY, "the first verdict")
        shown = stack.script("status.sh")
        assert shown.returncode == 0, shown.stderr
        for expected in ("RUNNING", "HEALTHY", "accepts new work", "batch_1"):
            assert expected in shown.stdout

        sockets = [path for path in (stack.home / "run").iterdir() if path.is_socket()]
        assert {path.name for path in sockets} == {"supervisor.sock", "worker.sock"}
        assert {path.stat().st_mode & 0o777 for path in sockets} == {0o700}

        # A connection from before, as nobody gets a new one now.
        with open_channel(stack.watchdog, **stack.security) as channel:
            watchdog = recovery_service_pb2_grpc.RecoveryServiceStub(channel)
            watchdog.GetStatus(rpb.GetStatusRequest(), timeout=10)
            replace(server, servers.issue(is_expired=True))
            os.kill(stack.pid("worker"), signal.SIGKILL)

            def outcomes() -> list[str]:
                events = watchdog.ListEvents(rpb.ListEventsRequest(), timeout=10).events
                return [event.outcome for event in events if event.kind == "restart"]

            until(lambda: outcomes() == ["recovered"], "the worker to be healthy again")
            [worker] = watchdog.GetStatus(rpb.GetStatusRequest(), timeout=10).workers
            assert worker.health == "SERVING"
