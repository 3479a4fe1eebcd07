"""Makes the pictures of README and docs. scripts/screenshots.sh runs it."""

import os
import signal
import sys
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright
from rich.console import Console

from tests.browser.chromium import ARGUMENTS, PATHS, WHY_NOT
from tests.support.batches import line
from tests.support.stacks import FullStack, full_stack
from tests.support.waiting import until
from vllm_batch import Client
from vllm_batch.channel import open_channel
from vllm_batch.cli.overview import ask_gateway, ask_watchdog
from vllm_batch.cli.screen import State, render

MAX_BYTES = 150_000
DESKTOP = {"width": 1180, "height": 620}
PHONE = {"width": 390, "height": 720}
# Of `vllm-batch top`, in characters, and how long it looks at the signals before.
COLUMNS, ROWS = 110, 34
LOOKS = 25


def prompts(count: int, every: int = 0) -> Iterable[bytes]:
    """Requests of which each so many-th is refused; 0: none."""
    return (
        line(f"prompt-{i:05d}", **({"vllm_xargs": {"simulate": "refuse"}} if every and i % every == 5 else {}))
        for i in range(count)
    )


def fill(stack: FullStack) -> str:
    """Batches in several states, and a recovery. Returns the batch with errors."""
    with Client(stack.target, patience_s=60) as client:
        client.submit_lines(prompts(1_200), metadata={"name": "summaries"})
        failing = client.submit_lines(prompts(400, 19))
        list(client.watch(failing.id))
        os.kill(stack.pid("worker"), signal.SIGKILL)
        until(lambda: stack.recovered(1), "the recovery", 90)
        client.submit_lines(prompts(60_000))
        cancelled = client.submit_lines(prompts(5_000), priority=-10)
        client.cancel(cancelled.id)
        client.submit_lines(prompts(9_000), priority=-5)
        client.submit_lines([line("a", model="tiny")], priority=-7)
    return failing.id


def top(stack: FullStack, browser: Browser, file: Path) -> None:
    """What `vllm-batch top` shows."""
    state = State()
    with Client(stack.target, patience_s=0) as client, open_channel(stack.watchdog) as channel:
        for _ in range(LOOKS):
            state.take_gateway(ask_gateway(client, 20), time.monotonic())
            state.take_watchdog(ask_watchdog(channel))
            time.sleep(1)
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=COLUMNS, height=ROWS, force_terminal=True, file=nowhere)
        console.print(render(state, datetime.now(UTC), ROWS))
    drawing = console.export_svg(title="vllm-batch top")
    page = browser.new_page(viewport=DESKTOP)
    # The drawing names a font of another host: not asked for.
    page.route("https://**", lambda route: route.abort())
    page.set_content(f"<style>body{{margin:0}}</style>{drawing}")
    page.locator("svg").first.screenshot(path=file)
    page.close()


def view(browser: Browser, url: str, file: Path, viewport: dict[str, int], scheme: str, wanted: str) -> None:
    """One view of the page, once what is `wanted` is there."""
    context = browser.new_context(viewport=viewport, color_scheme=scheme)
    page: Page = context.new_page()
    page.goto(url)
    page.locator(wanted).first.wait_for()
    # Speeds are shown once they could be measured.
    page.wait_for_timeout(6_000)
    page.screenshot(path=file)
    context.close()


def main(folder: Path) -> None:
    """Makes all pictures."""
    if not PATHS:
        raise SystemExit(WHY_NOT)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"BATCH_HEARTBEAT_INTERVAL_S": "2", "BATCH_SIMULATED_REQUEST_S": "0.35", "BATCH_SIMULATED_LOAD_S": "3"}
    with full_stack(BATCH_ENGINE="simulated", **settings) as stack, sync_playwright() as playwright:
        started = stack.script("start-all.sh")
        assert started.returncode == 0, started.stderr
        failing = fill(stack)
        browser = playwright.chromium.launch(executable_path=PATHS[0], args=list(ARGUMENTS))
        top(stack, browser, folder / "top.png")
        url = f"http://127.0.0.1:{stack.http_port}/"
        view(browser, url, folder / "batches.png", DESKTOP, "light", ".batches .row")
        view(browser, f"{url}#/workers", folder / "workers.png", DESKTOP | {"height": 900}, "light", ".phases")
        view(browser, f"{url}#/batches/{failing}", folder / "phone.png", PHONE, "dark", ".kinds .row")
        browser.close()
    for file in sorted(folder.glob("*.png")):
        size = file.stat().st_size
        print(f"{file.name}: {size:,} bytes")  # noqa: T201
        assert size < MAX_BYTES, file


if __name__ == "__main__":
    main(Path(sys.argv[1]))
