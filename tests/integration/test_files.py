"""Files as Postgres keeps them: while they arrive, when they are deleted, and in lists."""

from collections.abc import Iterator

import peewee
import pytest

from service.db import endings, file_lists, files
from service.db.connection import Database
from service.db.file_lists import Entry, Order
from service.db.files import PartGoneError, PartsError
from service.db.limits import Limits
from tests.support.store import stored

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


def arrived(database: Database, begun: tuple[int, int]) -> int:
    """A file that is complete."""
    assert database.call(files.finish, *begun, "a", 0, None, ALLOWED)
    return begun[0]


def ended(database: Database) -> None:
    """A batch that has ended, with an output and an error file."""
    batch = stored(database, 1, tenant="t")

    def end(db: peewee.PostgresqlDatabase) -> None:
        db.execute_sql(
            "UPDATE batches SET state = 'cancelled', end_time = clock_timestamp(), is_counted = true WHERE id = %s",
            (batch.id,),
        )
        db.execute_sql(
            "INSERT INTO output_files (batch_id, kind, bytes, lines, create_time)"
            " SELECT id, unnest(ARRAY['output', 'error']), 1, 1, end_time FROM batches WHERE id = %s",
            (batch.id,),
        )

    database.call(end)


def listed(database: Database, order: Order) -> Iterator[Entry]:
    """All files of a tenant in pages of one, each of which is asked for after the one before was taken."""
    after = None
    while found := database.call(file_lists.page, "t", ("input", "output", "error"), after, 1, order):
        yield found[0]
        after = found[0].kind, found[0].number
    assert found == []


def purged(database: Database) -> None:
    while database.call(files.purge, 100):
        pass


def removed(database: Database, file: Entry, by_age: bool) -> None:
    """Leaves nothing of a file; of an output file, of its batch."""
    table, time = ("files", "expire_time") if file.kind == "input" else ("batches", "end_time")
    if by_age:
        older = f"UPDATE {table} SET {time} = clock_timestamp() - interval '1 hour' WHERE id = %s"
        database.call(lambda db: db.execute_sql(older, (file.number,)))
        database.call(files.expire)
        database.call(endings.delete_old, 1800)
    elif file.kind == "input":
        database.call(files.discard, "t", file.number, "kept")
    else:
        database.call(endings.delete, file.number, "t")
    purged(database)
    assert not counted(database, f"{table} WHERE id = {file.number}")


@pytest.mark.parametrize("by_age", [False, True])
@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("is_equal", [False, True])
def test_list_goes_on_after_what_is_gone(is_equal: bool, order: Order, by_age: bool, database: Database) -> None:
    """Of a list whose every file is removed once it was seen, nothing is left out and nothing comes twice."""
    slow = database.call(files.begin, "t", ALLOWED)
    for _ in range(2):
        arrived(database, database.call(files.begin, "t", ALLOWED))
        ended(database)
    arrived(database, slow)
    for table in ("files", "output_files") if is_equal else ():
        equal = f"UPDATE {table} SET create_time = '2026-01-01 00:00:00.000500Z'"
        database.call(lambda db, equal=equal: db.execute_sql(equal))
    whole, seen = list(listed(database, order)), list[Entry]()
    assert len({(file.kind, file.number) for file in whole}) == len(whole) == 7
    for file in listed(database, order):
        seen.append(file)
        if file.kind == "input" or [each.number for each in seen].count(file.number) == 2:
            removed(database, file, by_age)
    assert seen == whole


def test_only_who_may_see_a_file_lists_on_after_it(database: Database) -> None:
    """Nobody lists on after a file of another tenant, one that never was, or one that was removed long ago."""
    file_id, kinds = arrived(database, database.call(files.begin, "t", ALLOWED)), ("input",)
    for _ in range(2):
        assert database.call(file_lists.page, "t", kinds, ("input", file_id), 1, "asc") == []
        assert database.call(file_lists.page, "other", kinds, ("input", file_id), 1, "asc") is None
        assert database.call(file_lists.page, "t", kinds, ("input", file_id + 1), 1, "asc") is None
        database.call(files.discard, "t", file_id, "kept")
        purged(database)
    database.call(lambda db: db.execute_sql("UPDATE gone_files SET gone_time = gone_time - interval '2 days'"))
    database.call(file_lists.forget)
    assert database.call(file_lists.page, "t", kinds, ("input", file_id), 1, "asc") is None
