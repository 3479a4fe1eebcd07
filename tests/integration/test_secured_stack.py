"""The scripts and the watchdog with TLS, client certificates and tokens enabled, as docs/security.md describes."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from tests.support.certificates import Authority, replace
from tests.support.stacks import ROOT, full_stack
from tests.support.waiting import until
from vllm_batch.channel import open_channel
from vllm_batch.v1 import recovery_service_pb2 as rpb
from vllm_batch.v1 import recovery_service_pb2_grpc

DOCUMENT = (ROOT / "docs" / "security.md").read_text()


def documented(section: str, keys: Path) -> str:
    """The commands in a section of docs/security.md, with another folder for the keys.

    Settings are those before the first command for clients.
    """
    [text] = re.findall(rf"^## {section}\n(.*?)(?=^## |^\*\*Clients)", DOCUMENT, re.MULTILINE | re.DOTALL)
    lines = (line.removeprefix("    ") for line in text.splitlines() if line.startswith("    "))
    return "".join(f"{line}\n" for line in lines if not line.startswith("#")).replace("var/keys", str(keys))


def test_secured_stack(tmp_path: Path) -> None:
    """A secured stack, its probes and the commands it prints work; an expired certificate gets no worker restarted."""
    keys = tmp_path / "keys"
    subprocess.run(
        ["bash", "-euc", documented("Certificates", keys) + documented("Tokens", keys)], cwd=ROOT, check=True
    )
    settings = dict(line.split("=", 1) for line in documented("Switching it on", keys).splitlines() if "=" in line)
    server = (keys / "server.pem", keys / "server.key")
    with full_stack(BATCH_ENGINE="simulated", BATCH_HEARTBEAT_INTERVAL_S="1", **settings) as stack:
        # In a file only, as in .env: the scripts find it there.
        env_file = tmp_path / "env"
        env_file.write_text("".join(f"{name}={stack.env.pop(name)}\n" for name in settings))
        stack.env["BATCH_ENV_FILE"] = str(env_file)
        stack.security = {
            "tls_ca": settings["BATCH_TLS_CA"],
            "tls_cert": settings["BATCH_TLS_CERT"],
            "tls_key": settings["BATCH_TLS_KEY"],
            "token": (keys / "operator.token").read_text().strip(),
        }
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
        for expected in ("RUNNING", "HEALTHY", "accepts new work", "batch_"):
            assert expected in shown.stdout

        sockets = [path for path in (stack.home / "run").iterdir() if path.is_socket()]
        assert {path.name for path in sockets} == {"supervisor.sock", "worker.sock", "gateway.sock", "http.sock"}
        assert {path.stat().st_mode & 0o777 for path in sockets} == {0o700}

        for program, status in (("gateway", 0), ("worker", 0), ("stranger", 1)):
            probe = [sys.executable, "-m", "scripts.probe", program]
            assert subprocess.run(probe, cwd=ROOT, env=stack.env, timeout=60).returncode == status, program

        # A connection opened earlier, because new ones fail from now on.
        with open_channel(stack.watchdog, **stack.security) as channel:
            watchdog = recovery_service_pb2_grpc.RecoveryServiceStub(channel)
            watchdog.GetStatus(rpb.GetStatusRequest(), timeout=10)
            replace(server, Authority(tmp_path, "other").issue(is_expired=True))
            os.kill(stack.pid("worker"), signal.SIGKILL)

            def outcomes() -> list[str]:
                events = watchdog.ListEvents(rpb.ListEventsRequest(), timeout=10).events
                return [event.outcome for event in events if event.kind == "restart"]

            until(lambda: outcomes() == ["recovered"], "the killed worker to be recovered")
            [worker] = watchdog.GetStatus(rpb.GetStatusRequest(), timeout=10).workers
            assert worker.health == "SERVING"
