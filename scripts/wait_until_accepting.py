"""Waits until the gateway of this stack accepts new work, saying what it waits for; then says how to use it."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import grpc  # noqa: E402
from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: E402

from service import config  # noqa: E402
from service.config import Settings  # noqa: E402
from vllm_batch.channel import open_channel  # noqa: E402
from vllm_batch.client import Client  # noqa: E402

USAGE = """
It runs, and restarts what fails. Use it with:

  .venv/bin/vllm-batch {cli}--target {gateway} submit examples/chat-200.jsonl --wait -o results.jsonl
  grpcurl {grpcurl}{gateway} list
  grpcurl {grpcurl}-d '{{"requests": [{{"custom_id": "a", "url": "/v1/chat/completions", "body": {{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}}}]}}' {gateway} vllm_batch.v1.BatchService/CreateBatch
  grpc_health_probe {probe}-addr={gateway} -service=vllm_batch.v1.BatchService
  .venv/bin/supervisorctl -c {conf} status

See what it does: scripts/status.sh. Stop it: scripts/stop-all.sh
"""  # noqa: E501


NO_TOKEN = "new work is not accepted yet (set BATCH_TOKEN_FILE to be told why)"


def is_accepting(channel: grpc.Channel) -> bool:
    """True when the gateway's health says that new work is accepted."""
    request = health_pb2.HealthCheckRequest(service="vllm_batch.v1.BatchService")
    try:
        answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)
    except grpc.RpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def flags(settings: Settings) -> dict[str, str]:
    """What the programs of USAGE need to be told beside the address, for TLS and tokens."""
    cli, grpcurl, probe = "", "-plaintext ", ""
    if settings.server_cert:
        cli, grpcurl = f"--tls-ca {settings.tls_ca} ", f"-cacert {settings.tls_ca} "
        probe = f"-tls -tls-ca-cert={settings.tls_ca} "
        if settings.client_ca:
            cli += f"--tls-cert {settings.tls_cert} --tls-key {settings.tls_key} "
            grpcurl += f"-cert {settings.tls_cert} -key {settings.tls_key} "
            probe += f"-tls-client-cert={settings.tls_cert} -tls-client-key={settings.tls_key} "
        if settings.tls_server_name:
            cli += f"--tls-server-name {settings.tls_server_name} "
            grpcurl += f"-servername {settings.tls_server_name} "
            probe += f"-tls-server-name={settings.tls_server_name} "
    if settings.token_hashes:
        cli += f"--token-file {settings.token_file or 'TOKEN_FILE'} "
        # Expanded by grpcurl, not by the shell: what is an argument is seen by everybody on the machine.
        grpcurl += "-expand-headers -H 'authorization: Bearer ${BATCH_TOKEN}' "
    return {"cli": cli, "grpcurl": grpcurl, "probe": probe}


def programs(conf: str) -> dict[str, str]:
    """State of each program, as supervisorctl names it."""
    shown = subprocess.run(
        [str(ROOT / ".venv/bin/supervisorctl"), "-c", conf, "status"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    return dict(line.split()[:2] for line in shown.stdout.splitlines() if len(line.split()) >= 2)


def main(conf: str) -> int:
    """0 once new work is accepted, 1 when it cannot come to that."""
    settings = config.load()
    os.environ.update(settings.client_environment)
    gateway = f"{settings.own_host}:{settings.gateway_port}"
    begin = time.monotonic()
    said, said_at = "", begin
    failing_since: float | None = None
    has_token = bool(settings.token_file or os.environ.get("BATCH_TOKEN"))
    with Client(gateway, patience_s=0) as client, open_channel(gateway) as channel:
        # Health needs no token; the reason does.
        while not is_accepting(channel):
            why = client.accepting() if has_token or not settings.token_hashes else NO_TOKEN
            waited_s = time.monotonic() - begin
            states = programs(conf)
            bad = {name for name, state in states.items() if state in ("FATAL", "EXITED", "BACKOFF")}
            failing_since = (failing_since or time.monotonic()) if bad else None
            # The watchdog starts a worker that has ended, and supervisord tries the others again: give them a while.
            if (failing_since and time.monotonic() - failing_since > 30) or waited_s > settings.load_timeout_s:
                return gave_up(settings.log_dir, sorted(bad) or ["worker"])
            # The same with another number is no news, but silence must not last.
            why = why or "the gateway is about to accept"
            kind = re.sub(r"\d+", "", why)
            if kind != said or time.monotonic() - said_at > 5:
                print(f"start: waiting, {waited_s:.0f} s: {why.splitlines()[0][:100]}", flush=True)
                said, said_at = kind, time.monotonic()
            time.sleep(0.5)
    print(f"start: new work is accepted after {time.monotonic() - begin:.0f} s", flush=True)
    model = settings.model or "tiny"
    print(USAGE.format(gateway=gateway, conf=conf, model=model, **flags(settings)), flush=True)
    return 0


def gave_up(log_dir: Path, names: list[str]) -> int:
    """Shows the end of the logs of what failed."""
    for name in names:
        log = log_dir / f"{name}.log"
        print(f"start: {name} does not come up; the end of {log}:", file=sys.stderr)
        if log.exists():
            print("\n".join(log.read_text(errors="replace").splitlines()[-15:]), file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
