"""Settings for all tests."""

import os
import signal
from collections.abc import Generator

import pytest
from hypothesis import settings

# A shell starts what runs in its background with SIGINT ignored, and programs pass that on: Ctrl-C would reach none of
# ours.
signal.signal(signal.SIGINT, signal.default_int_handler)

IS_THOROUGH = os.environ.get("THOROUGH") == "1"
# 10,000 examples against a stack take an hour.
THOROUGH_TIMEOUT_S = 7200

# The duration of an example depends on the machine more than on the code. The long profile finds what the short misses.
settings.register_profile("short", deadline=None, max_examples=50)
settings.register_profile("long", deadline=None, max_examples=10_000)
settings.load_profile("long" if IS_THOROUGH else "short")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked `thorough` unless THOROUGH=1 asks for them, and gives all more time if it does."""
    for item in items:
        if IS_THOROUGH and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(THOROUGH_TIMEOUT_S))
        elif not IS_THOROUGH and item.get_closest_marker("thorough"):
            item.add_marker(pytest.mark.skip(reason="THOROUGH=1 runs it"))


# True for a test that has failed, for fixtures that end after it.
HAS_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: "pytest.CallInfo[None]"
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Notes whether the test has failed."""
    report = yield
    item.stash[HAS_FAILED] = item.stash.get(HAS_FAILED, False) or report.failed
    return report
