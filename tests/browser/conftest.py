"""A browser, and a whole stack with tokens for all tests here."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from service.auth import tokens
from service.auth.roles import Role
from tests.browser.chromium import ARGUMENTS, PATHS, WHY_NOT
from tests.support.stacks import FullStack, full_stack
from vllm_batch import Client

HOSTILE = '"><img src=x onerror="window.hurt=1"><script>window.hurt=1</script>'


@dataclass
class Site:
    """The stack, where its page is, and the secrets of its tokens by name."""

    stack: FullStack
    secrets: dict[str, str]

    @property
    def url(self) -> str:
        """Of the page."""
        return f"http://127.0.0.1:{self.stack.http_port}/"

    def client(self) -> Client:
        """A client of the gateway, as the operator."""
        return Client(self.stack.target, patience_s=60, token=self.secrets["olga"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a browser where there is none."""
    if PATHS:
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=WHY_NOT))


@pytest.fixture(scope="package")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A whole stack under supervisord that requires tokens."""
    named = [("olga", Role.OPERATE, ""), ("rita", Role.READ, "search")]
    made = {name: tokens.new(name, role, tenant) for name, role, tenant in named}
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "hashes").write_text("".join(f"{token.line()}\n" for _, token in made.values()))
    (folder / "hashes").chmod(0o600)
    (folder / "operator").write_text(made["olga"][0])
    (folder / "operator").chmod(0o600)
    settings = {
        "BATCH_ENGINE": "simulated",
        "BATCH_HEARTBEAT_INTERVAL_S": "1",
        "BATCH_SIMULATED_REQUEST_S": "0.3",
        # Long enough to see what a batch waits for.
        "BATCH_SIMULATED_LOAD_S": "3",
        "BATCH_TOKEN_HASHES": str(folder / "hashes"),
        "BATCH_TOKEN_FILE": str(folder / "operator"),
    }
    with full_stack(**settings) as stack:
        stack.security = {"token": made["olga"][0]}
        started = stack.script("start-all.sh")
        assert started.returncode == 0, started.stderr + stack.logs()
        yield Site(stack, {name: secret for name, (secret, _) in made.items()})


@pytest.fixture(scope="package")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Chromium, which cannot reach any other host."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=PATHS[0], args=list(ARGUMENTS))
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, site: Site) -> Iterator[Page]:
    """A page in a browser without any cookies. It asks for nothing elsewhere, and no script of it fails."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    wrong: list[str] = []
    page.on("request", lambda request: None if request.url.startswith(site.url) else wrong.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    # The policy forbids something that the page tries.
    page.on("console", lambda said: wrong.append(said.text) if "Content Security Policy" in said.text else None)
    page.set_default_timeout(60_000)
    yield page
    context.close()
    assert not wrong
