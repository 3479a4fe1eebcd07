"""Files as Postgres keeps them: nothing is left of one that is deleted while it arrives, and uploads have a limit."""

import pytest

from service.db import files
from service.db.connection import Database
from service.db.files import PartGoneError, PartsError
from service.db.limits import Limits

ALLOWED = Limits(1, 1)


def counted(database: Database, table: str) -> int:
    return int(database.call(lambda db: db.execute_sql(f"SELECT count(*) FROM {table}").fetchone()[0]))


def test_nothing_is_left_of_what_is_deleted_while_it_arrives(database: Database) -> None:
    """Pieces that arrive after their file or upload has ended are not stored: nobody would remove them."""
    file_id, part = database.call(files.begin, "t", ALLOWED)
    upload = database.call(files.begin_upload, "t", "a", 3, None, ALLOWED)
    late = database.call(files.begin_part, "t", upload.id)
    assert late is not None
    for one in (part, late):
        database.call(files.add_piece, one, 0, b"123")
    database.call(files.discard, None, file_id, "arriving")
    database.call(files.discard, None, upload.id, "pending")
    for is_purged in (False, True):
        while is_purged and database.call(files.purge, 1):
            pass
        for one in (part, late):
            with pytest.raises(PartGoneError):
                database.call(files.add_piece, one, 3, b"456")
            with pytest.raises(PartGoneError):
                database.call(files.finish_part, one, 6)
    assert [counted(database, table) for table in ("files", "file_parts", "file_pieces")] == [0, 0, 0]


def test_part_that_arrives_after_its_upload_is_completed(database: Database) -> None:
    """It is told so: it is no part of the file any more."""
    upload = database.call(files.begin_upload, "t", "a", 3, None, ALLOWED)
    part, late = (database.call(files.begin_part, "t", upload.id) for _ in range(2))
    assert part is not None
    assert late is not None
    for one in (part, late):
        database.call(files.add_piece, one, 0, b"123")
    database.call(files.finish_part, part, 3)
    done = database.call(files.complete, "t", upload.id, [part])
    assert done is not None
    with pytest.raises(PartGoneError):
        database.call(files.finish_part, late, 3)
    with pytest.raises(PartGoneError):
        database.call(files.add_piece, late, 3, b"456")
    assert database.call(files.read_piece, done.id, 0) == b"123"


def test_upload_takes_no_more_than_can_belong_to_it(database: Database) -> None:
    """A part may be sent again, and one that was announced small does not fill the disk."""
    upload = database.call(files.begin_upload, "t", "a", 3, None, ALLOWED)
    for size in (3, 3, 3, 1):
        part = database.call(files.begin_part, "t", upload.id)
        assert part is not None
        with pytest.raises(PartsError, match="more than the 3 bytes"):
            database.call(files.add_piece, part, 0, b"1234")
        database.call(files.add_piece, part, 0, b"123"[:size])
        database.call(files.finish_part, part, size)
    with pytest.raises(PartsError, match="10 bytes have arrived for this upload, and 3 were announced"):
        database.call(files.begin_part, "t", upload.id)
