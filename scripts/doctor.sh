#!/usr/bin/env bash
# Checks everything that a start depends on, one line each: ok, or what is wrong and what to type. Exits with 0 if the
# stack can start. --quick skips what takes more than a second or two; --wrong shows only problems.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/lib.sh"
[[ -x $python ]] || fail "not installed yet: run scripts/setup.sh"
exec "$python" -W ignore -m scripts.doctor "$@"
