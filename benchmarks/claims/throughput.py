"""Claim: a batch on real vLLM finishes as fast as with vLLM's own batch runner, although each result is stored durably.

Against: the installed vLLM's `run_batch` on the same lines, with the same flags, in turns.
Target: at least its rate.

From submitting the file to the last result written to another file; loading is excluded on both sides. The model is the
tiny one, on which a request costs the engine next to nothing: a real model hides more of the work around it.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.lib import chats
from benchmarks.lib.harness import Figure, Sizes, alternate, at_least, main, timed
from benchmarks.lib.run_batch import RunBatch
from benchmarks.lib.stacks import started
from vllm_batch import Client

SIZES: Sizes = {"requests": (5_000, 500), "rounds": (5, 1)}


def measure(requests: int, rounds: int) -> Iterator[Figure]:
    """Batches run by our stack and by vLLM's runner, in turns."""
    with (
        tempfile.TemporaryDirectory() as name,
        RunBatch(Path(name)) as theirs,
        started() as stack,
        Client(stack.target) as client,
    ):
        folder = Path(name)
        given, made = chats.write(folder / "in.jsonl", requests), folder / "out.jsonl"

        def batch() -> None:
            with given.open("rb") as file, made.open("wb") as out:
                submitted = client.submit(file)
                out.writelines(client.result_lines(submitted.id, follow=True))

        def ours() -> float:
            took_s = timed(batch)
            check(made, requests)
            return requests / took_s

        def run_batch() -> float:
            took_s = theirs.run(given, made)
            check(made, requests)
            return requests / took_s

        # Not counted: the first run of each warms it up.
        ours(), run_batch()
        values = alternate(rounds, ours=ours, run_batch=run_batch)
    yield Figure(
        f"{requests:,} chats of 32 tokens", "chats/s", values["ours"], "vLLM's run_batch", values["run_batch"],
        at_least("ratio", 1.0),
    )  # fmt: skip


def check(made: Path, count: int) -> None:
    """Asserts that all results are there, and none is an error."""
    lines = made.read_text().splitlines()
    assert len(lines) == count
    assert all('"error": null' in line or '"error":null' in line for line in lines)


if __name__ == "__main__":
    main(__file__, __doc__, SIZES, measure)
