#!/usr/bin/env bash
# Runs supervisord for this BATCH_HOME; used by start-all.sh and the systemd unit. Arguments go to supervisord.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/lib.sh"
know_settings quietly
write_supervisord_conf
[[ $postgres = embedded ]] && BATCH_EMBEDDED_POSTGRES=true || BATCH_EMBEDDED_POSTGRES=false
if [[ $postgres = embedded ]] && ! id -un >/dev/null 2>&1; then
  fail "the embedded Postgres needs a user with a name, which uid $EUID does not have: set DATABASE_URL"
fi
export BATCH_EMBEDDED_POSTGRES
for program in gateway http worker watchdog; do
  [[ " $programs " = *" $program "* ]] && starts=true || starts=false
  export "BATCH_START_${program^^}=$starts"
done
# The host may be renamed while its programs run, and they know each other by its name.
export BATCH_HOST_NAME=$host
# supervisord expands these paths twice, so each % needs another.
export BATCH_PROGRAM_LOGS=${BATCH_HOME//%/%%}/log
# It keeps what it is given open: whoever waits for the end of a pipe, or for the lock of `flock FILE start-all.sh`, would
# wait as long as it runs. In braces, because Bash reads this script from one of them.
{
  for path in /proc/self/fd/*; do
    number=${path##*/}
    ((number < 3)) || eval "exec $number>&-"
  done
  exec "$python" -m supervisor.supervisord -c "$conf" "$@"
}
