"""Tells the shell scripts the settings, read here as all processes read them, one line each.

`home`: BATCH_HOME and its supervisord.conf, whatever else is wrong with the settings.
`start`: the same two; `embedded` or `external`, as Postgres is; BATCH_PROGRAMS, with blanks; the host's name. First
checks the settings as `python -m service.gateway --check` does; `start quietly` warns of no variables. The status is 2
with wrong settings.
"""

import os
import socket
import sys
from pathlib import Path

from service import config
from service.config import ROOT


def supervisord_conf(home: Path) -> Path:
    """The supervisord.conf of a home: the shipped one for var/, also over a link; any other home has its own."""
    default = ROOT / "var"
    # Before the first start neither exists.
    is_default = os.path.realpath(home) == os.path.realpath(default) or (
        home.exists() and default.exists() and home.samefile(default)
    )
    return ROOT / "conf/supervisord.conf" if is_default else home / "supervisord.conf"


def main(question: str, *how: str) -> int:
    """Answers on stdout."""
    rest = []
    if question == "start":
        settings = config.load(warns="quietly" not in how, is_check=True)
        rest = [
            "external" if settings.database_url else "embedded",
            settings.programs.replace(",", " "),
            socket.gethostname(),
        ]
    home = config.home()
    if not str(home).isprintable():
        print("BATCH_HOME has control characters, or is not UTF-8", file=sys.stderr)
        return 2
    lines = [str(home), str(supervisord_conf(home)), *rest]
    sys.stdout.buffer.write(os.fsencode("".join(f"{line}\n" for line in lines)))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
