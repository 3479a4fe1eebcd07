"""Creates a token: `python -m service.auth.new_token FILE NAME ROLE`."""

import argparse
import fcntl
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from service.auth import key_files, tokens
from service.auth.roles import Role
from vllm_batch import small_files

HELP = """\
To revoke a token, delete its line from FILE. Running servers apply either change at the next call. Example:
  python -m service.auth.new_token var/keys/hashes alice submit > var/keys/alice.token
  python -m service.auth.new_token var/keys/hashes ci submit --tenant research > var/keys/ci.token

Exit status: 0 created, 1 FILE cannot be used, NAME is invalid or taken, 2 wrong arguments.
"""


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status: 0, or 1 with the reason on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m service.auth.new_token",
        description="Creates a bearer token: adds its hash to FILE and prints the token, this once only.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="the file that BATCH_TOKEN_HASHES names; created (mode 0600) if missing"
    )
    parser.add_argument("name", metavar="NAME", help="who holds the token; shown in the servers' logs, unique in FILE")
    parser.add_argument(
        "role",
        metavar="ROLE",
        choices=[role.value for role in Role],
        help="read, submit (also create, cancel, retry and delete batches) or operate (also control recovery)",
    )
    parser.add_argument(
        "--tenant",
        default="",
        metavar="TENANT",
        help="whose batches it creates and sees; its own, of its NAME, if unset",
    )
    given = parser.parse_args(arguments)
    secret, token = tokens.new(given.name, Role(given.role), given.tenant)
    try:
        if given.file.exists() and (problem := small_files.problem(given.file)):
            raise ValueError(f"it {problem}")
        with os.fdopen(os.open(given.file, os.O_RDWR | os.O_CREAT, 0o600), "r+") as file:
            key_files.check_private(given.file)
            # Two at once would write one line over the other.
            fcntl.flock(file, fcntl.LOCK_EX)
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
