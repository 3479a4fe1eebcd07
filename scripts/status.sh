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
read -r gateway watchdog < <("$python" -c '
from service import config
s = config.load()
print(f"{s.host}:{s.gateway_port} {s.host}:{s.watchdog_port}")')
exec "$root/.venv/bin/vllm-batch" --target "$gateway" status --watchdog-target "$watchdog"
