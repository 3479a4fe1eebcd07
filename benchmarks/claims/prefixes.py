"""Claim: what prompts share is computed once, in whatever order a file has them; where they share nothing it costs
nothing; and a batch does not end with one long request on an empty engine.

Against: the least prompt tokens that can be computed at the engine's block size; vLLM's own `run_batch` on the same
file, with the same flags, in turns; the same batch with `order: input`, in turns.
Target: at most 1.05 of the least tokens; at least 3 times the rate of `run_batch`; at least 0.99 of the rate in the
file's order without shared prefixes; with lengths as in a public trace the last result after at most 0.9 of the time;
at most 1.05 of the time for the upload.

The file is shuffled, its prefixes have 1,500 tokens, and the engine's cache holds a tenth of them. Rates are from the
first request that a worker takes to the last result, by the batch's own times; those beside `run_batch` from submitting
the file to the last result written to another file, without loading.

What is missed: with four requests per prefix, as here, three quarters of the prompt tokens can be spared, and results
and uploads cost both sides the same; with more per prefix there is more to spare. The tiny model on two cores is bound
by the tokens of all requests together, so that hardly any of the time is the end of one long request. Of an upload's
additional time about 60 % is making keys of prompts of 3.8 KB and 40 % is sorting them and cutting chunks.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from benchmarks.lib import prompts
from benchmarks.lib.harness import Figure, Sizes, alternate, at_least, at_most, main, timed
from benchmarks.lib.prompts import PREFIX_TOKENS
from benchmarks.lib.run_batch import RunBatch
from benchmarks.lib.stacks import simulated, started
from vllm_batch import Client
from vllm_batch.v1 import batch_service_pb2 as pb

SIZES: Sizes = {
    "requests": (20_000, 400),
    "prefixes": (200, 20),
    "compared": (2_000, 200),
    "mixed": (1_000, 100),
    "uploaded": (20_000, 2_000),
    "rounds": (3, 1),
}
BLOCK = 32
Order = Literal["prefix", "input"]


def flags(prefixes: int) -> tuple[str, ...]:
    """A cache of a tenth of the prefixes, and what is needed to see what it did."""
    blocks = max(256, prefixes * PREFIX_TOKENS // 10 // BLOCK)
    return (
        *("--block-size", str(BLOCK), "--num-gpu-blocks-override", str(blocks)),
        "--enable-prompt-tokens-details",
    )


def measure(requests: int, prefixes: int, compared: int, mixed: int, uploaded: int, rounds: int) -> Iterator[Figure]:
    """First on real vLLM, then uploads to a simulated one."""
    extra = flags(prefixes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (
            RunBatch(folder, *extra) as theirs,
            started(BATCH_ENGINE_ARGS=" ".join(extra)) as stack,
            Client(stack.target) as client,
        ):
            yield from _shared(client, folder, requests, prefixes)
            yield from _beside_run_batch(client, theirs, folder, compared, prefixes, rounds)
            yield from _in_both_orders(client, folder, compared, mixed, rounds)
        with simulated() as stack, Client(stack.target) as client:
            yield _upload(client, folder, uploaded, prefixes, rounds)


def _shared(client: Client, folder: Path, requests: int, prefixes: int) -> Iterator[Figure]:
    given, made = prompts.shared(folder / "shared.jsonl", requests, prefixes), folder / "out.jsonl"
    _written(client, given, made)
    least = prompts.least_computed(given, folder / "models" / "tiny", BLOCK)
    yield Figure(
        f"{requests:,} requests of {prefixes} prefixes: computed", "prompt tokens", [_computed(made)],
        "the least possible", [least], at_most("ratio", 1.05),
    )  # fmt: skip


def _beside_run_batch(
    client: Client, theirs: RunBatch, folder: Path, requests: int, prefixes: int, rounds: int
) -> Iterator[Figure]:
    made, number = folder / "out.jsonl", 0
    computed: dict[str, list[float]] = {"ours": [], "run_batch": []}

    def side(name: str, run: Callable[[Path], float]) -> Callable[[], float]:
        def once() -> float:
            nonlocal number
            # New prefixes each time: nothing is cached of the run before.
            number += 1
            took_s = run(prompts.shared(folder / "in.jsonl", requests, prefixes, salt=number // 2 + 1))
            computed[name].append(_computed(made))
            return requests / took_s

        return once

    ours = side("ours", lambda given: timed(lambda: _written(client, given, made)))
    run_batch = side("run_batch", lambda given: theirs.run(given, made))
    values = alternate(rounds, ours=ours, run_batch=run_batch)
    name = f"{requests:,} requests of {prefixes} prefixes"
    yield Figure(name, "requests/s", values["ours"], "vLLM's run_batch", values["run_batch"], at_least("ratio", 3))
    yield Figure(f"{name}: computed", "prompt tokens", computed["ours"], "vLLM's run_batch", computed["run_batch"])


def _in_both_orders(client: Client, folder: Path, distinct: int, mixed: int, rounds: int) -> Iterator[Figure]:
    number = 0

    def apart(order: Order) -> float:
        nonlocal number
        number += 1
        return distinct / _took_s(client, prompts.distinct(folder / "in.jsonl", distinct, salt=number), order)

    values = alternate(rounds, prefix=lambda: apart("prefix"), input=lambda: apart("input"))
    yield Figure(
        f"{distinct:,} requests that share nothing", "requests/s", values["prefix"], "order: input", values["input"],
        at_least("ratio", 0.99),
    )  # fmt: skip
    given = prompts.mixed(folder / "mixed.jsonl", mixed)
    values = alternate(
        rounds, prefix=lambda: _took_s(client, given, "prefix"), input=lambda: _took_s(client, given, "input")
    )
    yield Figure(
        f"{mixed:,} requests of mixed lengths: last result after", "s", values["prefix"], "order: input",
        values["input"], at_most("ratio", 0.9),
    )  # fmt: skip


def _upload(client: Client, folder: Path, requests: int, prefixes: int, rounds: int) -> Figure:
    given = prompts.shared(folder / "shared.jsonl", requests, prefixes)

    def upload(order: Order) -> float:
        with given.open("rb") as file:
            took_s = timed(lambda: uploaded.append(client.submit(file, order=order)))
        client.cancel(uploaded[-1].id)
        # Not before the worker has let go of it.
        list(client.watch(uploaded[-1].id))
        return took_s

    uploaded: list[pb.Batch] = []
    upload("input")
    values = alternate(3 * rounds, prefix=lambda: upload("prefix"), input=lambda: upload("input"))
    return Figure(
        f"upload of {requests:,} requests of {prefixes} prefixes", "s", values["prefix"], "order: input",
        values["input"], at_most("ratio", 1.05),
    )  # fmt: skip


def _written(client: Client, given: Path, made: Path) -> None:
    """Runs a file, and writes its results to another."""
    with given.open("rb") as file, made.open("wb") as out:
        out.writelines(client.result_lines(client.submit(file).id, follow=True))


def _took_s(client: Client, given: Path, order: Order) -> float:
    with given.open("rb") as file:
        *_, done = client.watch(client.submit(file, order=order).id)
    assert done.counts.completed == done.counts.total
    return (done.end_time.ToNanoseconds() - done.start_time.ToNanoseconds()) / 1e9


def _computed(made: Path) -> int:
    """The prompt tokens that were not cached, by the usage in the results."""
    computed = 0
    with made.open("rb") as file:
        for result in file:
            usage = json.loads(result)["response"]["body"]["usage"]
            computed += usage["prompt_tokens"] - ((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
    return computed


if __name__ == "__main__":
    main(__file__, __doc__, SIZES, measure)
