#!/usr/bin/env bash
# Processes, verdict, heartbeat, last recovery and batches of this BATCH_HOME, on one screen. Status 0: it can be used.
set -euo pipefail
source "$(dirname "$0")/lib.sh"
[[ -x $python ]] || fail "nothing is set up: scripts/start-all.sh"
if is_up; then
  supervisorctl status || true
else
  say "supervisord is not running: scripts/start-all.sh"
fi
# With the TLS and token of this stack's settings, which may be in .env alone.
exec "$python" -c '
import os, sys
from service import config
s = config.load()
os.environ.update(s.client_environment)
gateway, watchdog = (f"{s.own_host}:{port}" for port in (s.gateway_port, s.watchdog_port))
command = sys.argv[1]
os.execv(command, [command, "--target", gateway, "status", "--watchdog-target", watchdog])' "$root/.venv/bin/vllm-batch"
