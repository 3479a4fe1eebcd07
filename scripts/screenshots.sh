#!/usr/bin/env bash
# Makes the pictures in docs/images again: the page and `vllm-batch top`, of a stack of their own. Needs Chromium.
set -euo pipefail
source "$(dirname "$(readlink -f "$0")")/lib.sh"
takes_none "$@"
exec .venv/bin/python -m tests.browser.screenshots docs/images
