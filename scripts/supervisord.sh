#!/usr/bin/env bash
# Runs supervisord for this BATCH_HOME; used by start-all.sh and the systemd unit. Arguments go to supervisord.
set -euo pipefail
source "$(dirname "$0")/lib.sh"
write_supervisord_conf
BATCH_EMBEDDED_POSTGRES=$("$python" -c '
from service import config
print("false" if config.load().database_url else "true")')
export BATCH_EMBEDDED_POSTGRES
exec "$root/.venv/bin/supervisord" -c "$(supervisord_conf)" "$@"
