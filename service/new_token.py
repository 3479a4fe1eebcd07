"""Makes a token: `python -m service.new_token FILE NAME ROLE` adds its hash to FILE and prints the token, once.

FILE is what BATCH_TOKEN_HASHES names; it is made with mode 0600 if it is not there. To take a token back, remove its
line. Running servers notice either at the next call.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from service import key_files, tokens
from service.roles import Role


def main(arguments: Sequence[str]) -> int:
    """Exit status 0, or 1 with the reason on stderr."""
    parser = argparse.ArgumentParser(prog="python -m service.new_token", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("name", help="who holds it; shown in the server's log")
    parser.add_argument("role", choices=list(Role))
    given = parser.parse_args(arguments)
    secret, token = tokens.new(given.name, Role(given.role))
    try:
        with os.fdopen(os.open(given.file, os.O_RDWR | os.O_CREAT, 0o600), "r+") as file:
            key_files.check_private(given.file)
            text = file.read()
            added = f"{token.line()}\n" if not text or text.endswith("\n") else f"\n{token.line()}\n"
            tokens.parse(text + added)
            file.write(added)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{given.file}: {error}\n")
        return 1
    sys.stdout.write(f"{secret}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
