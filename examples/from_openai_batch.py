"""A program written for OpenAI's Batch API, moved: the same input file, the same lines of output.

`python examples/from_openai_batch.py INPUT.jsonl OUTPUT.jsonl [HOST:PORT]`
"""

import sys
from pathlib import Path

from vllm_batch import DEFAULT_TARGET, Client
from vllm_batch.output import state_name


def main(source: str, target_file: str, target: str) -> None:
    """Turns a file of requests into a file of results."""
    # client = OpenAI()
    with Client(target) as client:
        # file = client.files.create(file=open(source, "rb"), purpose="batch")
        # batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions",
        #                               completion_window="24h", metadata={"team": "search"})
        with open(source, "rb") as file:
            batch = client.submit(file, completion_window_s=24 * 3600, metadata={"team": "search"})

        # while client.batches.retrieve(batch.id).status not in ("completed", "failed", "expired", "cancelled"):
        #     time.sleep(60)
        batch = client.wait(batch.id)
        print(f"{batch.id} {state_name(batch)}: {batch.counts.completed} completed, {batch.counts.failed} failed")

        # output = client.files.content(batch.output_file_id).text
        # errors = client.files.content(batch.error_file_id).text
        with Path(target_file).open("wb") as output:
            output.writelines(client.result_lines(batch.id))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else DEFAULT_TARGET)
