#!/usr/bin/env bash
# Stops everything of this BATCH_HOME, engine processes included. The worker first finishes the requests in its engine.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/lib.sh"
takes_none "$@"
[[ -x $python ]] || exit 0
know_home
take_turn stop

if pid=$(supervisord_pid); then
  # One after the other, the watchdog first: it would take the other stops for failures.
  PYTHONUNBUFFERED=1 supervisorctl stop 'watchdog:*' 'http:*' 'worker:*' 'gateway:*' 'postgres:*' 2>/dev/null |
    sed -u -n 's/^\(.*\): stopped$/stop: \1/p' || true
  # It may be ending already, told by somebody else.
  supervisorctl shutdown >/dev/null || true
  for ((i = 0; i < 300; i++)); do
    kill -0 "$pid" 2>/dev/null || break
    sleep 0.1
  done
fi
"$python" scripts/sweep.py
say "stop: nothing is running"
