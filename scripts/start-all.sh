#!/usr/bin/env bash
# Starts everything, or what is missing of it; waits until new work would be accepted; says how to use it.
set -euo pipefail
source "$(dirname "$0")/lib.sh"
scripts/setup.sh
"$python" -m service.gateway --check

conf=$(supervisord_conf)
if is_up; then
  say "start: supervisord is running"
  while read -r name state _; do
    [[ $name = postgres && -n ${DATABASE_URL:-} ]] && continue
    case $state in STOPPED | EXITED | FATAL) say "start: starting $name" && supervisorctl start "$name" >/dev/null ;; esac
  done < <(supervisorctl status || true)
else
  say "start: starting supervisord ($conf, state in $BATCH_HOME)"
  scripts/supervisord.sh
fi
exec "$python" scripts/wait_until_accepting.py "$conf"
