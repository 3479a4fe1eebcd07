#!/usr/bin/env bash
# Starts whatever of BATCH_PROGRAMS is not running, waits until new work is accepted (on a host without gateway or worker:
# until its own programs work), and shows how to use it.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/lib.sh"
takes_none "$@"
scripts/setup.sh
know_settings
if is_up; then
  say "start: supervisord is running"
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
exec "$python" scripts/wait_until_accepting.py "$conf"
