"""The whole application of OpenAI's door on any calls, with a database in which little is found."""

from datetime import UTC, datetime
from typing import Any
from unittest.mock import AsyncMock

import schemathesis
from hypothesis import settings

from service import machine
from service.clock import SystemClock
from service.config import Settings
from service.db.files import File, Part
from service.db.limits import Limits
from service.http import app
from service.http.files import Keeping
from service.http.page.sessions import Sessions
from service.http.page.wiring import Page
from service.insight.channel_opener import ChannelOpener
from service.insight.channels import Channels
from service.insight.presence import Presence
from service.rpc.access import Access
from tests.support import documented
from tests.support.made_up import check_taken

TIME = datetime(2026, 1, 1, tzinfo=UTC)
KEPT = File(1, "default", "kept", True, "a", 5, None, TIME, None)
ANSWERS = {
    "begin": (1, 2),
    "begin_part": 2,
    "begin_upload": File(1, "default", "pending", False, "a", 5, None, TIME, None),
    "complete": KEPT,
    "finish": KEPT,
    "finish_part": Part(2, 1, None, 5, TIME),
    "list_page": [],
    "page": [],
    "read": [],
    "read_piece": b"",
    "unmeasured": [],
}
REAL = {"file_id": "file-1", "input_file_id": "file-1", "batch_id": "batch_1", "upload_id": "upload_1"}


class Played:
    """A database that has what each function needs, and no batches or files."""

    async def run(self, function: Any, *args: Any) -> Any:
        """Takes only what Postgres takes."""
        check_taken(args)
        return ANSWERS.get(function.__name__)

    read = run_idempotent = run

    async def retry_once(self, function: Any) -> Any:
        """What it is asked the first time."""
        return await function(False)

    def apart(self, *args: Any) -> "Played":
        """Itself."""
        return self


def test_any_call() -> None:
    """Whatever is sent to any operation, the answer is one of the document and no 5xx, without Postgres too."""
    database: Any = Played()
    limits, clock, access = Limits(1, 1), SystemClock(), Access(None, SystemClock())
    channels = Channels(ChannelOpener(Settings()))
    presence = Presence(database, channels, clock, 60, AsyncMock(), machine.here())
    page = Page(database, Sessions(database, access), presence, channels, limits, clock, 60)
    door = app.made(database, access, Keeping(None, 1 << 20, limits), 60, (), page, {"testserver"}, is_local=True)
    schema = schemathesis.openapi.from_asgi("/openapi.json", door)
    seen = documented.call_each(schema, REAL, settings.default.max_examples // 4)
    assert len({operation for operation, _ in seen}) == 15
    assert {status for _, status in seen} >= {200, 400, 404}
