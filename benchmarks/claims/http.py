"""Claim: OpenAI's door costs little more than gRPC, and memory does not grow with the size of a file.

Against: the same lines uploaded, and the same results read as lines, through gRPC.
Target: at least 0.6 of its rate up and 0.8 of its rate down; at most 300 MB in http, gateway and worker each.

Up: from the first byte that the client sends to the batch that is begun. gRPC checks the lines as they arrive. Through
HTTP the openai package sends them as a file, of which it then makes a batch; a worker reads the file and checks it.

Down: from the call to the last result, as lines written to /dev/null. The results were inserted into the table by one
statement, and where the lines of the output file are was measured before, as it is when a batch ends.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from openai import OpenAI

from benchmarks.claims.results import FILL, READ_LINES
from benchmarks.claims.upload import NEVER, UPLOAD
from benchmarks.lib import chats
from benchmarks.lib.harness import Figure, Sizes, alternate, at_least, at_most, main
from benchmarks.lib.memory import peak_mb
from benchmarks.lib.stacks import psql, python, simulated

SIZES: Sizes = {"requests": (1_000_000, 50_000), "rounds": (5, 3)}
PROGRAMS = ("http", "gateway", "worker")
# Each runs in a process of its own, whose start is not timed.
UPLOAD_FILE = """
import json, sys, time
from openai import OpenAI
from benchmarks.lib.memory import peak_mb
with OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0) as client, open(sys.argv[2], "rb") as file:
    begin_s = time.monotonic()
    stored = client.files.create(file=file, purpose="batch")
    batch = client.batches.create(
        input_file_id=stored.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    while batch.status == "validating":
        time.sleep(0.05)
        batch = client.batches.retrieve(batch.id)
    took_s = time.monotonic() - begin_s
    assert batch.status == "in_progress", batch
    print(json.dumps({"took_s": took_s, "mb": peak_mb()}))
"""
DOWNLOAD = """
import json, sys, time
from openai import OpenAI
from benchmarks.lib.memory import peak_mb
with OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0) as client, open("/dev/null", "wb") as out:
    begin_s, count = time.monotonic(), 0
    with client.files.with_streaming_response.content(sys.argv[2]) as content:
        for data in content.iter_bytes():
            out.write(data)
            count += data.count(b"\\n")
    print(json.dumps({"took_s": time.monotonic() - begin_s, "mb": peak_mb(), "count": count}))
"""


def measure(requests: int, rounds: int) -> Iterator[Figure]:
    """Through HTTP and through gRPC, in turns: first down, then up."""
    with tempfile.TemporaryDirectory() as folder, simulated() as stack:
        given = chats.write(Path(folder) / "in.jsonl", requests, **NEVER)
        base_url = f"http://127.0.0.1:{stack.http_port}/v1"
        psql(stack, FILL % {"count": requests})
        # Sets hint bits and warms caches, so that neither side has to.
        psql(stack, "VACUUM requests, results")

        def rate(code: str, *arguments: str) -> float:
            done = python(code, *arguments)
            assert done.get("count", requests) == requests
            return requests / float(done["took_s"])

        with OpenAI(base_url=base_url, api_key="none") as client:
            output = client.batches.retrieve("batch_1").output_file_id or ""
        down = alternate(
            rounds,
            http=lambda: rate(DOWNLOAD, base_url, output),
            grpc=lambda: rate(READ_LINES, stack.target, str(requests)),
        )
        up = alternate(
            rounds,
            http=lambda: rate(UPLOAD_FILE, base_url, str(given)),
            grpc=lambda: rate(UPLOAD, stack.target, str(given)),
        )
        peaks = {name: peak_mb(stack.pid(name)) for name in PROGRAMS}
    yield Figure(f"upload of {requests:,} lines", "lines/s", up["http"], "gRPC", up["grpc"], at_least("ratio", 0.6))
    yield Figure(
        f"download of {requests:,} results", "results/s", down["http"], "gRPC", down["grpc"], at_least("ratio", 0.8)
    )
    for name, peak in peaks.items():
        yield Figure(f"peak of {name} during both", "MB", [peak], target=at_most("high", 300))


if __name__ == "__main__":
    main(__file__, __doc__, SIZES, measure)
