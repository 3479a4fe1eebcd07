# Sourced by the other scripts: paths, messages, and the supervisord.conf of this BATCH_HOME.

# Variables of the shell and of Python with which our folders and modules, or Python itself, would not be found.
unset CDPATH PYTHONSAFEPATH PYTHONHOME
# With these Python waits for a terminal instead of ending, writes no UTF-8, or ends for a warning of a library.
unset PYTHONINSPECT PYTHONIOENCODING PYTHONWARNINGS
# Whoever may write the supervisord.conf decides what runs.
umask o-w
# One that the caller has closed would become the first file that is opened, and supervisord's own socket be closed.
for number in 0 1 2; do [[ -e /proc/self/fd/$number ]] || eval "exec $number<>/dev/null"; done
# The script itself, which may have been called over a link and from any folder.
self=$(readlink -f "$0")
# As Python finds it, also if the checkout is reached over a link: paths of both are compared.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$root"
python=$root/.venv/bin/python

say() { printf '%s\n' "$*"; }
fail() {
  printf '%s\n' "$*" >&2
  exit 1
}

# Ends a script that takes no arguments if there are some: -h and --help print the comment it begins with, and whatever
# else somebody meant must not start or stop anything.
takes_none() {
  (($#)) || return 0
  if [[ $1 = -h || $1 = --help ]]; then
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$self"
    exit 0
  fi
  printf '%s\n' "${self##*/} takes no arguments; settings are in .env and the environment: conf/example.env" >&2
  exit 2
}

# Sets BATCH_HOME, from the environment or .env, and conf: the supervisord.conf that belongs to it.
know_home() {
  local told
  told=$("$python" -m scripts.settings home) || exit
  { IFS= read -r BATCH_HOME && IFS= read -r conf; } <<<"$told"
  export BATCH_HOME
}

# The same with checked settings, and postgres: embedded or external; programs: those that this host runs, with blanks;
# host: its name.
know_settings() {
  local told
  told=$("$python" -m scripts.settings start "$@") || exit
  { IFS= read -r BATCH_HOME && IFS= read -r conf && read -r postgres && read -r programs && read -r host; } <<<"$told"
  export BATCH_HOME
}

# No path is written into the copy: supervisord would interpret blanks, quotes and % in it.
write_supervisord_conf() {
  mkdir -p "$BATCH_HOME/run" "$BATCH_HOME/log" && [[ -w $BATCH_HOME ]] ||
    fail "BATCH_HOME=$BATCH_HOME must be writable for uid $EUID; in a container, mount a volume there"
  chmod 0700 "$BATCH_HOME/run" "$BATCH_HOME/log"
  [[ $conf = "$root/conf/supervisord.conf" ]] && return
  sed -e "s|%(here)s/../var|%(here)s|g" conf/supervisord.conf >"$conf.new"
  mv "$conf.new" "$conf"
}

# Not the programs in .venv/bin: the path in their first line cannot have every character.
supervisorctl() { "$python" -m supervisor.supervisorctl -c "$conf" "$@"; }

# The pid of supervisord if it answers, which a frozen one never does.
supervisord_pid() { timeout 60 "$python" -m supervisor.supervisorctl -c "$conf" pid 2>/dev/null; }

# True while supervisord answers.
is_up() { supervisord_pid >/dev/null; }

# Waits for another start-all.sh or stop-all.sh of this home, and holds off later ones until this script ends. What it
# leaves running must not have the descriptor: {lock}>&-
take_turn() {
  [[ -d $BATCH_HOME && -r $BATCH_HOME ]] || { exec {lock}</dev/null && return; }
  exec {lock}<"$BATCH_HOME"
  flock --nonblock "$lock" && return
  say "$1: waiting for another start-all.sh or stop-all.sh"
  # Longer than either takes: one that hangs must not keep a stop from ending what it waits for.
  flock --timeout 600 "$lock" || say "$1: waited for 10 minutes, and goes on without waiting"
}

# The torch version that vLLM was built for.
torch_version() { sed -n 's/^ *torch==\([0-9.]*\)\.\*$/\1.0/p' setup.cfg; }

# pip's arguments for finding the CPU build of torch, which is not on PyPI: none if a configured index has it, else
# PyTorch's own index.
torch_index() {
  "$python" -m pip --disable-pip-version-check --no-input install --dry-run --no-deps "torch==$(torch_version)+cpu" \
    >/dev/null 2>&1 || printf '%s\n' "--extra-index-url https://download.pytorch.org/whl/cpu"
}
