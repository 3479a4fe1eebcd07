"""Pages of a listing: their size, and the tokens that say where the next one begins. Pure."""

import base64

from service.errors import ApiError, Violation, invalid

DEFAULT_SIZE = 50
MAX_SIZE = 1000


def size(asked: int) -> int:
    """The page size; 0 means the default. Raises INVALID_ARGUMENT."""
    if not 0 <= asked <= MAX_SIZE:
        raise invalid([Violation("page_size", f"is {asked}, must be from 0 to {MAX_SIZE}")])
    return asked or DEFAULT_SIZE


def token(kind: str, position: int, offset: int = 0) -> str:
    """An opaque token for a position in a listing of this kind; with an offset, for one within what is there."""
    within = f":{offset}" if offset else ""
    return token_after(kind, f"{position}{within}")


def position(text: str, kind: str, field: str) -> int | None:
    """The position in a token; None for an empty one. Raises INVALID_ARGUMENT unless `token` made it for this kind."""
    if not text:
        return None
    found, offset = place(text, kind, field)
    if offset:
        raise wrong_token(field)
    return found


def place(text: str, kind: str, field: str) -> tuple[int, int]:
    """The position and the offset in a token. Raises INVALID_ARGUMENT for a token of another kind."""
    try:
        found, *numbers = _unpacked(text).split(":")
        number, offset = map(int, (*numbers, "0") if len(numbers) == 1 else numbers)
        if found == kind and 0 <= number < 1 << 62 and 0 <= offset < 1 << 62:
            return number, offset
    except ValueError:
        pass
    raise wrong_token(field)


def token_after(kind: str, name: str) -> str:
    """An opaque token for what comes after `name` in a listing of this kind that is ordered by name."""
    return base64.urlsafe_b64encode(f"{kind}:{name}".encode()).decode().rstrip("=")


def after(text: str, kind: str, field: str) -> str:
    """The name in a token; empty for an empty one. Raises INVALID_ARGUMENT for one of another kind."""
    if not text:
        return ""
    try:
        found, _, name = _unpacked(text).partition(":")
        if found == kind and name and "\0" not in name:
            return name
    except ValueError:
        pass
    raise wrong_token(field)


def _unpacked(text: str) -> str:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode()


def wrong_token(field: str) -> ApiError:
    """INVALID_ARGUMENT for a token that this method has not issued."""
    return invalid([Violation(field, "is not a token issued by this method")])
