#!/usr/bin/env bash
# Everything that CI runs, with a summary. With arguments: pytest with these, as `scripts/test.sh tests/unit -k policy`.
set -uo pipefail
cd "$(dirname "$0")/.."
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

check format "$bin/ruff" format --check .
check lint "$bin/ruff" check .
check types "$bin/mypy"
check scripts bash -n scripts/*.sh .ci/run
check unit "$bin/python" -m pytest -q tests/unit
# More of them than cores: they wait for processes most of the time.
check integration "$bin/python" -m pytest -q -n 3 --dist loadscope tests/integration
check chaos "$bin/python" -m pytest -q -s tests/chaos
check vllm "$bin/python" -m pytest -q tests/e2e
check demo scripts/demo.sh

printf '\n== summary\n'
printf '%s\n' "${summary[@]}"
exit $status
