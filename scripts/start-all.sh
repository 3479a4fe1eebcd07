#!/usr/bin/env bash
# Starts whatever of BATCH_PROGRAMS is not running, waits until new work is accepted (on a host without gateway or worker:
# until its own programs work), and shows how to use it.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/lib.sh"
takes_none "$@"
scripts/setup.sh
know_settings
# For the lock; if it cannot be made, the doctor says why.
mkdir -p -m 700 "$BATCH_HOME" 2>/dev/null || true
take_turn start
if is_up; then
  say "start: supervisord is running"
  # Left by a stop-all.sh that was interrupted: supervisord starts a program only once it has ended.
  for ((i = 0; i < 240; i++)); do
    grep -q ' STOPPING ' <<<"$(supervisorctl status)" || break
    ((i)) || say "start: waiting for what is being stopped"
    sleep 0.5
  done
  while read -r name state _; do
    [[ $name = postgres && $postgres = external ]] && continue
    # Of several processes the name is group:process.
    [[ $name = postgres || " $programs " = *" ${name%%:*} "* ]] || continue
    case $state in
      STOPPED | EXITED | FATAL)
        say "start: starting $name"
        # If it does not start, the wait below says why.
        supervisorctl start "$name" >/dev/null || true
        ;;
    esac
  done < <(supervisorctl status || true)
else
  scripts/doctor.sh --quick --wrong || fail "start: nothing was started; fix the problems above (scripts/doctor.sh shows all checks)"
  say "start: starting supervisord ($conf, state in $BATCH_HOME)"
  scripts/supervisord.sh
fi
exec "$python" scripts/wait_until_accepting.py "$conf" {lock}>&-
