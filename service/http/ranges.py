"""The part of a file that a client asks for: the header Range, one range of bytes (RFC 9110, section 14). Pure."""

import re

_RANGE = re.compile(r"bytes *= *(\d{1,18})? *- *(\d{1,18})?", re.IGNORECASE)


class UnsatisfiableError(Exception):
    """The range begins behind the end of the file."""


def asked(header: str | None, size: int) -> tuple[int, int] | None:
    """The first byte asked for and the one behind the last; None for the whole file.

    A header that is malformed or asks for several ranges is ignored, as the RFC allows. Raises UnsatisfiableError.
    """
    found = _RANGE.fullmatch(header.strip()) if header else None
    if found is None:
        return None
    first, last = (None if text is None else int(text) for text in found.groups())
    if first is None:
        if last is None:
            return None
        if not last or not size:
            raise UnsatisfiableError
        return max(0, size - last), size
    if last is not None and last < first:
        return None
    if first >= size:
        raise UnsatisfiableError
    return first, size if last is None else min(size, last + 1)
