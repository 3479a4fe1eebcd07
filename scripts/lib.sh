# Sourced by the other scripts: where things are, how to speak, which supervisord.conf belongs to this BATCH_HOME.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
python=$root/.venv/bin/python
export BATCH_HOME=${BATCH_HOME:-$root/var}
[[ $BATCH_HOME = /* ]] || BATCH_HOME=$PWD/$BATCH_HOME

say() { printf '%s\n' "$*"; }
fail() {
  printf '%s\n' "$*" >&2
  exit 1
}

# The shipped one for var/; any other home has its own, which differs in its paths alone.
supervisord_conf() {
  if [[ $BATCH_HOME -ef $root/var || $BATCH_HOME = "$root/var" ]]; then
    printf '%s\n' "conf/supervisord.conf"
  else
    printf '%s\n' "$BATCH_HOME/supervisord.conf"
  fi
}

write_supervisord_conf() {
  mkdir -p "$BATCH_HOME/run" "$BATCH_HOME/log"
  chmod 0700 "$BATCH_HOME/log"
  local conf
  conf=$(supervisord_conf)
  [[ $conf = conf/supervisord.conf ]] && return
  sed -e "s|%(here)s/../var|%(here)s|g" -e "s|%(here)s/\.\./\.venv|$root/.venv|g" -e "s|^directory=.*|directory=$root|" \
    conf/supervisord.conf >"$conf.new"
  mv "$conf.new" "$conf"
}

supervisorctl() { "$root/.venv/bin/supervisorctl" -c "$(supervisord_conf)" "$@"; }

# True while supervisord answers.
is_up() { supervisorctl pid >/dev/null 2>&1; }
