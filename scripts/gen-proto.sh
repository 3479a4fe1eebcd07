#!/usr/bin/env bash
# Regenerates client/vllm_batch/v1 (stubs) and docs/api.md from proto/. Arguments: other folders for stubs and api.md.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
out=${1:-client}
docs=${1:-docs}
export PATH="$PWD/.venv/bin:$PATH"
mkdir -p "$out"
descriptors=$(mktemp)
trap 'rm -f "$descriptors"' EXIT
python -m grpc_tools.protoc -Iproto \
  --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" --mypy_grpc_out="$out" \
  --include_source_info --descriptor_set_out="$descriptors" \
  proto/vllm_batch/v1/*.proto
python scripts/api_docs.py "$descriptors" "$docs/api.md"
