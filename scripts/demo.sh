#!/usr/bin/env bash
# From a clone to a healed batch: sets up, starts a stack of its own, runs the example, kills the worker in the middle,
# shows the recovery, checks every result, stops everything. Arguments: none.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
exec .venv/bin/python scripts/demo.py
