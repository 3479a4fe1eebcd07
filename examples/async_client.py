"""Submits two batches at once and prints results as they finish. `python examples/async_client.py [HOST:PORT]`."""

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

from vllm_batch import DEFAULT_TARGET, AsyncClient
from vllm_batch.v1 import batch_service_pb2 as pb


async def requests(topic: str) -> AsyncIterator[dict[str, Any]]:
    """Ten requests; they may come from any asynchronous source, such as a database."""
    for number in range(10):
        body = {"model": "tiny", "messages": [{"role": "user", "content": f"Fact {number} about {topic}."}]}
        yield {"custom_id": f"{topic}-{number}", "url": "/v1/chat/completions", "method": "POST", "body": body}


async def run(client: AsyncClient, topic: str) -> pb.Batch:
    """Runs one batch, from its requests to its end."""
    batch = await client.submit_lines(requests(topic))
    async for result in client.results(batch.id, follow=True, order="RESULT_ORDER_FINISHED"):
        print(result.custom_id, result.response.status_code)
    return await client.wait(batch.id)


async def main(target: str) -> int:
    """Returns the exit status."""
    async with AsyncClient(target) as client:
        batches = await asyncio.gather(run(client, "bees"), run(client, "glass"))
    return 0 if all(batch.counts.completed == batch.counts.total for batch in batches) else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else DEFAULT_TARGET)))
