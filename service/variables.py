"""The variables given by the environment and `.env`: which are ours, misspelt or foreign."""

import io
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from dotenv.parser import Binding, Original, parse_stream
from dotenv.variables import parse_variables

from vllm_batch import small_files

PREFIX = "BATCH_"
ENCODING = "utf-8-sig"
# How similar to a setting a name has to be to count as misspelt: BATCH_HEARTBEAT_TIMEOUT is, BATCH_TASK_INDEX is not.
LIKENESS = 0.85

# What Kubernetes sets in every pod for a Service of the namespace, here for one named batch or batch-something.
_LINK_NAME = re.compile(r"_SERVICE_(HOST|PORT(_\w+)?)$|_PORT_\d+_(TCP|UDP|SCTP)(_(ADDR|PORT|PROTO))?$")
_LINK_VALUE = re.compile(r"(tcp|udp|sctp)://")
# A value in single quotes.
_LITERAL = re.compile(r"[^=]*=[^\S\n]*'")


@dataclass
class Judgement:
    """What to report about the names, one line each. Lines in `wrong` stop a start."""

    wrong: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)


def read_file(path: Path) -> tuple[dict[str, str], list[str]]:
    """The variables in a file like `.env`, and one line per mistake in it. A missing file counts as empty.

    As in shells, ${NAME} expands to another variable, except in single quotes.
    """
    try:
        if found := problem(path):
            return {}, [f"{path}: {found}"]
        text = small_files.read(path).decode(ENCODING) if path.is_file() else ""
    except UnicodeDecodeError:
        return {}, [f"{path}: not UTF-8 text"]
    except ValueError as error:
        return {}, [str(error)]
    except OSError as error:
        return {}, [f"{path}: {error.strerror}"]
    if "\0" in text:
        return {}, [f"{path}: it has a NUL, as UTF-16 has"]
    statements = list(parse_stream(io.StringIO(text, newline=None)))
    # The text may be a secret: only the number of its line is shown.
    wrong = [
        f"{path}, line {_line(statement.original)}: not NAME=value"
        for statement in statements
        if statement.error or (statement.key is not None and statement.value is None)
    ]
    return _values(statements), wrong


def problem(path: Path) -> str:
    """Why a file like `.env` cannot be read; "" if it can, or if nothing is meant to be there, as with /dev/null.

    Raises OSError.
    """
    try:
        # Each of our processes reads it, also much later: a pipe, even one of a shell's, gives its text to one alone.
        found = "is a pipe, and must be a file" if path.is_fifo() else small_files.problem(path)
    except (FileNotFoundError, NotADirectoryError):
        return "a link to nothing" if path.is_symlink() else ""
    return f"it {found}" if found else ""


def _values(statements: Sequence[Binding]) -> dict[str, str]:
    values: dict[str, str] = {}
    for statement in statements:
        if statement.key is None or statement.value is None:
            continue
        value = statement.value
        if not _LITERAL.match(statement.original.string):
            known = {**os.environ, **values}
            value = "".join(part.resolve(known) for part in parse_variables(value))
        values[statement.key] = value
    return values


def _line(original: Original) -> int:
    # A statement begins with the empty lines before it.
    text = original.string
    return original.line + text[: len(text) - len(text.lstrip())].count("\n")


def is_link(name: str, value: str) -> bool:
    """True for a variable that Kubernetes set for a Service, even if it has the name of one of our settings."""
    return bool(_LINK_NAME.search(name) or (name.endswith("_PORT") and _LINK_VALUE.match(value)))


def judge(environ: Mapping[str, str], file: Mapping[str, str], known: Collection[str]) -> Judgement:
    """Which names are misspelt, and which have our prefix but are not ours; `known` are all names that we know."""
    judgement = Judgement()
    for name, value, is_in_file in _each(environ, file):
        upper = name.upper()
        has_prefix = upper.startswith(PREFIX)
        if has_prefix and is_link(upper, value):
            judgement.foreign.append(f"{name}: set by Kubernetes for a Service of that name; ignored")
        elif upper not in known and (meant := misspelled(upper, known)):
            line = f"{name}: no such setting; {' or '.join(meant)} is meant"
            # Without our prefix, such as DATABASE_URI: may be anybody's in the environment, but not in our own file.
            is_ours = is_in_file or any(one.startswith(PREFIX) for one in meant)
            (judgement.wrong if is_ours else judgement.foreign).append(line)
        elif upper not in known and has_prefix:
            judgement.foreign.append(f"{name}: no setting of this server; ignored")
    return judgement


def _each(environ: Mapping[str, str], file: Mapping[str, str]) -> Iterator[tuple[str, str, bool]]:
    for name in sorted({*environ, *file}):
        yield name, environ.get(name, file.get(name, "")), name in file


def misspelled(name: str, known: Collection[str]) -> list[str]:
    """The names that this may be a misspelling of; none for a name that resembles none of them."""
    near = sorted(one for one in known if is_one_edit(name, one))
    if near or not name.startswith(PREFIX):
        return near
    endings = {one.removeprefix(PREFIX): one for one in known if one.startswith(PREFIX)}
    return [endings[one] for one in get_close_matches(name.removeprefix(PREFIX), endings, 1, LIKENESS)]


def is_one_edit(one: str, other: str) -> bool:
    """True if the names differ by one letter that was changed, left out, added or swapped with its neighbour."""
    if one == other or abs(len(one) - len(other)) > 1:
        return False
    begin = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    one, other = one[begin:], other[begin:]
    return (
        one[1:] == other[1:]
        or one[1:] == other
        or one == other[1:]
        or (one[:2] == other[1::-1] and one[2:] == other[2:])
    )
