#!/usr/bin/env bash
# Stops everything of this BATCH_HOME, engine processes included. The worker first finishes the requests in its engine.
set -euo pipefail
source "$(dirname "$0")/lib.sh"
[[ -x $python ]] || exit 0
know_home

if is_up; then
  pid=$(supervisorctl pid)
  # The watchdog first: it would take the other stops for failures.
  for name in watchdog http worker gateway postgres; do
    say "stop: $name"
    supervisorctl stop "$name" >/dev/null 2>&1 || true
  done
  supervisorctl shutdown >/dev/null
  for ((i = 0; i < 300; i++)); do
    kill -0 "$pid" 2>/dev/null || break
    sleep 0.1
  done
fi
"$python" scripts/sweep.py
say "stop: nothing is running"
