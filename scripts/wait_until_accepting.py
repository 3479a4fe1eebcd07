"""Waits until this stack's gateway accepts new work, showing what it waits for; then prints how to use the stack.

On a host without gateway or worker it waits for the programs that there are.
"""

import json
import os
import re
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


from scripts.wait_for_programs import Missing, is_serving, wait  # noqa: E402
from service import config  # noqa: E402
from service.config import Settings  # noqa: E402
from vllm_batch import CallError, Client  # noqa: E402
from vllm_batch.channel import BATCH_SERVICE, open_channel  # noqa: E402
from watchdog.supervisor import Supervisor, SupervisorAwayError  # noqa: E402

USAGE = """
The stack is running and restarts whatever fails. Use it with:

  .venv/bin/vllm-batch {cli}--target {gateway} submit examples/chat-200.jsonl --wait -o results.jsonl
  grpcurl {grpcurl}{gateway} list
  grpcurl {grpcurl}-d '{{"requests": [{{"custom_id": "a", "url": "/v1/chat/completions", "body": {{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}}}]}}' {gateway} vllm_batch.v1.BatchService/CreateBatch
  grpc_health_probe {probe}-addr={gateway} -service=vllm_batch.v1.BatchService
  .venv/bin/supervisorctl -c {conf} status
  OpenAI(base_url="{openai}")

Show its status: scripts/status.sh. Stop it: scripts/stop-all.sh
"""  # noqa: E501

# Stop waiting when a program has been down, a running gateway has not answered, or the watchdog has given up on the
# worker, for this long.
FAILING_S = 20.0
WORKER_FAILING_S = 30.0
SILENT_S = 25.0
# The same for one that does not listen yet: on a slow disk, or beside much else, a program takes long to start.
NOT_LISTENING_S = 60.0
GAVE_UP_S = 15.0
SUPERVISOR_TIMEOUT_S = 30.0
# A program that has run for this long after a failure has recovered.
STEADY_S = 5.0
DOWN = ("FATAL", "EXITED", "BACKOFF")
NO_TOKEN = "new work is not accepted yet (set BATCH_TOKEN_FILE to see why)"


def flags(settings: Settings) -> dict[str, str]:
    """Returns the flags for TLS and tokens that the commands in USAGE need."""
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
        # grpcurl expands it, not the shell: everybody on the machine can see arguments.
        grpcurl += "-expand-headers -H 'authorization: Bearer ${BATCH_TOKEN}' "
    return {"cli": cli, "grpcurl": grpcurl, "probe": probe}


def programs(settings: Settings) -> dict[str, str]:
    """Returns the state of each program by its name in supervisord; none if it does not answer."""
    # Not supervisorctl: a process for each look takes a tenth of two cores, while vLLM loads.
    try:
        return Supervisor(settings.supervisor_url, SUPERVISOR_TIMEOUT_S).states()
    except SupervisorAwayError:
        return {}


def listens(settings: Settings) -> bool:
    """True if somebody listens at the gateway's address."""
    host, _, port = settings.own_address(settings.gateway_port).rpartition(":")
    with suppress(OSError):
        socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
        return True
    return False


@dataclass(frozen=True)
class Refusal:
    """Why the gateway accepts no new work; `reason` and `metadata` as in the API."""

    message: str
    reason: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)


def refusal(client: Client) -> Refusal:
    """Returns why the gateway refuses, or why it does not answer."""
    try:
        status = client.service_status()
    except CallError as error:
        return Refusal(error.message, error.reason, error.metadata)
    return Refusal(status.message or "the gateway is about to accept", status.reason, status.metadata)


def _group(name: str) -> str:
    """The program of one of several processes, which supervisord lists as group:process."""
    return name.partition(":")[0]


class Patience:
    """Decides whether waiting is still worthwhile. Times are monotonic."""

    def __init__(self, begin_s: float, load_timeout_s: float) -> None:
        self._begin_s = begin_s
        self._load_timeout_s = load_timeout_s
        self._failing_since_s: dict[str, float] = {}
        self._running_since_s: dict[str, float] = {}
        self._silent_since_s: float | None = None
        self._unheard_since_s: float | None = None
        self._gave_up_since_s: float | None = None

    def failing(self, now_s: float, states: Mapping[str, str]) -> list[str]:
        """Returns the programs that are down or crash-looping; supervisord itself if it does not list the gateway."""
        states = states if "gateway" in map(_group, states) else {"supervisord": "EXITED"}
        for name, state in states.items():
            if state in DOWN:
                self._failing_since_s.setdefault(name, now_s)
            if state != "RUNNING":
                self._running_since_s.pop(name, None)
            elif now_s - self._running_since_s.setdefault(name, now_s) >= STEADY_S:
                self._failing_since_s.pop(name, None)
        if "supervisord" not in states:
            self._failing_since_s.pop("supervisord", None)
        return sorted(self._failing_since_s)

    def is_over(
        self, now_s: float, why: Refusal, states: Mapping[str, str], *, is_silent: bool, listens: bool = True
    ) -> bool:
        """Returns True once waiting is pointless. `is_silent`: the gateway does not answer, although it `listens`."""
        failing = self.failing(now_s, states)
        is_silent = is_silent and "gateway" in map(_group, self._running_since_s)
        self._silent_since_s = (self._silent_since_s or now_s) if is_silent and listens else None
        self._unheard_since_s = (self._unheard_since_s or now_s) if is_silent and not listens else None
        gave_up = why.reason == "RECOVERY_GAVE_UP"
        self._gave_up_since_s = (self._gave_up_since_s or now_s) if gave_up else None
        return (
            # The watchdog restarts the worker, and supervisord the others: give them time.
            any(
                now_s - since_s > (WORKER_FAILING_S if _group(name) == "worker" else FAILING_S)
                for name, since_s in self._failing_since_s.items()
            )
            # One that has just begun to listen has all the time to answer.
            or now_s - (self._silent_since_s or now_s) > SILENT_S
            or now_s - (self._unheard_since_s or now_s) > NOT_LISTENING_S
            # After a manual start the gateway reports the give-up until the worker's first heartbeat.
            or (gave_up and "worker" in map(_group, failing))
            or now_s - (self._gave_up_since_s or now_s) > GAVE_UP_S
            or now_s - self._begin_s > self._load_timeout_s
        )


def main(conf: str) -> int:
    """Returns 0 once new work is accepted, 1 when waiting is pointless."""
    settings = config.load(warns=False)
    os.environ.update(settings.client_environment)
    gateway = settings.own_address(settings.gateway_port)
    begin_s = time.monotonic()
    said, said_at_s = "", begin_s
    patience = Patience(begin_s, settings.load_timeout_s)
    if not {"gateway", "worker"} <= settings.runs:
        return wait_for_part(settings, patience)
    may_ask = bool(settings.token_file or os.environ.get("BATCH_TOKEN") or not settings.token_hashes)
    with Client(gateway, patience_s=0) as client, open_channel(gateway) as channel:
        # Health needs no token; GetServiceStatus, which gives the reason, does.
        while not (health := is_serving(channel, BATCH_SERVICE)):
            why = refusal(client) if may_ask else Refusal(NO_TOKEN)
            now_s, states = time.monotonic(), programs(settings)
            is_silent = health is None
            if patience.is_over(now_s, why, states, is_silent=is_silent, listens=not is_silent or listens(settings)):
                silent = ["gateway"] if is_silent else ["worker"]
                return gave_up(settings.log_dir, patience.failing(now_s, states) or silent, why)
            # Print a message that differs only in numbers at most every 5 s.
            kind = re.sub(r"\d+", "", why.message)
            if kind != said or now_s - said_at_s > 5:
                print(f"start: waiting for {now_s - begin_s:.0f} s: {why.message.splitlines()[0][:200]}", flush=True)
                said, said_at_s = kind, now_s
            time.sleep(0.5)
    models: Iterable[str] = [settings.model or "tiny"]
    if may_ask:
        # The client above may still wait before it connects again: connections with TLS are not shared.
        # The model is for the examples alone, so the start has succeeded without it.
        with suppress(CallError), Client(gateway, patience_s=SILENT_S) as client:
            models = client.service_status().models
    print(f"start: new work is accepted after {time.monotonic() - begin_s:.0f} s", flush=True)
    scheme = "https" if settings.server_cert else "http"
    openai = f"{scheme}://{settings.own_address(settings.http_port)}/v1"
    print(
        USAGE.format(gateway=gateway, conf=conf, openai=openai, model=next(iter(models), "tiny"), **flags(settings)),
        flush=True,
    )
    return 0


def wait_for_part(settings: Settings, patience: Patience) -> int:
    """Waits for the programs of a host that does not run all. Returns as `main` does."""

    def is_over(now_s: float, why: Missing, is_silent: bool) -> bool:
        refused = Refusal(why.text, "RECOVERY_GAVE_UP" if why.gave_up else "")
        is_listening = not is_silent or listens(settings)
        return patience.is_over(now_s, refused, programs(settings), is_silent=is_silent, listens=is_listening)

    why = wait(settings, lambda: programs(settings), is_over)
    if why is None:
        return 0
    silent = [name for name in ("gateway", "worker") if name in settings.runs]
    return gave_up(
        settings.log_dir, patience.failing(time.monotonic(), programs(settings)) or silent, Refusal(why.text)
    )


def gave_up(log_dir: Path, names: list[str], why: Refusal) -> int:
    """Prints why the engine failed and what to do, or else the ends of the failed programs' logs. Returns 1."""
    logs = {name: log_dir / f"{name}.log" for name in names}
    cause, advice = why.metadata.get("cause", ""), why.metadata.get("advice", "")
    if not cause and "worker" in logs:
        cause, advice = last_failure(logs["worker"])
    words = []
    for name, log in logs.items():
        if cause or not log.exists():
            print(f"start: {name} did not start; its log: {log}", file=sys.stderr)
        else:
            print(f"start: {name} did not start; the end of {log}:", file=sys.stderr)
            print("\n".join(log.read_text(errors="replace").splitlines()[-15:]), file=sys.stderr)
            if last := last_words(log):
                words.append(f"{name}: {last}")
    told = ". ".join(text.rstrip(".") for text in (cause, advice) if text)
    print(f"start: FAILED: {told or '; '.join([*words, why.message])}", file=sys.stderr)
    return 1


def last_words(log: Path) -> str:
    """Returns a failed program's last line that is not JSON, or its last event of at least a warning."""
    for line in reversed(log.read_text(errors="replace").splitlines()):
        if not line.startswith("{"):
            if line.strip():
                return line.strip()
            continue
        with suppress(ValueError):
            event = json.loads(line)
            if event.get("level") in ("warning", "error", "critical"):
                return ": ".join(str(event[key]) for key in ("event", "cause", "error") if event.get(key))
    return ""


def last_failure(log: Path) -> tuple[str, str]:
    """Returns cause and advice of the last failed start in the worker's log; "" if there is none."""
    with suppress(OSError):
        for line in reversed(log.read_text(errors="replace").splitlines()):
            if line.startswith("{") and '"start_failed"' in line:
                with suppress(ValueError):
                    event = json.loads(line)
                    return event.get("cause", ""), event.get("advice", "")
    return "", ""


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
