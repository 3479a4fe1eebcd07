"""The alternative in the benchmarks on real vLLM: its own batch runner in a process of its own, loaded once.

`python -m benchmarks.lib.run_batch MODEL FLAG...` loads the model with the worker's flags for the tiny one, and these;
then it runs each (input file, output file) that it reads as a line of JSON, and prints how long that `took`, in
seconds.
"""

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from service.worker.engine import tiny_model
from service.worker.engine.vllm import DEFAULTS, TINY_ARGS, TINY_DEFAULTS

TIMEOUT_S = 3600


class RunBatch:
    """The runner's process, as the benchmark uses it. Its model is in `folder`."""

    def __init__(self, folder: Path, *flags: str) -> None:
        model = tiny_model.ensure(folder / "models" / "tiny")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.lib.run_batch", str(model), *flags],
            cwd=Path(__file__).resolve().parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __enter__(self) -> "RunBatch":
        """Does not wait until it is loaded."""
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def run(self, given: Path, made: Path) -> float:
        """Runs a file, once the model is loaded. Returns the seconds that it took."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([str(given), str(made)]) + "\n")
        self._process.stdin.flush()
        return float(self._said("took"))

    def _said(self, word: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(f"{word} "):
                return line.removeprefix(word)
        raise RuntimeError("vLLM's batch runner ended")


async def _serve(arguments: list[str]) -> None:
    from vllm.entrypoints.launchers import run_batch
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parsed = run_batch.make_arg_parser(FlexibleArgumentParser()).parse_args(["-i", "-", "-o", "-", *arguments])
    async with build_async_engine_client(parsed, usage_context=UsageContext.OPENAI_BATCH_RUNNER) as client:
        registry = await run_batch.build_endpoint_registry(engine_client=client, args=parsed)

        async def made_before(**_: Any) -> Any:
            return registry

        # Part of loading, which is measured on neither side.
        run_batch.build_endpoint_registry = made_before
        while line := await asyncio.to_thread(sys.stdin.readline):
            parsed.input_file, parsed.output_file = json.loads(line)
            begin_s = time.monotonic()
            await run_batch.run_batch(client, parsed)
            _say(f"took {time.monotonic() - begin_s}")


def _say(what: str) -> None:
    sys.stdout.write(what + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    for name, value in (DEFAULTS | TINY_DEFAULTS).items():
        os.environ.setdefault(name, value)
    asyncio.run(_serve(["--model", sys.argv[1], *TINY_ARGS, *sys.argv[2:]]))
