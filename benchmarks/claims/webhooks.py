"""Claim: whoever waits for a batch is told of its end at once.

Against: asking for the batch every 2 s, as scripts do.
Target: from the end of a batch to the webhook received: p95 at most 2 s.

From the end that Postgres has stored to the arrival of the whole request at a receiver on the same machine. Batches of
one request each end one after the other; then as many at the same time. The engine is simulated, everything else real.
"""

import json
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.lib import chats
from benchmarks.lib.harness import Figure, Sizes, at_most, main
from benchmarks.lib.stacks import simulated
from tests.support.waiting import until
from tests.support.webhook_receiver import SECRET, Received, receiving
from vllm_batch import Client

SIZES: Sizes = {"batches": (100, 10)}
ASKED_EVERY_S = 2.0


def measure(batches: int) -> Iterator[Figure]:
    """First one batch after the other, then all at once."""
    arrived_s: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, receiving() as receiver:

        def note(request: Received) -> int:
            arrived_s.setdefault(json.loads(request.body)["data"]["id"], time.time())
            return 204

        receiver.answer = note
        tenants, secret = Path(folder) / "tenants.toml", Path(folder) / "secret"
        secret.touch(0o600)
        secret.write_text(SECRET)
        tenants.write_text(f'[tenants.default.webhook]\nurl = "{receiver.url}"\nsecret_file = "secret"\n')
        lines = chats.write(Path(folder) / "in.jsonl", 1)
        settings = {"BATCH_TENANTS_FILE": str(tenants), "BATCH_WEBHOOK_NETWORKS": "127.0.0.0/8"}
        pause = threading.Event()
        with simulated(**settings) as stack, Client(stack.target) as client:

            def told_s(_: int) -> tuple[float, float]:
                """How long after its end a batch was told, and seen by somebody who asks."""
                with lines.open("rb") as file:
                    made = client.submit(file)
                # Not in step with the gateway, nor with others.
                pause.wait(random.random() * ASKED_EVERY_S)
                while not (done := client.get(made.id)).HasField("end_time"):
                    pause.wait(ASKED_EVERY_S)
                seen_s = time.time()
                until(lambda: made.id in arrived_s, "the webhook")
                end_s = done.end_time.ToNanoseconds() / 1e9
                return arrived_s[made.id] - end_s, seen_s - end_s

            one_by_one = [told_s(number) for number in range(batches)]
            with ThreadPoolExecutor(batches) as pool:
                at_once = list(pool.map(told_s, range(batches)))
    for name, values in (("one after the other", one_by_one), (f"{batches} at once", at_once)):
        yield Figure(
            f"end of a batch to webhook received, {name}", "s", [told for told, _ in values],
            "asking every 2 s", [asked for _, asked in values], at_most("p95", 2),
        )  # fmt: skip


if __name__ == "__main__":
    main(__file__, __doc__, SIZES, measure)
