"""Submits requests made in Python, waits, prints each answer. `python examples/sync_client.py [HOST:PORT]`."""

import json
import sys
from collections.abc import Iterator
from typing import Any

from vllm_batch import DEFAULT_TARGET, CallError, Client
from vllm_batch.v1 import batch_service_pb2 as pb

CITIES = ["Lisbon", "Oslo", "Quito"]


def requests() -> Iterator[dict[str, Any]]:
    """A request for each city."""
    for city in CITIES:
        messages = [{"role": "user", "content": f"One sentence about {city}."}]
        body = {"model": "tiny", "messages": messages, "max_tokens": 32}
        yield {"custom_id": city, "method": "POST", "url": "/v1/chat/completions", "body": body}


def show(batch: pb.Batch) -> None:
    """Prints the progress."""
    print(f"{batch.id}: {batch.counts.completed + batch.counts.failed} of {batch.counts.total}", file=sys.stderr)


def main(target: str) -> int:
    """Returns the exit status."""
    with Client(target, on_retry=lambda error, delay_s: print(f"{error}; again in {delay_s} s")) as client:
        try:
            batch = client.submit_lines(requests(), metadata={"example": "sync"})
        except CallError as error:
            print(f"refused: {error.reason} {error.violations or error.message}", file=sys.stderr)
            return 1
        done = client.wait(batch.id, on_progress=show)
        for result in client.results(batch.id):
            if result.HasField("response") and result.response.status_code == 200:
                answer = json.loads(result.response.body_json)
                print(f"{result.custom_id}: {answer['choices'][0]['message']['content']!r}")
            else:
                print(f"{result.custom_id} failed: {result.error.code or result.response.body_json}")
    return 0 if done.state == pb.BATCH_STATE_COMPLETED and not done.counts.failed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else DEFAULT_TARGET))
