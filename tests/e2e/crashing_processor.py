"""A logits processor that ends the engine on request, for tests of poison requests.

`"vllm_xargs": {"crash": 1}` in a body kills the engine, `{"raise": 1}` makes it raise an exception.
"""

import os
import signal
from typing import Any

from vllm.v1.sample.logits_processor import LogitsProcessor


class CrashOnRequest(LogitsProcessor):
    """Inspects the requests that enter the engine's batch."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        pass

    def apply(self, logits: Any) -> Any:
        return logits

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        for added in batch_update.added if batch_update else ():
            asked = added[1].extra_args or {}
            if asked.get("crash"):
                os.kill(os.getpid(), signal.SIGKILL)
            if asked.get("raise"):
                raise RuntimeError("CUDA error: out of memory")
