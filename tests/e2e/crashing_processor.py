"""A logits processor that kills the engine on request: `"vllm_xargs": {"crash": 1}` in a body. For tests of poison."""

import os
import signal
from typing import Any

from vllm.v1.sample.logits_processor import LogitsProcessor


class CrashOnRequest(LogitsProcessor):
    """Looks at the requests that come into the engine's batch."""

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        pass

    def apply(self, logits: Any) -> Any:
        return logits

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        for added in batch_update.added if batch_update else ():
            if (added[1].extra_args or {}).get("crash"):
                os.kill(os.getpid(), signal.SIGKILL)
