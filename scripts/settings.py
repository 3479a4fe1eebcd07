"""Answers the shell scripts' questions about the settings, read here as all processes read them.

`home`: BATCH_HOME and its supervisord.conf, one line each, whatever else is wrong with the settings.
`postgres`: embedded or external. `programs`: BATCH_PROGRAMS, with blanks. The status is 2 with wrong settings.
"""

import os
import sys
from pathlib import Path

from service import config
from service.config import ROOT


def supervisord_conf(home: Path) -> Path:
    """The supervisord.conf of a home: the shipped one for var/, also over a link; any other home has its own."""
    default = ROOT / "var"
    is_default = home == default or (home.exists() and default.exists() and home.samefile(default))
    return ROOT / "conf/supervisord.conf" if is_default else home / "supervisord.conf"


def main(question: str) -> int:
    """Answers on stdout."""
    if question == "postgres":
        lines = ["external" if config.load(warns=False, is_check=True).database_url else "embedded"]
    elif question == "programs":
        lines = [config.load(warns=False).programs.replace(",", " ")]
    else:
        home = config.home()
        lines = [str(home), str(supervisord_conf(home))]
        if not str(home).isprintable():
            print("BATCH_HOME has control characters, or is not UTF-8", file=sys.stderr)
            return 2
    sys.stdout.buffer.write(os.fsencode("".join(f"{line}\n" for line in lines)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
