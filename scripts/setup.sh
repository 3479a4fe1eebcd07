#!/usr/bin/env bash
# Makes .venv and installs what is missing: the server, vLLM (the CPU build unless there is an NVIDIA GPU), the tools.
# A second run installs nothing. Needs Python 3.11 or newer; neither root nor a Postgres.
set -euo pipefail
source "$(dirname "$0")/lib.sh"

engine=cpu
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then engine=cuda; fi

# What was installed, told by what asks for it. Written last, so that a broken run is done again.
stamp=.venv/.installed
wanted=$(cat setup.cfg scripts/setup.sh <(echo "$engine") | sha256sum | cut -d' ' -f1)
[[ -f $stamp && $(<"$stamp") = "$wanted" ]] && exit 0

exec 9>"$root/.setup.lock"
flock 9
[[ -f $stamp && $(<"$stamp") = "$wanted" ]] && exit 0

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
    [[ -n $candidate ]] && command -v "$candidate" >/dev/null || continue
    "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' && { command -v "$candidate"; return; }
  done
  return 1
}

# Runs a command with its output in a log; says every 10 s that it goes on, and shows the end of the log if it fails.
log=.venv/setup.log
step() {
  local what=$1 start=$SECONDS pid
  shift
  say "setup: $what"
  "$@" >>"$log" 2>&1 &
  pid=$!
  while kill -0 "$pid" 2>/dev/null; do
    sleep 0.2
    if ((SECONDS - start >= 10 && (SECONDS - start) % 10 == 0)) && [[ ${last:-} != "$SECONDS" ]]; then
      last=$SECONDS
      say "setup: $what, $((SECONDS - start)) s: $(tail -n 1 "$log" | cut -c1-100)"
    fi
  done
  wait "$pid" || { tail -n 20 "$log" >&2; fail "setup: failed: $what (whole log: $log)"; }
}

found=$(find_python) || fail "setup: needs Python 3.11, 3.12 or 3.13; on Debian: apt install python3 python3-venv"
mkdir -p .venv
if [[ ! -x $python ]] || ! "$python" -m pip --version >/dev/null 2>&1; then
  step "making .venv with $("$found" --version)" "$found" -m venv --clear .venv ||
    fail "setup: $found cannot make virtual environments; on Debian: apt install python3-venv"
  mkdir -p .venv
fi

pip=("$python" -m pip --disable-pip-version-check --no-input install)
if [[ $engine = cpu ]]; then
  torch=$(sed -n 's/^ *torch==\([0-9.]*\)\.\*$/\1/p' setup.cfg)
  # The CPU build of torch is not on PyPI: where pip is not told of one already, it is PyTorch's own index.
  if ! "${pip[@]}" --dry-run --no-deps "torch==$torch.0+cpu" >/dev/null 2>&1; then
    pip+=(--extra-index-url https://download.pytorch.org/whl/cpu)
  fi
  step "installing the server and vLLM for CPU (3.5 GB, about 2 minutes on a fast line)" \
    "${pip[@]}" -e ".[server,tracing,dev,cpu]" "torch==$torch.0+cpu"
  # Pulled in as CUDA builds that do not load beside the CPU build of torch; text models need none of them.
  step "removing torchvision, torchaudio, torchcodec" \
    "$python" -m pip --disable-pip-version-check uninstall -y torchvision torchaudio torchcodec
else
  step "installing the server and vLLM for CUDA" "${pip[@]}" -e ".[server,tracing,dev,cuda]"
fi
printf '%s\n' "$wanted" >"$stamp"
say "setup: done"
