"""The worker process: `python -m service.worker`. `--check` only checks the settings.

Nothing else is here: each process that vLLM spawns reads this file again, and then imports vLLM as we do.
"""

import gc
import sys

# Imports make objects by the million and no garbage: to look for it as often as Python does costs a fifth of a start.
gc.set_threshold(50_000, 10, 10)

if __name__ == "__main__":
    from service.worker.work import main

    raise SystemExit(main(sys.argv[1:]))
