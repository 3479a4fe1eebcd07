"""What the runner waits for, and how that ends."""

import asyncio

import pytest

from service.worker.wakeup import Wakeup
from tests.support.loops import in_loop


@pytest.mark.parametrize("steps", range(4))
@in_loop
async def test_an_end_that_comes_with_news(steps: int) -> None:
    """A runner that is told to end at the moment when a request ends, as at the end of a drain, ends."""
    wakeup = Wakeup()
    waiting = asyncio.create_task(wakeup.wait(60))
    for _ in range(3):
        await asyncio.sleep(0)
    wakeup.set()
    for _ in range(steps):
        await asyncio.sleep(0)
        if waiting.done():
            return
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


@in_loop
async def test_a_wait_ends_with_its_time_or_with_news() -> None:
    """A wait without news ends after its time, and news that came before is not missed."""
    wakeup = Wakeup()
    await wakeup.wait(0)
    wakeup.set()
    await wakeup.wait(60)
    await wakeup.wait(0)
