"""A program written for OpenAI's Batch API: a file of requests in, a file of results out.

`python examples/openai_batch.py INPUT.jsonl OUTPUT.jsonl`
"""

import sys
import time
from pathlib import Path

from openai import OpenAI

# client = OpenAI()
client = OpenAI(base_url="http://127.0.0.1:50054/v1", api_key="none")


def main(source: str, target: str) -> int:
    """Returns 0 if every request was answered."""
    file = client.files.create(file=Path(source), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        time.sleep(1)
        batch = client.batches.retrieve(batch.id)
    print(f"{batch.id} {batch.status}: {batch.request_counts}")
    for error in (batch.errors and batch.errors.data) or []:
        print(f"line {error.line}: {error.message}", file=sys.stderr)
    with open(target, "wb") as output:
        for name in filter(None, (batch.output_file_id, batch.error_file_id)):
            output.write(client.files.content(name).read())
    return 0 if batch.status == "completed" and not batch.error_file_id else 1


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
