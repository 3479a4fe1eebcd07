"""What each screen shows about a worker that cannot start."""

import subprocess
from collections.abc import Mapping

from tests.support.stacks import BIN, FullStack
from vllm_batch import CallError, Client


def command_line(stack: FullStack, *arguments: str) -> str:
    """The output of vllm-batch, on one line."""
    env = stack.env | {"BATCH_TARGET": stack.target, "BATCH_WATCHDOG_TARGET": stack.watchdog}
    command = [str(BIN / "vllm-batch"), *arguments]
    return " ".join(subprocess.run(command, env=env, capture_output=True, text=True, timeout=60).stdout.split())


def refusal(stack: FullStack) -> CallError:
    """The error with which the gateway refuses an upload."""
    with Client(stack.target, patience_s=0) as client:
        try:
            client.submit_lines([b"{}"])
        except CallError as error:
            return error
    raise AssertionError("the gateway accepted new work")


def screens(stack: FullStack) -> Mapping[str, str]:
    """The text of each place that says why the worker cannot start."""
    refused = refusal(stack)
    return {
        "refusal": refused.message,
        "metadata": f"{refused.metadata.get('cause')} {refused.metadata.get('advice')}",
        "audit log": " ".join(event.reason for event in stack.audit() if event.kind == "gave_up"),
        "status": command_line(stack, "status"),
        "recovery status": command_line(stack, "recovery", "status"),
    }
