#!/usr/bin/env bash
# From a batch to its results by grpcurl alone, which finds the contract by reflection. With an argument: host:port.
set -euo pipefail
target=${1:-127.0.0.1:50051}
service=vllm_batch.v1.BatchService
call() { grpcurl -plaintext -d "$2" "$target" "$service/$1"; }

grpcurl -plaintext "$target" list
grpcurl -plaintext -d "{\"service\": \"$service\"}" "$target" grpc.health.v1.Health/Check

# Under one request_id it may be sent again and again, and is one batch.
created=$(call CreateBatch '{
  "options": {"request_id": "'"${REQUEST_ID:-grpcurl-$RANDOM-$RANDOM}"'", "metadata": {"example": "grpcurl"}},
  "requests": [
    {"custom_id": "a", "url": "/v1/chat/completions",
     "body": {"model": "tiny", "max_tokens": 16, "messages": [{"role": "user", "content": "Hello"}]}},
    {"custom_id": "b", "url": "/v1/chat/completions",
     "body": {"model": "tiny", "max_tokens": 16, "messages": [{"role": "user", "content": "Goodbye"}]}}
  ]}')
printf '%s\n' "$created"
batch=$(sed -n 's/.*"id": *"\(batch_[0-9]*\)".*/\1/p' <<<"$created" | head -n 1)

call WatchBatch "{\"batch_id\": \"$batch\"}" # ends when the batch does
call StreamResults "{\"batch_id\": \"$batch\"}"
call GetResult "{\"batch_id\": \"$batch\", \"custom_id\": \"b\"}"
call ListBatches '{"page_size": 1}'
