"""An engine without a model: deterministic answers at a given speed, faults on request. For tests, never the default.

A request asks for a fault in its body, `"vllm_xargs": {"simulate": ...}`:
`crash` kills the process, `engine_dead` the engine, `hang` stops the engine for good, `refuse` is answered with 400,
a number is how long the request takes, in seconds.
"""

import asyncio
import hashlib
import os
import signal
from collections.abc import Set
from typing import Any

import msgspec

from service.worker.engine import Answer, EngineDeadError

URLS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/embeddings"})


class _Body(msgspec.Struct):
    vllm_xargs: dict[str, Any] = {}
    max_tokens: int = 16


_decode = msgspec.json.Decoder(_Body).decode


class SimulatedEngine:
    """Runs up to `concurrency` requests at once, each for `request_s`; the rest waits, as in the real one."""

    def __init__(
        self, model: str, request_s: float, load_s: float, concurrency: int = 64, window: int | None = None
    ) -> None:
        self.models: tuple[str, ...] = (model,)
        self.urls: Set[str] = URLS
        self.window = window or 4 * concurrency
        self.steps = 0
        self.is_dead = False
        self._request_s = request_s
        self._load_s = load_s
        self._free = asyncio.Semaphore(concurrency)
        self._running: set[asyncio.Future[None]] = set()
        self._hung = asyncio.Event()

    async def start(self) -> None:
        """Takes `load_s`."""
        await asyncio.sleep(self._load_s)

    async def run(self, url: str, body: str) -> Answer:
        """Answers from a hash of the body: the same body, the same answer."""
        if self.is_dead:
            raise EngineDeadError("the simulated engine is dead")
        try:
            asked = _decode(body)
        except msgspec.ValidationError as error:
            return _refusal(str(error))
        fault = asked.vllm_xargs.get("simulate")
        async with self._free:
            if self._hung.is_set():
                fault = "hang"
            if fault == "crash":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "refuse":
                return _refusal("refused on request")
            if fault == "engine_dead":
                self._die()
            if fault == "hang":
                self._hung.set()
            await self._take(float("inf") if fault == "hang" else _seconds(fault, self._request_s))
        self.steps += 1
        return self._answer(url, body, asked.max_tokens)

    async def stop(self) -> None:
        """Nothing is left behind."""
        self._die()

    def _die(self) -> None:
        self.is_dead = True
        for future in list(self._running):
            if not future.done():
                future.set_exception(EngineDeadError("the simulated engine died"))

    async def _take(self, seconds: float) -> None:
        """Lets the time pass, unless the engine dies meanwhile."""
        if self.is_dead:
            raise EngineDeadError("the simulated engine died")
        if seconds == 0:
            # Still a step of the loop: others get their turn as between two steps of a real engine.
            await asyncio.sleep(0)
            return
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._running.add(future)
        timer = None if seconds == float("inf") else loop.call_later(seconds, _resolve, future)
        try:
            await future
        finally:
            self._running.discard(future)
            if timer is not None:
                timer.cancel()

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
        else:
            choice = {"index": 0, "message": {"role": "assistant", "content": digest}, "finish_reason": "stop"}
            data = {"id": f"chatcmpl-{digest[:16]}", "object": "chat.completion", "choices": [choice]}
        usage["total_tokens"] = sum(usage.values())
        data |= {"model": self.models[0], "usage": usage}
        return Answer(200, msgspec.json.encode(data).decode(), usage["prompt_tokens"], usage["completion_tokens"])


def _resolve(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


def _seconds(fault: object, otherwise: float) -> float:
    return float(fault) if isinstance(fault, int | float) else otherwise


def _refusal(message: str) -> Answer:
    error = {"message": message, "type": "BadRequestError", "param": None, "code": 400}
    return Answer(400, msgspec.json.encode({"error": error}).decode())
