#!/usr/bin/env bash
# Regenerates the stubs under client/vllm_batch/v1 from proto/. With a folder as argument: into that folder.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-client}
export PATH="$PWD/.venv/bin:$PATH"
mkdir -p "$out"
python -m grpc_tools.protoc -Iproto \
  --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" --mypy_grpc_out="$out" \
  proto/vllm_batch/v1/*.proto
