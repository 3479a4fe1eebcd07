"""The window: the requests that are in the engine."""

import asyncio
from collections.abc import Callable, Set
from dataclasses import dataclass, field

from service.api import messages
from service.db.chunks import Request
from service.db.results import Result
from service.telemetry import logs, tracing
from service.worker import counters
from service.worker.engine.protocol import Answer, Engine, EngineDeadError
from service.worker.result_writer import ResultWriter
from service.worker.wakeup import Wakeup

# Harmless requests that prove the engine works: before it is ready, when it is idle, and before a suspect runs alone,
# so that a broken engine is not blamed on the suspect. Completions first: they need no chat template.
PROOF = {
    "/v1/completions": '{"prompt": "Hello", "max_tokens": 1}',
    "/v1/embeddings": '{"input": "Hello"}',
    "/classify": '{"input": "Hello"}',
    "/pooling": '{"input": "Hello"}',
    "/score": '{"text_1": "Hello", "text_2": "Hello"}',
}

log = logs.get("runner")


@dataclass
class Window:
    """Runs requests in the engine. Each ends with a result for the writer, or with none if the engine dies."""

    engine: Engine
    writer: ResultWriter
    wakeup: Wakeup

    # No new requests are to start.
    is_closed: bool = False
    # The engine has answered a request.
    is_proven: bool = False
    is_dead: bool = False
    # The chunks that had a request in the engine when it died.
    died_with: Set[int] = frozenset()
    _returned: list[Request] = field(default_factory=list)
    _running: dict[asyncio.Task[None], Request] = field(default_factory=dict)
    _leaving: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def size(self) -> int:
        """How many requests to keep in the engine."""
        return self.engine.window

    @property
    def is_open(self) -> bool:
        """True while requests may start."""
        return not (self.is_closed or self.is_dead)

    def __len__(self) -> int:
        return len(self._running)

    @property
    def chunks(self) -> set[int]:
        """The chunks with requests in the engine."""
        return {request.chunk_id for request in self._running.values()}

    def close(self) -> None:
        """Stops new requests from starting."""
        self.is_closed = True
        self.wakeup.set()

    def start(self, request: Request) -> None:
        """Starts a request in the engine."""
        task = asyncio.create_task(self._run(request))
        self._running[task] = request
        task.add_done_callback(self._ended)

    def cancel(self, chunk_ids: Set[int] | None = None) -> None:
        """Aborts the requests of these chunks, or all, in the engine."""
        for task, request in list(self._running.items()):
            if chunk_ids is None or request.chunk_id in chunk_ids:
                task.cancel()

    def take_back(self, count: int, is_able: Callable[[Request], bool]) -> None:
        """Aborts up to `count` of the requests for which it holds and that the engine has not begun.

        It begins them in the order in which they came. `take_returned` has them once they are aborted.
        """
        able = [task for task, request in self._not_begun() if is_able(request)]
        for task in able[max(0, len(able) - count) :]:
            self._leaving.add(task)
            task.cancel()

    @property
    def waiting(self) -> list[Request]:
        """The requests that the engine has not begun, without those that were taken back."""
        return [request for _, request in self._not_begun()]

    def _not_begun(self) -> list[tuple[asyncio.Task[None], Request]]:
        staying = [(task, request) for task, request in self._running.items() if task not in self._leaving]
        return staying[self.engine.concurrency :]

    def take_returned(self) -> list[Request]:
        """The requests that were taken back since the last call, but for those that were answered meanwhile."""
        returned, self._returned = self._returned, []
        return returned

    @property
    def leaving(self) -> int:
        """How many requests were taken back and are not aborted yet."""
        return len(self._leaving)

    async def empty(self) -> None:
        """Waits until the engine is empty or dead."""
        while self._running and not self.is_dead:
            await self.wakeup.wait()
            self.watch_engine()

    async def prove(self) -> None:
        """Runs a harmless request through the engine, if it has an endpoint for one."""
        url = next((url for url in PROOF if url in self.engine.urls), None)
        if url is not None:
            try:
                await self.engine.run(url, PROOF[url])
            except EngineDeadError as error:
                self._note_death(str(error))
                return
        self.is_proven = True

    def watch_engine(self) -> None:
        """Notices an engine that died while no request was waiting for it."""
        if self.engine.is_dead:
            self._note_death("found dead")

    def _note_death(self, cause: str) -> None:
        if self.is_dead:
            return
        self.is_dead = True
        self.died_with = self.chunks
        log.error("engine_died", cause=cause, in_engine=len(self._running))
        self.wakeup.set()

    def _ended(self, task: asyncio.Task[None]) -> None:
        request = self._running.pop(task)
        if task in self._leaving:
            self._leaving.discard(task)
            if task.cancelled():
                self._returned.append(request)
        self.wakeup.set()

    async def _run(self, request: Request) -> None:
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        try:
            answer = await self._ask(request)
        except EngineDeadError as error:
            self._note_death(str(error))
        except Exception as error:
            name = messages.request_name(request.batch_id, request.index)
            log.error("request_failed", request=name, exc_info=error)
            self.writer.add(internal_error_result(request, error))
        else:
            self.is_proven = True
            counters.request_answered(request.url, loop.time() - began_s)
            self.writer.add(answer_result(request, answer))

    async def _ask(self, request: Request) -> Answer:
        """Runs the request under the name of its result and, if there is one, in the client's trace."""
        name = messages.request_name(request.batch_id, request.index)
        headers = {"x-request-id": name}
        if request.traceparent is None:
            return await self.engine.run(request.url, request.body, headers)
        with tracing.span("run_request", request.traceparent) as span:
            headers[tracing.HEADER] = span.traceparent or request.traceparent
            answer = await self.engine.run(request.url, request.body, headers)
            span.note({"request": name, "http.response.status_code": answer.status_code})
            return answer


def answer_result(request: Request, answer: Answer) -> Result:
    """Returns the result to store for an answer."""
    return Result(
        request.chunk_id,
        request.batch_id,
        request.index,
        status_code=answer.status_code,
        # On one line, for JSONL files; JSON strings contain no raw line breaks.
        body=answer.body.replace("\n", " ").replace("\r", " "),
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
        cached_tokens=answer.cached_tokens,
        reasoning_tokens=answer.reasoning_tokens,
        custom_id=request.custom_id,
    )


def internal_error_result(request: Request, error: Exception) -> Result:
    """Returns the result to store for a request that failed unexpectedly."""
    return Result(
        request.chunk_id,
        request.batch_id,
        request.index,
        error_code="INTERNAL_ERROR",
        error_message=f"{type(error).__name__} in the worker",
        custom_id=request.custom_id,
    )
