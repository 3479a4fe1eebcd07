"""How it carries a large batch: `python -m benchmarks.scale [--requests 1000000]`. Simulated engine, all else real.

Upload and download are compared with `COPY` of the same rows into and out of the same Postgres, alternately; memory is
the peak of each process (VmHWM). Prints a table.
"""

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg2

from tests.stacks import FullStack, full_stack
from vllm_batch.client import Client

ROUNDS = 3
UPLOAD = """
import re, sys
from vllm_batch.client import Client
with Client(sys.argv[1]) as client, open(sys.argv[2], "rb") as file:
    print(client.submit(file).id, int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024)
"""
DOWNLOAD = """
import re, sys
from vllm_batch.client import Client
with Client(sys.argv[1]) as client:
    count = sum(1 for _ in client.results(sys.argv[2]))
    print(count, int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024)
"""


def lines(count: int) -> Iterator[bytes]:
    for number in range(count):
        content = f"Summarise the document number {number} in one sentence, please, and say what is new in it."
        body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 32}
        yield json.dumps({"custom_id": f"c{number}", "url": "/v1/chat/completions", "body": body}).encode() + b"\n"


def peak_mb(pid: int) -> int:
    """Most memory a process has had, in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) // 1024


def timed(function: Callable[[], None]) -> float:
    begin_s = time.monotonic()
    function()
    return time.monotonic() - begin_s


def run(code: str, *arguments: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.split()


def say(what: str) -> None:
    sys.stdout.write(what + "\n")
    sys.stdout.flush()


def measure(stack: FullStack, count: int, file: Path) -> None:
    """Uploads, the run itself, downloads."""
    connection = psycopg2.connect(f"postgresql:///batch?host={stack.home}/run/pg&user=postgres")
    connection.autocommit = True
    cursor = connection.cursor()
    gateway, worker = stack.pid("gateway"), stack.pid("worker")

    rows = file.with_suffix(".rows")
    with rows.open("wb") as out:
        for number, line in enumerate(lines(count)):
            parsed = json.loads(line)
            out.write(f"0\t{number}\t{parsed['custom_id']}\t{parsed['url']}\t{json.dumps(parsed['body'])}\n".encode())
    cursor.execute("CREATE TABLE copied (LIKE requests INCLUDING ALL)")

    def copy_in() -> None:
        with rows.open("rb") as given:
            cursor.copy_expert("COPY copied FROM STDIN", given)

    uploads, copies, client_mb = [], [], 0
    for _ in range(ROUNDS):
        cursor.execute("TRUNCATE copied")
        copies.append(timed(copy_in))
        begin_s = time.monotonic()
        batch_id, used_mb = run(UPLOAD, stack.target, str(file))
        uploads.append(time.monotonic() - begin_s)
        client_mb = max(client_mb, int(used_mb))
        with Client(stack.target) as client:
            if len(uploads) < ROUNDS:
                client.cancel(batch_id)
                *_, _ended = client.watch(batch_id)
                client.delete(batch_id)
    up, copy = statistics.median(uploads), statistics.median(copies)
    say(f"upload of {count:,} lines: {up:.1f} s, {count / up:,.0f}/s; COPY {copy:.1f} s; ratio {copy / up:.2f}")
    say(f"  peak memory: client {client_mb} MB, gateway {peak_mb(gateway)} MB, worker {peak_mb(worker)} MB")

    begin_s = time.monotonic()
    with Client(stack.target) as client:
        *_, done = client.watch(batch_id)
    took_s = done.end_time.seconds - done.start_time.seconds
    say(f"run: {done.counts.completed:,} results in {took_s} s, {count / max(1, took_s):,.0f}/s")
    say(f"  peak memory: gateway {peak_mb(gateway)} MB, worker {peak_mb(worker)} MB")

    def copy_out() -> None:
        cursor.copy_expert("COPY (SELECT * FROM results ORDER BY index) TO STDOUT", io.BytesIO())

    downloads, copies = [], []
    for _ in range(ROUNDS):
        copies.append(timed(copy_out))
        begin_s = time.monotonic()
        streamed, used_mb = run(DOWNLOAD, stack.target, batch_id)
        downloads.append(time.monotonic() - begin_s)
        assert int(streamed) == count
    down, copy = statistics.median(downloads), statistics.median(copies)
    say(f"download of {count:,}: {down:.1f} s, {count / down:,.0f}/s; COPY {copy:.1f} s; ratio {copy / down:.2f}")
    say(f"  peak memory: client {used_mb} MB, gateway {peak_mb(gateway)} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000)
    count = parser.parse_args().requests
    settings = {"BATCH_ENGINE": "simulated", "BATCH_SIMULATED_REQUEST_S": "0.001", "BATCH_LOG_LEVEL": "WARNING"}
    with tempfile.TemporaryDirectory() as folder, full_stack(**settings) as stack:
        file = Path(folder) / "in.jsonl"
        with file.open("wb") as out:
            out.writelines(lines(count))
        say(f"{count:,} lines, {file.stat().st_size >> 20} MiB")
        started = stack.script("start-all.sh")
        assert started.returncode == 0, started.stderr
        measure(stack, count, file)


if __name__ == "__main__":
    main()
