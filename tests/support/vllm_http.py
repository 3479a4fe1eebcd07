"""vLLM's own HTTP server over a test's engine: its app in this process, without a port."""

import copy
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

import httpx

from service.worker.engine.protocol import Answer
from service.worker.engine.vllm import VllmEngine
from tests.e2e.refused_bodies import NO_BODY_FOR
from tests.support import raise_sites
from tests.support.engines import HEADERS, Running, without_ids


class VllmHttp:
    """vLLM's app, configured as by its command line, over a running engine."""

    def __init__(self, running: Running, *arguments: str) -> None:
        self._running = running
        self._app = running.call(self._build(arguments))

    def post(self, url: str, body: str) -> tuple[int, Any]:
        """Status and body of the response."""
        answer: tuple[int, Any] = self._running.call(self._post(url, body))
        return answer

    def check_same(self, url: str, body: dict[str, Any] | str) -> Answer:
        """Asserts that the engine answers as vLLM's server does, apart from ids and times. Returns that answer."""
        text = body if isinstance(body, str) else json.dumps({"model": "tiny"} | body)
        answer: Answer = self._running.call(self._running.engine.run(url, text, HEADERS))
        theirs = self.post(url, text)
        ours = answer.status_code, json.loads(answer.body)
        assert without_ids(list(ours)) == without_ids(list(theirs)), f"{url} {text[:500]}\n{ours}\n{theirs}"
        return answer

    async def _build(self, arguments: tuple[str, ...]) -> Any:
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        client = self._running.engine._client
        given = ["--model", client.model_config.model, "--served-model-name", "tiny", *arguments]
        parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(given)
        tasks = await client.get_supported_tasks()
        app = build_app(parsed, tasks, client.model_config)
        await init_app_state(client, app.state, parsed, tasks)
        return app

    async def _post(self, url: str, body: str) -> tuple[int, Any]:
        transport = httpx.ASGITransport(self._app, raise_app_exceptions=False)
        headers = {"content-type": "application/json"} | HEADERS
        async with httpx.AsyncClient(transport=transport, base_url="http://vllm", timeout=100) as http:
            response = await http.post(url, content=body, headers=headers)
        is_json = response.headers.get("content-type", "").startswith("application/json")
        return response.status_code, response.json() if is_json else response.content


def errors_of(engine: VllmEngine) -> set[tuple[str, int]]:
    """A set that fills with the (file, line) of every frame in the tracebacks of errors that the engine answers."""
    seen: set[tuple[str, int]] = set()
    answer = engine._error_answer

    async def note(url: str, body: str, error: Exception) -> Answer:
        seen.update(raise_sites.raised(error))
        return await answer(url, body, error)

    engine._error_answer = note  # type: ignore[method-assign]
    return seen


def unseen(sites: Iterable[raise_sites.Site], seen: set[tuple[str, int]]) -> list[str]:
    """The names of the sites that no error passed through, except those that no body can reach."""
    exempt = tuple(itertools.chain(*NO_BODY_FOR.values()))
    names = (site.name for site in sites if not any(site.holds(*place) for place in seen))
    return sorted(name for name in names if not name.startswith(exempt))


def wrong_fields(running: Running, url: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Bodies in which one field at a time has a value that its type does not accept."""
    adapter = running.engine._types[url]
    for name, wrong in itertools.product(_fields(adapter.core_schema), (7.5, "no such", {"no": "such"}, [[{}]], True)):
        given = {"model": "tiny"} | body | {name: wrong}
        try:
            adapter.validate_python(copy.deepcopy(given))
        except Exception:  # noqa: BLE001 - validators may raise anything
            yield given


def _fields(schema: Any) -> set[str]:
    """The fields of the outermost models of a schema of pydantic's core."""
    if isinstance(schema, list | tuple):
        return set().union(*map(_fields, schema))
    if not isinstance(schema, dict):
        return set()
    if schema.get("type") == "model":
        return set(schema["cls"].model_fields)
    return set().union(*map(_fields, schema.values()))
