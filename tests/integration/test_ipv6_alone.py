"""A machine whose only address is ::1."""

import os
import subprocess
import urllib.request
from pathlib import Path

import pytest

from tests.support.batches import lines
from tests.support.namespaces import ipv6_alone
from tests.support.ports import free_port
from tests.support.stacks import BIN, full_stack

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(os.geteuid() != 0, reason="networks need root"),
]


@pytest.mark.thorough
def test_a_batch_over_ipv6_alone(tmp_path: Path) -> None:
    """With BATCH_HOST and BATCH_METRICS_HOST set to ::1 a stack starts, runs a batch, shows status and metrics, and
    stops; the default metrics host is refused by name before anything starts."""
    given, results = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    given.write_bytes(b"".join(lines(20)))
    settings = {"BATCH_ENGINE": "simulated", "BATCH_HOST": "::1", "BATCH_GATEWAY_METRICS_PORT": str(free_port())}
    with full_stack(**settings) as stack, ipv6_alone():
        refused = stack.script("start-all.sh", timeout_s=60)
        assert refused.returncode == 2
        assert "BATCH_METRICS_HOST: 127.0.0.1 is not an address of this machine" in refused.stderr
        stack.env["BATCH_METRICS_HOST"] = "::1"
        stack.start_all()
        target = f"[::1]:{stack.env['BATCH_GATEWAY_PORT']}"
        command = [BIN / "vllm-batch", "--target", target, "submit", given, "--wait", "-o", results]
        submitted = subprocess.run(command, env=stack.env, capture_output=True, text=True, timeout=60)
        assert submitted.returncode == 0, submitted.stderr
        assert len(results.read_text().splitlines()) == 20
        shown = stack.script("status.sh")
        assert shown.returncode == 0, shown.stdout + shown.stderr
        url = f"http://[::1]:{stack.env['BATCH_GATEWAY_METRICS_PORT']}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            assert b"vllm_batch_" in answer.read()
        stopped = stack.script("stop-all.sh")
        assert stopped.returncode == 0, stopped.stderr
