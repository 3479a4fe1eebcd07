#!/usr/bin/env bash
# As in OpenAI's guide, with curl: BASE_URL INPUT OUTPUT.
set -euo pipefail
base=$1 input=$2 output=$3

call() { curl -sS --fail-with-body -H "Authorization: Bearer none" "$@"; }
# The first string of this name in an object.
string() { grep -o "\"$1\": *\"[^\"]*\"" | sed -n 1p | cut -d '"' -f 4; }

file=$(call "$base/files" -F purpose=batch -F "file=@$input" | string id)
batch=$(call "$base/batches" -H "Content-Type: application/json" \
  -d "{\"input_file_id\": \"$file\", \"endpoint\": \"/v1/chat/completions\", \"completion_window\": \"24h\"}" | string id)
status=validating
while [[ $status = validating || $status = in_progress || $status = finalizing ]]; do
  sleep 1
  found=$(call "$base/batches/$batch")
  status=$(string status <<<"$found")
done
echo "$batch $status"
[[ $status = completed ]]
call "$base/files/$(string output_file_id <<<"$found")/content" -o "$output"
