"""Claim: results are streamed at a useful rate, and memory does not grow with their number.

Against: psql's `\\copy ... to` of the same columns in the same order, from the same Postgres, to /dev/null; and for
messages a bare grpc.aio servicer that repeats the first page, which is the most that gRPC in Python allows.
Target: at least half its rate as lines; at most 300 MB in client and gateway each, whatever the number.

From the call to the last result, read by the Python client, as lines written to /dev/null and as messages. The results
were inserted into the table by one statement.

Where the time goes: `\\copy` takes 1.4 µs of Postgres for a stored result. A line takes 2.2 µs: Postgres turns the
result into JSON, in pages, so that a stream can resume anywhere and holds no transaction. Two pages are read at once
while a third is sent. Gateway and client take 1.4 and 0.9 µs for a result.
"""

from collections.abc import Iterator

from benchmarks.lib.bare_servicer import Message, bare
from benchmarks.lib.harness import Figure, Sizes, alternate, at_least, at_most, main, timed
from benchmarks.lib.memory import peak_mb
from benchmarks.lib.stacks import psql, python, simulated
from vllm_batch import Client

SIZES: Sizes = {"results": (1_000_000, 50_000), "rounds": (5, 3)}
# As long as a chat completion of 32 tokens, and of the same form.
BODY = (
    '{"id":"chatcmpl-0123456789abcdef","object":"chat.completion","created":1764000000,"model":"tiny","choices":[{'
    '"index":0,"message":{"role":"assistant","content":"The document says what it says, and what is new in it is of'
    ' no great interest to anybody who has read it before."},"logprobs":null,"finish_reason":"length"}],"usage":'
    '{"prompt_tokens":57,"total_tokens":89,"completion_tokens":32}}'
)
FILL = f"""
INSERT INTO batches (id, state, digest, metadata, priority, models, total, completed, start_time, end_time)
VALUES (1, 'completed', '', '{{}}', 0, '{{tiny}}', %(count)d, %(count)d, now(), now());
INSERT INTO requests SELECT 1, i, 'c' || i, '/v1/chat/completions', repeat('x', 200)
FROM generate_series(0, %(count)d - 1) i;
INSERT INTO results (batch_id, index, sequence, status_code, body, incarnation, custom_id)
SELECT 1, i, i + 1, 200, '{BODY}', '00000000-0000-0000-0000-000000000000', 'c' || i
FROM generate_series(0, %(count)d - 1) i;
ANALYZE requests, results
"""
READ = """
import json, sys, time
from itertools import islice
from benchmarks.lib.memory import peak_mb
from vllm_batch import Client
with Client(sys.argv[1]) as client:
    begin_s = time.monotonic()
    count = sum(1 for _ in islice(client.results("batch_1"), int(sys.argv[2])))
    print(json.dumps({"took_s": time.monotonic() - begin_s, "mb": peak_mb(), "count": count}))
"""
READ_LINES = """
import json, sys, time
from benchmarks.lib.memory import peak_mb
from vllm_batch import Client
with Client(sys.argv[1]) as client, open("/dev/null", "wb") as out:
    begin_s, count = time.monotonic(), 0
    for lines in client.result_lines("batch_1"):
        out.write(lines)
        count += lines.count(b"\\n")
    print(json.dumps({"took_s": time.monotonic() - begin_s, "mb": peak_mb(), "count": count}))
"""
COPY = (
    "\\copy (SELECT r.index, q.custom_id, r.status_code, r.body, r.error_code, r.error_message, r.finish_time"
    " FROM results r JOIN requests q USING (batch_id, index) WHERE batch_id = 1 ORDER BY index) TO '/dev/null'"
)


def measure(results: int, rounds: int) -> Iterator[Figure]:
    """Streams and copies, in turns."""
    with simulated() as stack:
        psql(stack, FILL % {"count": results})
        # Sets hint bits and warms caches, so that neither side has to.
        psql(stack, "VACUUM requests, results")
        client_mb: list[float] = []

        def read(target: str, how: str = READ) -> float:
            done = python(how, target, str(results))
            assert done["count"] == results
            client_mb.append(done["mb"])
            return results / float(done["took_s"])

        with (
            Client(stack.target) as client,
            bare(Message.of_stream(next(client.result_pages("batch_1")))) as bare_target,
        ):
            values = alternate(
                rounds,
                lines=lambda: read(stack.target, READ_LINES),
                read=lambda: read(stack.target),
                copy=lambda: results / timed(lambda: psql(stack, COPY)),
                bare=lambda: read(bare_target),
            )
        gateway_mb = peak_mb(stack.pid("gateway"))
    name = f"stream of {results:,} results"
    yield Figure(
        f"{name} as lines", "results/s", values["lines"], "psql \\copy", values["copy"], at_least("ratio", 0.5)
    )
    yield Figure(f"{name} as messages", "results/s", values["read"], "psql \\copy", values["copy"])
    yield Figure(f"{name} as messages", "results/s", values["read"], "bare servicer", values["bare"])
    yield Figure(f"{name}: peak of the client", "MB", client_mb, target=at_most("high", 300))
    yield Figure(f"{name}: peak of the gateway", "MB", [gateway_mb], target=at_most("high", 300))


if __name__ == "__main__":
    main(__file__, __doc__, SIZES, measure)
