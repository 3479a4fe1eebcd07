"""Imported first by each process that vLLM spawns; `service/worker/__main__.py` arranges that."""

import gc

from service.worker.engine import failure_log

# Imports create millions of objects and no garbage: Python's default thresholds would cost a fifth of the start.
gc.set_threshold(50_000, 10, 10)
failure_log.install()
