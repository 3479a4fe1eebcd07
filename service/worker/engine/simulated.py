"""An engine without a model: deterministic answers at a given speed, faults on request. For tests, never the default.

As with vLLM, a separate process makes the steps: if it is killed, the engine is dead; if it is stopped, the engine
hangs; if the worker is killed, it survives. A request's body can ask for a fault, `"vllm_xargs": {"simulate": ...}`:
`crash` kills the worker, `engine_dead` the engine, `hang` stops the engine for good, `refuse` is answered with 400,
`prefill` makes the engine compute for 12 s without a step, and a number sets the request's duration in seconds.
`"vllm_xargs": {"body_bytes": N}` makes the body of its answer N bytes long, unless it is longer anyway.
"""

import asyncio
import contextlib
import hashlib
import heapq
import os
import signal
import sys
from collections.abc import Mapping, Set
from typing import Any

import msgspec

from service.worker.engine import cause
from service.worker.engine.cause import Cause, Failure
from service.worker.engine.protocol import Answer, EngineDeadError, EngineStartError

URLS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"})
STEP_S = 0.005
# Longer than the progress lease of an engine that is not computing.
PREFILL_S = 12.0
BUSY, IDLE = b"1", b"0"
# Learns from single bytes whether there are requests; while there are, writes one byte per step. Like vLLM's processes
# it goes on when its parent is gone.
STEPS = """
import os, select, signal, sys, time
signal.signal(signal.SIGPIPE, signal.SIG_IGN)
def prefill(*_):
    end = time.monotonic() + float(sys.argv[3])
    while time.monotonic() < end:
        pass
signal.signal(signal.SIGUSR1, prefill)
is_busy, has_parent = False, True
while True:
    if has_parent and select.select([0], [], [], 0 if is_busy else None)[0]:
        told = os.read(0, 4096)
        is_busy, has_parent = not told.endswith(b"0"), bool(told)
        continue
    time.sleep(float(sys.argv[2]))
    try:
        sys.stdout.write(".")
        sys.stdout.flush()
    except OSError:
        pass
"""


class _Body(msgspec.Struct):
    vllm_xargs: dict[str, Any] = {}
    max_tokens: int = 16


_decode = msgspec.json.Decoder(_Body).decode


class SimulatedEngine:
    """Runs up to `concurrency` requests at once, each for `request_s`; the rest wait, as in vLLM."""

    def __init__(
        self,
        model: str,
        request_s: float,
        load_s: float,
        concurrency: int = 64,
        window: int | None = None,
        load_failure: str = "",
        adapters: int = 0,
    ) -> None:
        self.models: tuple[str, ...] = (model, *(f"{model}-{number}" for number in range(1, adapters + 1)))
        self.urls: Set[str] = URLS
        self.window = window or 4 * concurrency
        self.concurrency = min(concurrency, self.window)
        self.steps = 0
        self.is_dead = False
        self._request_s = request_s
        self._load_s = load_s
        self._load_failure = load_failure
        self._free = asyncio.Semaphore(concurrency)
        # Heap of running requests by the time at which they finish.
        self._running: list[tuple[float, int, asyncio.Future[None]]] = []
        self._count = 0
        self._process: asyncio.subprocess.Process | None = None
        self._following: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Takes `load_s`. If `load_failure` is given, raises EngineStartError as for an engine that failed with it."""
        arguments = ("-E", "-S", "-c", STEPS, "simulated-engine", str(STEP_S), str(PREFILL_S))
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, *arguments, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        assert self._process.stdout is not None
        self._following = asyncio.create_task(self._follow(self._process.stdout))
        await asyncio.sleep(self._load_s)
        if self._load_failure:
            raise EngineStartError(cause.explain([Failure("RuntimeError", self._load_failure)]))

    async def run(self, url: str, body: str, headers: Mapping[str, str] | None = None) -> Answer:
        """Answers with a hash of the body: the same body gets the same answer."""
        if self.is_dead:
            raise EngineDeadError("the simulated engine is dead")
        try:
            asked = _decode(body)
        except msgspec.ValidationError as error:
            return _refusal(str(error))
        fault = asked.vllm_xargs.get("simulate")
        async with self._free:
            if fault == "crash":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "refuse":
                return _refusal("refused on request")
            if fault == "engine_dead":
                self._signal(signal.SIGKILL)
                self._die()
            if fault == "hang":
                self._signal(signal.SIGSTOP)
            if fault == "prefill":
                self._signal(signal.SIGUSR1)
            await self._take(float("inf") if fault == "hang" else _seconds(fault, self._request_s))
        answer = self._answer(url, body, asked.max_tokens)
        return _padded(answer, asked.vllm_xargs.get("body_bytes"))

    async def death_cause(self) -> Cause:
        """Always reports that the engine's process was killed."""
        return cause.explain([cause.killed("simulated-engine", signal.SIGKILL)])

    async def stop(self) -> None:
        """Ends the engine's process."""
        self._signal(signal.SIGKILL)
        if self._process is not None:
            await self._process.wait()
        if self._following is not None:
            await self._following

    def _signal(self, number: int) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def _tell(self, state: bytes) -> None:
        if self._process is not None and self._process.stdin is not None and not self.is_dead:
            self._process.stdin.write(state)

    async def _follow(self, steps: asyncio.StreamReader) -> None:
        """Follows the steps of the process until it ends."""
        loop = asyncio.get_running_loop()
        while await steps.read(1024):
            if self._running:
                self.steps += 1
                self._step(loop.time())
        self._die()

    def _step(self, now_s: float) -> None:
        while self._running and self._running[0][0] <= now_s:
            _, _, future = heapq.heappop(self._running)
            if not future.done():
                future.set_result(None)
        if not self._running:
            self._tell(IDLE)

    def _die(self) -> None:
        self.is_dead = True
        for _, _, future in self._running:
            if not future.done():
                future.set_exception(EngineDeadError("the simulated engine died"))
        self._running.clear()

    async def _take(self, seconds: float) -> None:
        """Waits until the engine has stepped past the given time. Raises EngineDeadError if it dies."""
        if self.is_dead:
            raise EngineDeadError("the simulated engine died")
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._count += 1
        if not self._running:
            self._tell(BUSY)
        heapq.heappush(self._running, (loop.time() + seconds, self._count, future))
        await future

    def _answer(self, url: str, body: str, max_tokens: int) -> Answer:
        digest = hashlib.sha256(body.encode()).hexdigest()
        usage = {"prompt_tokens": len(body) // 4, "completion_tokens": max_tokens}
        if url == "/v1/embeddings":
            usage["completion_tokens"] = 0
            data: dict[str, Any] = {
                "id": f"embd-{digest[:16]}",
                "object": "list",
                "data": [{"index": 0, "object": "embedding", "embedding": [int(digest[:4], 16) / 65536]}],
            }
        elif url == "/v1/completions":
            choice = {"index": 0, "text": digest, "finish_reason": "stop"}
            data = {"id": f"cmpl-{digest[:16]}", "object": "text_completion", "choices": [choice]}
        elif url == "/v1/responses":
            return self._response(digest, usage)
        else:
            choice = {"index": 0, "message": {"role": "assistant", "content": digest}, "finish_reason": "stop"}
            data = {"id": f"chatcmpl-{digest[:16]}", "object": "chat.completion", "choices": [choice]}
        usage["total_tokens"] = sum(usage.values())
        data |= {"model": self.models[0], "usage": usage}
        return Answer(200, msgspec.json.encode(data).decode(), usage["prompt_tokens"], usage["completion_tokens"])

    def _response(self, digest: str, usage: Mapping[str, int]) -> Answer:
        """An answer of the Responses API, which has names of its own for all that the others share."""
        prompt, generated = usage["prompt_tokens"], usage["completion_tokens"]
        text = {"type": "output_text", "text": digest, "annotations": []}
        message = {"id": f"msg_{digest[:16]}", "type": "message", "role": "assistant", "status": "completed"}
        data = {
            "id": f"resp_{digest[:16]}",
            "object": "response",
            "created_at": 0,
            "status": "completed",
            "model": self.models[0],
            "output": [message | {"content": [text]}],
            "usage": {"input_tokens": prompt, "output_tokens": generated, "total_tokens": prompt + generated},
        }
        return Answer(200, msgspec.json.encode(data).decode(), prompt, generated)


def _padded(answer: Answer, size: object) -> Answer:
    """The answer with its body padded to this many bytes."""
    padding = '"padding":"", '
    # Everything in it is ASCII.
    missing = size - len(answer.body) - len(padding) if isinstance(size, int) else -1
    if missing < 0:
        return answer
    body = f'{{"padding":"{"x" * missing}", {answer.body[1:]}'
    return Answer(answer.status_code, body, answer.prompt_tokens, answer.completion_tokens)


def _seconds(fault: object, otherwise: float) -> float:
    return float(fault) if isinstance(fault, int | float) else otherwise


def _refusal(message: str) -> Answer:
    error = {"message": message, "type": "BadRequestError", "param": None, "code": 400}
    return Answer(400, msgspec.json.encode({"error": error}).decode())
