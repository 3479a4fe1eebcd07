"""Real vLLM with a classifying model: its answers and refusals at /classify are those of vLLM's server."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.refused_bodies import CLASSIFYING
from tests.support import raise_sites
from tests.support.engines import Running
from tests.support.vllm_http import VllmHttp, errors_of, unseen, wrong_fields

# In one process with what shares the import of vLLM. Thorough: its handler is called as those of embedding models are.
pytestmark = [pytest.mark.thorough, pytest.mark.timeout(900), pytest.mark.xdist_group("vllm")]
URL = "/classify"
# The tiny model has no weights for a classifier: without the last flag, vLLM takes whatever is in memory.
FLAGS = ("--runner", "pooling", "--convert", "classify", "--load-format", "dummy")


@pytest.fixture(scope="module")
def running(home: Path) -> Iterator[Running]:
    """One engine with a classifying model for the module."""
    running = Running(home, " ".join(FLAGS))
    running.start()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def http(running: Running) -> VllmHttp:
    """vLLM's own server over that engine."""
    return VllmHttp(running, *FLAGS)


def test_what_it_serves(running: Running) -> None:
    """A classifying model serves /classify and /pooling, and nothing else."""
    assert running.engine.urls == {URL, "/pooling"}


def test_classes(running: Running, http: VllmHttp) -> None:
    """Text, a list, tokens and messages are classified as by vLLM's server, and their tokens are counted."""
    inputs: list[dict[str, object]] = [{"input": "abc"}, {"input": ["abc", "the quick fox"]}, {"input": [5, 6, 7]}]
    for body in (*inputs, {"messages": [{"role": "user", "content": "hi"}]}, inputs[0] | {"use_activation": False}):
        answer = http.check_same(URL, body)
        content = json.loads(answer.body)
        assert answer.status_code == 200
        assert all(len(item["probs"]) == item["num_classes"] == 2 for item in content["data"])
        assert answer.prompt_tokens == content["usage"]["prompt_tokens"] > 0


def test_every_refusal_is_that_of_the_http_server(running: Running, http: VllmHttp) -> None:
    """For every place where vLLM's validators reject a body, the answer is that of vLLM's server."""
    seen = errors_of(running.engine)
    for body in CLASSIFYING[URL]:
        http.check_same(URL, body)
    assert unseen(raise_sites.in_validators([running.engine._types[URL]]), seen) == []


def test_every_field_of_a_wrong_type(running: Running, http: VllmHttp) -> None:
    """A wrong type in any field of a request is rejected with the answer of vLLM's server."""
    count = 0
    for body in wrong_fields(running, URL, {"input": "x"}):
        assert http.check_same(URL, body).status_code == 400
        count += 1
    assert count > 20
