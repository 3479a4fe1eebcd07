"""The files of the page, and what browsers are told about them."""

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import FileResponse

STATIC = Path(__file__).parent / "static"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# Nothing of other hosts, nothing inline, and no text ever becomes markup or code.
POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # Asked for each time, and sent when changed: an upgrade must not leave old scripts beside new ones.
    "cache-control": "no-cache",
}


def router() -> APIRouter:
    """The page, and each of its files: there are no others."""
    made = APIRouter(include_in_schema=False)

    def add(path: str, file: Path) -> None:
        async def get() -> FileResponse:
            return FileResponse(file, media_type=TYPES[file.suffix], headers=HEADERS)

        made.add_api_route(path, get, methods=["GET", "HEAD"], name=f"page {file.name.lower()}")

    add("/", STATIC / "index.html")
    for file in sorted(STATIC.iterdir()):
        if file.suffix in TYPES:
            add(f"/page/{file.name}", file)
    return made
