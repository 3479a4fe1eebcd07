"""Shows what this host's settings lead to: `python -m scripts.status VLLM_BATCH`, used by status.sh.

Replaces itself by that command line, called with the addresses, TLS and token of the settings.
"""

import os
import sys
from collections.abc import Mapping

from service import config
from service.config import Settings


def arguments(settings: Settings, environment: Mapping[str, str]) -> list[str]:
    """The arguments of vllm-batch; none if nothing on this host can be asked."""
    watchdog = ["--watchdog-target", settings.own_address(settings.watchdog_port)]
    target = environment.get("BATCH_TARGET", "")
    if "gateway" in settings.runs:
        target = settings.own_address(settings.gateway_port)
    if target:
        return ["--target", target, "status", *watchdog]
    return ["recovery", *watchdog, "status"] if "watchdog" in settings.runs else []


def main(command: str) -> int:
    """Runs the command. Returns 0 if there is nothing to ask."""
    settings = config.load(warns=False)
    given = arguments(settings, os.environ)
    if not given:
        print(f"this host runs {settings.programs}: BATCH_TARGET=HOST:PORT shows what a gateway knows")
        return 0
    os.environ.update(settings.client_environment)
    os.execv(command, [command, *given])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
