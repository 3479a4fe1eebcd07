#!/usr/bin/env bash
# Renews conf/requirements-cpu.txt and -cuda.txt, which setup.sh installs: the newest versions within setup.cfg's ranges,
# with hashes. Arguments go to `uv pip compile`, such as `--upgrade-package grpcio`; without any, everything is upgraded.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/lib.sh"
[[ -x $python ]] || fail "not installed yet: run scripts/setup.sh"
(($#)) || set -- --upgrade

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
say "lock: fetching uv and the CPU build of torch"
pip() { "$python" -m pip --disable-pip-version-check --no-input --quiet "$@"; }
pip install --target "$work/uv" "uv==0.13.9"

# The CPU build of torch is on a separate index, with a file for each Python, and not every machine can reach them all.
# So it is not in the requirements: setup.sh installs its exact version. Its dependencies are read from the wheel.
read -ra index <<<"$(torch_index)"
pip download --no-deps --dest "$work" ${index[@]+"${index[@]}"} "torch==$(torch_version)+cpu"
"$python" - "$work" <<'EOF' >"$work/torch.in"
import sys, zipfile
from email.parser import Parser
from pathlib import Path

[wheel] = Path(sys.argv[1]).glob("torch-*.whl")
with zipfile.ZipFile(wheel) as files:
    [metadata] = [name for name in files.namelist() if name.endswith(".dist-info/METADATA")]
    needed = Parser().parsestr(files.read(metadata).decode()).get_all("Requires-Dist", [])
print("\n".join(line for line in needed if "extra ==" not in line))
EOF
# PyPI has only CUDA builds of torchvision, torchaudio and torchcodec, which do not load beside the CPU build of torch;
# text models need none of the three.
printf '%s\n' torch torchvision torchaudio torchcodec >"$work/excluded"

compile() {
  local engine=$1
  shift
  say "lock: resolving for $engine"
  PYTHONPATH="$work/uv" "$python" -m uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
    --no-annotate --custom-compile-command scripts/lock.sh --extra server --extra tracing --extra dev --extra "$engine" \
    --output-file "conf/requirements-$engine.txt" setup.cfg "$@"
}
compile cpu "$work/torch.in" --excludes "$work/excluded" "$@"
compile cuda "$@"
say "lock: done; run scripts/setup.sh to install the new versions"
