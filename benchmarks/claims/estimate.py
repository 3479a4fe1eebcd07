"""Claim: once 5 % of a batch are done under steady load, its estimated end is within 20 % of the real one.

Against: an estimate from the average since its begin, from the same messages of WatchBatch.
Target: at most 20 % of the batch's duration, for the worst message from 5 % on.

A whole stack: batches of equal requests, and of durations as spread as the lengths of chats (log-normal, sigma 1, cut
at five times the mean, as max_tokens cuts); and one that another of a quarter of its size, of higher priority,
overtakes: its end is as late as that makes it, which nobody can know before. The engine is simulated, since a model on
a shared machine is no steady load.
"""

import functools
import random
import time
from collections.abc import Iterator

from benchmarks.lib import chats
from benchmarks.lib.harness import Figure, Sizes, alternate, at_most, main
from benchmarks.lib.stacks import simulated
from vllm_batch import Client
from vllm_batch.v1 import batch_service_pb2 as pb

SIZES: Sizes = {"requests": (8_000, 1_500), "rounds": (2, 1)}
REQUEST_S = 0.2
AT_ONCE = 64
TOKENS_PER_S = 2_000
LONGEST = 5.0
FROM_PART = 0.05


def lines(kind: str, count: int, seed: int) -> Iterator[bytes]:
    """The batch; durations are part of the requests. `asked`: they follow from max_tokens, so the longest run first."""
    chance = random.Random(seed)
    for index in range(count):
        took_s = REQUEST_S if kind == "equal" else REQUEST_S * min(LONGEST, chance.lognormvariate(-0.5, 1.0))
        asked = {"max_tokens": round(took_s * TOKENS_PER_S)} if kind == "asked" else {}
        yield chats.line(index, **asked, vllm_xargs={"simulate": round(took_s, 4)})


def seconds(batch: pb.Batch, field: str) -> float:
    """One of its times."""
    return float(getattr(batch, field).ToMilliseconds() / 1000)


def errors(client: Client, kind: str, count: int, seed: int) -> tuple[float, float]:
    """The worst error of ours and of the average's, in percent of the duration."""
    batch = client.submit_lines(lines(kind, count, seed))
    seen: list[tuple[float, float]] = []
    is_overtaken = False
    for each in client.watch(batch.id):
        done = each.counts.completed + each.counts.failed
        if kind == "overtaken" and not is_overtaken and done > 0.3 * count:
            client.submit_lines(lines("equal", count // 4, seed), priority=1)
            is_overtaken = True
        if each.HasField("estimated_end_time") and FROM_PART * count <= done:
            began_s = seconds(each, "start_time")
            average_s = began_s + (time.time() - began_s) * count / done
            seen.append((seconds(each, "estimated_end_time"), average_s))
    end_s, took_s = seconds(each, "end_time"), seconds(each, "end_time") - seconds(each, "start_time")
    return max(abs(ours - end_s) for ours, _ in seen) / took_s * 100, max(
        abs(average - end_s) for _, average in seen
    ) / took_s * 100


def measure(requests: int, rounds: int) -> Iterator[Figure]:
    """Batches of each kind in turns."""
    found: dict[str, list[tuple[float, float]]] = {"equal": [], "spread": [], "asked": [], "overtaken": []}
    settings = {"BATCH_SIMULATED_WINDOW": str(AT_ONCE)}
    with simulated(**settings) as stack, Client(stack.target) as client:

        def one(kind: str) -> float:
            found[kind].append(errors(client, kind, requests, len(found[kind])))
            return found[kind][-1][0]

        alternate(rounds, **{kind: functools.partial(one, kind) for kind in found})
    names = {
        "equal": "worst error, equal requests",
        "spread": "worst error, durations as of chats",
        "asked": "worst error, lengths as of chats, longest first",
        "overtaken": "worst error, overtaken by a quarter of its size",
    }
    for kind, name in names.items():
        ours, average = [each[0] for each in found[kind]], [each[1] for each in found[kind]]
        target = None if kind == "overtaken" else at_most("high", 20)
        yield Figure(name, "% of the duration", ours, "average since the begin", average, target)


if __name__ == "__main__":
    main(__file__, __doc__, SIZES, measure)
