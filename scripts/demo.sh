#!/usr/bin/env bash
# From a clone to a recovered batch: sets up, starts a separate stack, runs the example, kills the worker halfway, shows
# the recovery, checks every result and stops everything. Takes no arguments.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/lib.sh"
takes_none "$@"
scripts/setup.sh
exec .venv/bin/python -m scripts.demo
