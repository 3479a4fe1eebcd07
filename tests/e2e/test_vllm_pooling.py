"""Real vLLM with an embedding model: embeddings, scores and rankings match those of vLLM's own batch runner."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.refused_bodies import POOLING
from tests.support import raise_sites
from tests.support.engines import Running, case_lines, check_same, run_batch
from tests.support.vllm_http import VllmHttp, errors_of, unseen, wrong_fields

# In one process with what shares the import of vLLM.
pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("vllm")]
FLAGS = ("--runner", "pooling", "--convert", "embed")
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/embeddings", {"input": "The quick brown fox"}),
    ("/v1/embeddings", {"input": ["one", "two", "three"], "encoding_format": "float"}),
    ("/v1/embeddings", {"input": "The quick brown fox", "encoding_format": "base64"}),
    ("/v1/embeddings", {"input": "long " * 3000}),
    ("/v1/score", {"text_1": "fox", "text_2": ["dog", "fox"]}),
    ("/v1/rerank", {"query": "fox", "documents": ["a dog", "a fox", "a cat"], "top_n": 2}),
]


VALID: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"input": "x"},
    "/pooling": {"input": "x"},
    "/v1/score": {"text_1": "x", "text_2": "y"},
    "/v1/rerank": {"query": "x", "documents": ["y"]},
}


@pytest.fixture(scope="module")
def running(home: Path) -> Iterator[Running]:
    """One engine with an embedding model for the module."""
    running = Running(home, " ".join(FLAGS))
    running.start()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def http(running: Running) -> VllmHttp:
    """vLLM's own server over that engine."""
    return VllmHttp(running, *FLAGS)


def test_same_bodies_as_run_batch(running: Running, tmp_path: Path) -> None:
    """The adapter answers with the same bodies as vLLM's own batch runner, apart from ids and times."""
    requests = REQUESTS + case_lines("embeddings") + case_lines("embeddings_bad_ids")
    theirs = run_batch(running, tmp_path, requests, *FLAGS)
    assert [their["response"]["status_code"] for their in theirs[: len(REQUESTS)]] == [200, 200, 200, 400, 200, 200]
    check_same(running, theirs, requests)


def test_every_refusal_is_that_of_the_http_server(running: Running, http: VllmHttp) -> None:
    """For every place where vLLM's validators reject a body, the answer is that of vLLM's server.

    A new place in the installed vLLM fails this test until refused_bodies.py has a body for it.
    """
    seen = errors_of(running.engine)
    for url, bodies in POOLING.items():
        for body in bodies:
            http.check_same(url, body)
    sites = raise_sites.in_validators(running.engine._types.values())
    assert len(sites) > 3
    assert unseen(sites, seen) == []


@pytest.mark.parametrize("url", VALID)
def test_every_field_of_a_wrong_type(running: Running, http: VllmHttp, url: str) -> None:
    """A wrong type in any field of a request is rejected with the answer of vLLM's server."""
    count = 0
    for body in wrong_fields(running, url, VALID[url]):
        assert http.check_same(url, body).status_code == 400
        count += 1
    assert count > 20


def test_bytes_are_refused(running: Running) -> None:
    """Embeddings as raw bytes, which cannot become a result, are a 400 that names the parameter and the alternative."""
    for url in ("/v1/embeddings", "/pooling"):
        for encoding in ("bytes", "bytes_only"):
            answer = running.run({"input": "x", "encoding_format": encoding}, url)
            error = json.loads(answer.body)["error"]
            assert (answer.status_code, error["param"]) == (400, "encoding_format")
            assert "base64" in error["message"]


def test_what_it_serves(running: Running) -> None:
    """An embedding model serves the endpoints of its kind, and none that generates."""
    assert {"/v1/embeddings", "/v1/score", "/v1/rerank", "/pooling"} <= running.engine.urls
    assert not {"/v1/chat/completions", "/v1/completions"} & running.engine.urls


def test_tokens_are_counted(running: Running) -> None:
    """The answer carries the prompt's token count, for the batch's total."""
    answer = running.run({"input": "The quick brown fox"}, "/v1/embeddings")
    assert (answer.prompt_tokens, answer.completion_tokens) == (json.loads(answer.body)["usage"]["prompt_tokens"], 0)
    assert answer.prompt_tokens > 0
