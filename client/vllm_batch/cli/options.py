"""Options that several commands share."""

import math
import os
import secrets
import tempfile
from pathlib import Path
from typing import Any

import click

from vllm_batch.channel import DEFAULT_WATCHDOG_TARGET

# Their descriptors.
STDIN, STDOUT = 0, 1


def part_of(output: Path) -> Path | None:
    """Where an output file is written until it is complete; None for what is no regular file, such as a pipe, and for
    the one behind stdout, to which others write too.

    Another name each time: another command may be writing the same output.
    """
    if output.exists() and (not output.is_file() or is_stdout(output)):
        return None
    return output.with_name(f"{_begin(output)}.{secrets.token_hex(4)}.part")


def is_stdout(output: Path) -> bool:
    """Whether this is where stdout goes, as /dev/stdout is."""
    try:
        return os.path.samestat(output.stat(), os.fstat(STDOUT))
    except OSError:
        return False


def _begin(output: Path) -> str:
    """As much of its name as leaves room for more, whatever its characters: a name has at most 255 bytes."""
    return output.name[:60]


class _OutputFile(click.Path):
    """A file that can be written, checked before anything is uploaded instead of after hours of waiting."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        output: Path = super().convert(value, param, ctx)  # type: ignore[assignment]  # path_type
        if not value:
            # As with `-o "$UNSET"`: for click it names the working directory.
            self.fail("must not be empty", param, ctx)
        if str(value).endswith(os.sep):
            self.fail(f"{value!r} names a folder, and not a file in it", param, ctx)
        if value == "-":
            output = Path("/dev/stdout")
        try:
            part = part_of(output)
            if part is None:
                return output
            if output.is_symlink():
                # The file behind it is replaced, and not the link.
                output = Path(os.path.realpath(output))
                part = output.with_name(part.name)
            with tempfile.NamedTemporaryFile(dir=part.parent, prefix=f"{_begin(output)}.", suffix=".part") as file:
                # On a full disk a file can be created, but not written to.
                file.write(b"\n" * 4096)
                file.flush()
        except OSError as error:
            self.fail(f"{str(output)!r} cannot be written: {error.strerror}", param, ctx)
        return output


class Number(click.FloatRange):
    """A number within a range. NaN is in none, although no comparison says so."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is not a number", param, ctx)
        return number


# Opened when its turn comes: there may be more files than a process may have open.
INPUT_FILE = click.Path(exists=True, dir_okay=False, allow_dash=True)
OUTPUT_FILE = _OutputFile(dir_okay=False, path_type=Path)

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, one object per line.")
result_json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print Result messages of the API, with index and finish_time."
)
watchdog_option = click.option(
    "--watchdog-target",
    envvar="BATCH_WATCHDOG_TARGET",
    default=DEFAULT_WATCHDOG_TARGET,
    show_default=True,
    help="Watchdog address, host:port.",
)
