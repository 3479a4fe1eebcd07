"""The worker process: `python -m service.worker`."""

import gc
import sys
from importlib.util import find_spec

# Imports create millions of objects and no garbage: Python's default thresholds would cost a fifth of the start.
gc.set_threshold(50_000, 10, 10)

if __name__ == "__main__":
    # A process that multiprocessing spawns first imports its parent's main module by this name, unless it is called
    # __main__. `spawned` installs the failure log there.
    __spec__ = find_spec("service.worker.engine.spawned")

    from service.worker.lifecycle import main

    raise SystemExit(main(sys.argv[1:]))
