#!/usr/bin/env bash
# Shows processes, verdict, heartbeat, last recovery and batches of this BATCH_HOME. Exits with 0 if it can be used. On a
# host without a gateway: what its watchdog says, unless BATCH_TARGET names another host's gateway.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/lib.sh"
takes_none "$@"
[[ -x $python ]] || fail "not installed yet: run scripts/start-all.sh"
know_home
if is_up; then
  supervisorctl status || true
else
  say "supervisord is not running; start it with scripts/start-all.sh"
fi
# With TLS and token from this stack's settings, which may be only in .env.
exec "$python" -m scripts.status "$root/.venv/bin/vllm-batch"
