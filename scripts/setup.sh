#!/usr/bin/env bash
# Creates .venv and installs the server, vLLM (the CPU build unless there is an NVIDIA GPU) and the tools in the versions
# of conf/requirements-*.txt. A second run installs nothing. Needs Python 3.11 to 3.13 and a few system libraries
# (prerequisites.py): as root it installs them with apt; otherwise it says what to install before downloading anything.
# ENGINE=cpu or ENGINE=cuda chooses the build, for an image that is made on a machine without the GPU.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/lib.sh"

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
    [[ -n $candidate ]] && command -v "$candidate" >/dev/null || continue
    "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' && { command -v "$candidate"; return; }
  done
  return 1
}

can_apt() { ((EUID == 0)) && command -v apt-get >/dev/null; }

apt_install() {
  apt-get update
  DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"
}

# Runs a command, logging its output; reports progress every 10 s, and prints the end of the log if the command fails.
log=.venv/setup.log
step() {
  local what=$1 start=$SECONDS pid doing
  shift
  mkdir -p .venv
  say "setup: $what"
  "$@" >>"$log" 2>&1 &
  pid=$!
  while kill -0 "$pid" 2>/dev/null; do
    sleep 0.2
    if ((SECONDS - start >= 10 && (SECONDS - start) % 10 == 0)) && [[ ${last:-} != "$SECONDS" ]]; then
      last=$SECONDS
      doing=$(tail -n 1 "$log")
      say "setup: $what, $((SECONDS - start)) s: ${doing:0:100}"
    fi
  done
  wait "$pid" || { tail -n 20 "$log" >&2; fail "setup: FAILED: $what (full log: $log)"; }
}

# As pip does, but on all cores. Some packages contain files for other versions of Python, which do not compile.
compile() {
  "$python" -m compileall -qq -j 0 "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" || true
}

if "$python" -c '' 2>/dev/null; then
  found=$python
elif ! found=$(find_python); then
  can_apt && step "installing Python" apt_install python3 python3-venv
  found=$(find_python) || fail "setup: Python 3.11, 3.12 or 3.13 not found; on Debian: apt-get install -y python3 python3-venv"
fi
engine=${ENGINE:-$("$found" -m scripts.prerequisites --engine)}
[[ $engine = cpu || $engine = cuda ]] || fail "setup: ENGINE must be cpu or cuda"

# Identifies what is installed by its inputs. Written last, so that an interrupted run is repeated.
stamp=.venv/.installed
wanted=$(cat setup.cfg scripts/setup.sh "conf/requirements-$engine.txt" <(echo "$engine") | sha256sum | cut -d' ' -f1)
[[ -f $stamp && $(<"$stamp") = "$wanted" ]] && exit 0

exec 9>"$root/.setup.lock"
flock 9
[[ -f $stamp && $(<"$stamp") = "$wanted" ]] && exit 0

if can_apt; then
  read -ra packages <<<"$("$found" -m scripts.prerequisites --packages)"
  ((${#packages[@]})) && step "installing ${packages[*]}" apt_install "${packages[@]}"
fi
"$found" -m scripts.prerequisites || exit 1

if ! "$python" -m pip --version >/dev/null 2>&1; then
  [[ $found != "$python" ]] || found=$(find_python) || fail "setup: .venv has no pip, and no Python was found to recreate it; on Debian: apt-get install -y python3 python3-venv"
  rm -rf .venv
  step "creating .venv with $("$found" --version)" "$found" -m venv .venv
fi

# Exact versions with hashes: no dependency resolution, nothing that is not in the file.
pip=("$python" -m pip --disable-pip-version-check --no-input)
locked=("${pip[@]}" install --no-compile --no-deps --only-binary :all: --requirement "conf/requirements-$engine.txt")
if [[ $engine = cpu ]]; then
  step "installing the server's libraries and vLLM for CPU (3 GB, about 2 minutes on a fast connection)" "${locked[@]}"
  read -ra index <<<"$(torch_index)"
  step "installing torch for CPU" "${pip[@]}" install --no-compile --no-deps ${index[@]+"${index[@]}"} "torch==$(torch_version)+cpu"
  # Earlier versions of this script left CUDA builds that do not load beside the CPU build of torch.
  step "removing torchvision, torchaudio, torchcodec" "${pip[@]}" uninstall -y torchvision torchaudio torchcodec
else
  step "installing the server's libraries and vLLM for CUDA" "${locked[@]}"
fi
step "compiling the libraries" compile
step "installing this checkout" "${pip[@]}" install --no-deps --no-build-isolation --editable .
# The CUDA build does not load without the driver, which a container gets from its host.
[[ ${ENGINE:-} = cuda ]] || step "loading vLLM's extension" "$python" -m scripts.prerequisites --load
printf '%s\n' "$wanted" >"$stamp"
say "setup: done"
