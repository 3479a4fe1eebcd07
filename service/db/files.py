"""Files: stored in pieces as they arrive, in one call or in parts; read by offset; removed when deleted or expired."""

import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from io import BytesIO
from typing import Any

import peewee
import psycopg2.errors

from service import failpoints
from service.db import file_lists, limits
from service.db.batches import IN_SCOPE
from service.db.connection import allow
from service.db.limits import Limits
from service.db.standby import acknowledged

# A piece is read and written as a whole.
PIECE_BYTES = 1 << 20
# What has not arrived by then never will.
ARRIVING_S = 86_400.0
UPLOAD_S = 3600.0
# What may arrive for an upload, of what was announced: clients send a part again whose answer they have not got.
UPLOAD_FACTOR = 3
COMPLETE_TIMEOUT_S = 60.0

# COPY's binary format, because as text bytes are twice as many: what is before the rows and behind them; and before the
# value of a row that has only one: the number of values, and how long it is.
COPY_HEAD, COPY_END, COPY_ROW = b"PGCOPY\n\xff\r\n\0" + bytes(8), b"\xff\xff", struct.Struct("!hi")
# Handed to libpq at once.
COPY_BYTES = 1 << 18

COLUMNS = "id, tenant, state, is_upload, filename, bytes, lifetime_s, create_time, expire_time"


@dataclass(frozen=True)
class File:
    """A file, or an upload that becomes one. `bytes` of a pending upload: as announced."""

    id: int
    tenant: str
    state: str
    is_upload: bool
    filename: str
    bytes: int
    lifetime_s: float | None
    create_time: datetime
    expire_time: datetime | None


@dataclass(frozen=True)
class Part:
    """A part of a file. `first` None: it is stored and not part of the file yet."""

    id: int
    file_id: int
    first: int | None
    bytes: int
    create_time: datetime


class PartsError(Exception):
    """An upload cannot be completed of these parts, or takes no further ones."""


class PartGoneError(Exception):
    """The part cannot be stored: its upload was given up or completed without it, or its file took too long."""


def begin(db: peewee.PostgresqlDatabase, tenant: str, allowed: Limits) -> tuple[int, int]:
    """A file to be stored in one call: its id, and that of its part. `finish` makes it visible. Raises FullError."""
    with db.atomic():
        limits.check_files(db, allowed, tenant, 1)
        file_id = db.execute_sql(
            "INSERT INTO files (tenant, state, is_upload, filename, bytes, expire_time)"
            " VALUES (%s, 'arriving', false, '', 0, clock_timestamp() + make_interval(secs => %s)) RETURNING id",
            (tenant, ARRIVING_S),
        ).fetchone()[0]
        part = db.execute_sql("INSERT INTO file_parts (file_id, first) VALUES (%s, 0) RETURNING id", (file_id,))
        return file_id, part.fetchone()[0]


def begin_part(db: peewee.PostgresqlDatabase, tenant: str | None, upload_id: int) -> int | None:
    """A part of a pending upload, to be stored. None: there is no such upload.

    `tenant` None, here and below: whosever it is. Otherwise those of others do not exist. Raises PartsError for an
    upload of which more has arrived than can belong to it.
    """
    pending = f"FROM files WHERE id = %(id)s AND {IN_SCOPE} AND state = 'pending' AND expire_time > clock_timestamp()"
    names = {"id": upload_id, "tenant": tenant}
    arrived = "(SELECT coalesce(sum(p.bytes), 0)::bigint FROM file_parts p WHERE p.file_id = files.id)"
    found = db.execute_sql(f"SELECT bytes, {arrived} {pending}", names).fetchone()
    if found is None:
        return None
    announced, there = found
    if there > UPLOAD_FACTOR * announced:
        raise PartsError(f"is one too many: {there} bytes have arrived for this upload, and {announced} were announced")
    row = db.execute_sql(f"INSERT INTO file_parts (file_id) SELECT id {pending} RETURNING id", names).fetchone()
    return row[0] if row else None


def add_piece(db: peewee.PostgresqlDatabase, part_id: int, first: int, data: bytes, is_repeated: bool = False) -> None:
    """Stores the bytes of a part from its offset `first` on. `is_repeated`: they may be stored already.

    Raises PartGoneError, and PartsError for too many.
    """
    head = struct.pack("!hiqiqi", 3, 8, part_id, 8, first, len(data))
    copied = BytesIO(b"".join((COPY_HEAD, head, data, COPY_END)))
    with suppress(*([psycopg2.errors.UniqueViolation] if is_repeated else [])), db.atomic(), db.cursor() as cursor:
        # Locked, so that `purge` removes the part after this piece.
        part = db.execute_sql(
            "SELECT f.is_upload, f.bytes FROM file_parts p JOIN files f ON f.id = p.file_id"
            " WHERE p.id = %s AND f.state IN ('arriving', 'pending') FOR KEY SHARE OF p",
            (part_id,),
        ).fetchone()
        if part is None:
            raise PartGoneError
        is_upload, announced = part
        if is_upload and first + len(data) > announced:
            raise PartsError(f"has more than the {announced} bytes that were announced for the whole upload")
        cursor.copy_expert("COPY file_pieces (part_id, first, data) FROM STDIN (FORMAT binary)", copied, COPY_BYTES)
    failpoints.hit("file.piece")


@acknowledged
def finish(
    db: peewee.PostgresqlDatabase,
    file_id: int,
    part_id: int,
    filename: str,
    size: int,
    lifetime_s: float | None,
    allowed: Limits,
    is_repeated: bool = False,
) -> File | None:
    """Makes a file that has arrived visible. None: it took too long and is gone. Raises FullError.

    `is_repeated`: it may be visible already.
    """
    with db.atomic():
        if is_repeated and (made := get(db, None, file_id)):
            return made
        db.execute_sql("UPDATE file_parts SET bytes = %s WHERE id = %s", (size, part_id))
        failpoints.hit("file.before_commit")
        owner = db.execute_sql("SELECT tenant FROM files WHERE id = %s", (file_id,)).fetchone()
        if owner is not None:
            limits.check_files(db, allowed, owner[0], size)
        return _one(
            db,
            "UPDATE files SET state = 'kept', filename = %(name)s, bytes = %(bytes)s, lifetime_s = %(lifetime)s,"
            " create_time = clock_timestamp(), expire_time = clock_timestamp() + make_interval(secs => %(lifetime)s)"
            f" WHERE id = %(id)s AND state = 'arriving' RETURNING {COLUMNS}",
            {"id": file_id, "name": filename, "bytes": size, "lifetime": lifetime_s},
        )


@acknowledged
def finish_part(db: peewee.PostgresqlDatabase, part_id: int, size: int) -> Part:
    """Makes a part that has arrived available to its upload. Raises PartGoneError."""
    row = db.execute_sql(
        "UPDATE file_parts p SET bytes = %s FROM files f WHERE p.id = %s AND f.id = p.file_id AND f.state = 'pending'"
        " RETURNING p.id, p.file_id, p.first, p.bytes, p.create_time",
        (size, part_id),
    ).fetchone()
    if row is None:
        raise PartGoneError
    return Part(*row)


@acknowledged
def begin_upload(
    db: peewee.PostgresqlDatabase, tenant: str, filename: str, size: int, lifetime_s: float | None, allowed: Limits
) -> File:
    """An upload to which parts can be added for UPLOAD_S. Raises FullError."""
    with db.atomic():
        limits.check_files(db, allowed, tenant, size)
        upload = _one(
            db,
            "INSERT INTO files (tenant, state, is_upload, filename, bytes, lifetime_s, expire_time)"
            " VALUES (%(tenant)s, 'pending', true, %(name)s, %(bytes)s, %(lifetime)s,"
            f" clock_timestamp() + make_interval(secs => %(kept)s)) RETURNING {COLUMNS}",
            {"tenant": tenant, "name": filename, "bytes": size, "lifetime": lifetime_s, "kept": UPLOAD_S},
        )
    assert upload is not None
    return upload


@acknowledged
def complete(db: peewee.PostgresqlDatabase, tenant: str | None, upload_id: int, part_ids: Sequence[int]) -> File | None:
    """Makes a file of parts in this order; the others are removed. None: there is no such upload.

    Repeated with the same parts it returns the file. Raises PartsError.
    """
    with db.atomic():
        allow(db, COMPLETE_TIMEOUT_S)
        found = _one(
            db,
            f"SELECT {COLUMNS} FROM files WHERE id = %(id)s AND {IN_SCOPE} AND is_upload AND state <> 'gone'"
            " AND (expire_time IS NULL OR expire_time > clock_timestamp()) FOR UPDATE",
            {"id": upload_id, "tenant": tenant},
        )
        if found is None:
            return None
        parts = {part.id: part for part in _parts(db, upload_id)}
        if found.state == "kept":
            if [part.id for part in parts.values() if part.first is not None] != list(part_ids):
                raise PartsError("the upload is completed, of other parts")
            return found
        if len(set(part_ids)) < len(part_ids):
            raise PartsError("a part is named twice")
        if missing := [part for part in part_ids if part not in parts]:
            raise PartsError(f"part_{missing[0]} is not a part of this upload")
        size = sum(parts[part].bytes for part in part_ids)
        if size != found.bytes:
            raise PartsError(f"the parts have {size} bytes together, and {found.bytes} were announced")
        first = 0
        for part in part_ids:
            db.execute_sql("UPDATE file_parts SET first = %s WHERE id = %s", (first, part))
            first += parts[part].bytes
        if len(part_ids) < len(parts):
            rest = _one(
                db,
                "INSERT INTO files (tenant, state, is_upload, filename, bytes)"
                f" VALUES (%(tenant)s, 'gone', false, '', 0) RETURNING {COLUMNS}",
                {"tenant": found.tenant},
            )
            assert rest is not None
            db.execute_sql(
                "UPDATE file_parts SET file_id = %s WHERE file_id = %s AND first IS NULL", (rest.id, upload_id)
            )
        failpoints.hit("upload.before_commit")
        return _one(
            db,
            "UPDATE files SET state = 'kept', expire_time = clock_timestamp() + make_interval(secs => lifetime_s)"
            f" WHERE id = %(id)s RETURNING {COLUMNS}",
            {"id": upload_id},
        )


def get(db: peewee.PostgresqlDatabase, tenant: str | None, file_id: int) -> File | None:
    """A file that is complete and neither deleted nor expired, or None."""
    return _one(
        db,
        f"SELECT {COLUMNS} FROM files WHERE id = %(id)s AND {IN_SCOPE} AND state = 'kept'"
        " AND (expire_time IS NULL OR expire_time > clock_timestamp())",
        {"id": file_id, "tenant": tenant},
    )


@acknowledged
def discard(db: peewee.PostgresqlDatabase, tenant: str | None, file_id: int, *states: str) -> File | None:
    """Deletes a file or an upload in one of these states; `purge` removes its pieces. Returns what it was, or None."""
    return _one(
        db,
        f"UPDATE files SET state = 'gone' WHERE id = %(id)s AND {IN_SCOPE} AND state = ANY(%(states)s)"
        f" RETURNING {COLUMNS}",
        {"id": file_id, "tenant": tenant, "states": list(states)},
    )


def read_piece(db: peewee.PostgresqlDatabase, file_id: int, at: int) -> bytes:
    """The bytes of a file from the offset `at` to the end of the piece there. Empty: at its end, or it is removed."""
    copied = BytesIO()
    with db.cursor() as cursor:
        copy = cursor.mogrify(
            """
            COPY (
                SELECT substring(c.data FROM (%(at)s - p.first - c.first + 1)::integer)
                FROM file_parts p JOIN file_pieces c ON c.part_id = p.id
                WHERE p.file_id = %(id)s AND p.first <= %(at)s AND p.first + p.bytes > %(at)s
                  AND c.first <= %(at)s - p.first
                ORDER BY c.first DESC LIMIT 1
            ) TO STDOUT (FORMAT binary)
            """,
            {"id": file_id, "at": at},
        )
        cursor.copy_expert(copy, copied)
    # Nothing but the end is as long as the numbers of a row.
    row = copied.getbuffer()[len(COPY_HEAD) :]
    if len(row) < COPY_ROW.size:
        return b""
    _, size = COPY_ROW.unpack_from(row)
    return bytes(row[COPY_ROW.size : COPY_ROW.size + size])


def size(db: peewee.PostgresqlDatabase, file_id: int) -> int:
    """The bytes of a file, also of one that was deleted since."""
    row = db.execute_sql("SELECT bytes FROM files WHERE id = %s", (file_id,)).fetchone()
    return int(row[0])


def expire(db: peewee.PostgresqlDatabase) -> int:
    """Deletes files that have expired, and uploads that were never completed. Returns how many."""
    cursor = db.execute_sql("UPDATE files SET state = 'gone' WHERE state <> 'gone' AND expire_time < clock_timestamp()")
    return int(cursor.rowcount)


def purge(db: peewee.PostgresqlDatabase, pieces: int) -> bool:
    """Removes up to so many pieces of one deleted file. False: there was nothing to do.

    A file that a batch is still to be made of waits for that.
    """
    with db.atomic():
        row = db.execute_sql(
            """
            SELECT id FROM files f WHERE state = 'gone' AND NOT EXISTS (
                SELECT FROM file_batches m JOIN batches b ON b.id = m.batch_id
                WHERE m.file_id = f.id AND b.state = 'validating')
            ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED
            """
        ).fetchone()
        if row is None:
            return False
        # Of parts that still arrive nothing more is stored from now on.
        db.execute_sql("SELECT FROM file_parts WHERE file_id = %s ORDER BY id FOR UPDATE", row)
        removed = db.execute_sql(
            """
            DELETE FROM file_pieces WHERE (part_id, first) IN (
                SELECT c.part_id, c.first FROM file_pieces c JOIN file_parts p ON p.id = c.part_id
                WHERE p.file_id = %s LIMIT %s)
            """,
            (row[0], pieces),
        ).rowcount
        if not removed:
            file_lists.remember(db, row[0])
            db.execute_sql("DELETE FROM file_parts WHERE file_id = %s", row)
            db.execute_sql("DELETE FROM files WHERE id = %s", row)
        return True


def totals(db: peewee.PostgresqlDatabase) -> tuple[int, int]:
    """How many files are stored, complete or not, and their bytes."""
    row = db.execute_sql(
        "SELECT (SELECT count(*) FROM files WHERE state <> 'gone'), coalesce(sum(bytes), 0)::bigint FROM file_parts"
    ).fetchone()
    return row[0], row[1]


def _parts(db: peewee.PostgresqlDatabase, file_id: int) -> list[Part]:
    rows = db.execute_sql(
        "SELECT id, file_id, first, bytes, create_time FROM file_parts WHERE file_id = %s ORDER BY first, id",
        (file_id,),
    )
    return [Part(*row) for row in rows.fetchall()]


def _one(db: peewee.PostgresqlDatabase, sql: str, params: dict[str, Any]) -> File | None:
    row = db.execute_sql(sql, params).fetchone()
    return File(*row) if row else None
