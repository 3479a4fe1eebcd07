"""As examples/openai_batch.py, with AsyncOpenAI: BASE_URL INPUT OUTPUT."""

import asyncio
import sys
from pathlib import Path

from openai import AsyncOpenAI


async def main(base_url: str, source: str, target: str) -> int:
    """Returns 0 if every request was answered."""
    async with AsyncOpenAI(base_url=base_url, api_key="none") as client:
        upload = await client.uploads.upload_file_chunked(
            file=Path(source), mime_type="application/jsonl", purpose="batch", part_size=20_000
        )
        assert upload.file is not None
        batch = await client.batches.create(
            input_file_id=upload.file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        while batch.status not in ("completed", "failed", "expired", "cancelled"):
            await asyncio.sleep(1)
            [batch] = [found async for found in client.batches.list(limit=1) if found.id == batch.id]
        assert batch.output_file_id is not None
        content = await client.files.content(batch.output_file_id)
        await content.astream_to_file(target)
        return 0 if batch.status == "completed" and not batch.error_file_id else 1


if __name__ == "__main__":
    raise SystemExit(asyncio.run(main(*sys.argv[1:])))
