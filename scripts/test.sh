#!/usr/bin/env bash
# Runs everything that CI runs, with a summary. Arguments go to pytest instead: `scripts/test.sh tests/unit -k policy`.
set -uo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
scripts/setup.sh || exit 1
bin=$PWD/.venv/bin
if (($#)); then exec "$bin/python" -m pytest "$@"; fi

summary=()
status=0
check() {
  local name=$1 start=$SECONDS result=ok
  shift
  printf '\n== %s\n' "$name"
  "$@" || { result=FAILED && status=1; }
  summary+=("$(printf '%-12s %-7s %4d s' "$name" "$result" $((SECONDS - start)))")
}

# bash -n checks only its first argument.
parse() {
  local script
  for script; do bash -n "$script" || return; done
}

# Tests alone need these. They come while other stages run; where they cannot be had, what needs them is skipped.
install_for_tests() {
  local missing=()
  PATH=$PATH:/usr/sbin command -v pgbouncer >/dev/null || missing+=(pgbouncer)
  command -v chromium >/dev/null || missing+=(chromium)
  ((${#missing[@]} && EUID == 0)) && command -v apt-get >/dev/null || return 0
  apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"
}
install_for_tests >.venv/apt.log 2>&1 &
installing=$!

# Whole stacks wait about as much as they compute, so twice as many at a time as CI has cores. The longest begin first.
stacks() {
  wait "$installing" || tail -n 20 .venv/apt.log
  "$bin/python" -m pytest -q -n 4 --dist loadscope --no-loadscope-reorder tests/chaos tests/browser tests/fleet \
    tests/integration/test_watchdog.py tests/integration
}

check format "$bin/ruff" format --check .
check lint "$bin/ruff" check .
check types "$bin/mypy"
check scripts parse scripts/*.sh .ci/run
check proto "$bin/buf" lint
check unit "$bin/python" -m pytest -q -n 2 --cov --cov-report= tests/unit
check stacks stacks
# Three engines fit into memory beside each other, but not on a GPU, which each takes nearly whole. One more than CI has
# cores, because a start's two processes import vLLM one after the other.
engines=(-n 3 --dist loadgroup)
[[ $("$bin/python" -m scripts.prerequisites --engine) = cpu ]] || engines=()
check vllm "$bin/python" -m pytest -q ${engines[@]+"${engines[@]}"} tests/e2e
check demo scripts/demo.sh

printf '\n== summary\n'
printf '%s\n' "${summary[@]}"
exit $status
