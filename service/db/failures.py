"""The failed results of a batch, counted by what they say."""

from collections.abc import Sequence
from dataclasses import dataclass

import peewee

from service.db.connection import allow
from service.db.results import FAILED

# Failures counted, those that finished first.
MAX_COUNTED = 100_000
# Different texts that are told apart.
MAX_TEXTS = 500
# A longer text of an error is known by its beginning.
TEXT_CHARS = 2_000
TIMEOUT_S = 60.0

# The first of each text is looked up by its number. With an order: Postgres believes of a batch that is newer than its
# statistics that any index will do.
#
# As service/api/error_kinds.py does it with messages: here so that few texts are left of many.
NUMBER, QUOTED = "[0-9]+", r"""(?<!\w)'[^']+'(?!\w)|\\"[^"]*\\"|`[^`]+`"""
COUNT = f"""
SELECT count, sum(count) OVER ()::bigint, r.error_code, r.status_code,
       left(coalesce(r.error_message, r.body, ''), %(chars)s),
       coalesce(r.custom_id, (SELECT q.custom_id FROM requests q WHERE q.batch_id = r.batch_id AND q.index = r.index))
FROM (
    SELECT count(*) AS count, min(sequence) AS first FROM (
        SELECT sequence, error_code, status_code,
               regexp_replace(
                   regexp_replace(left(coalesce(error_message, body, ''), %(chars)s), %(number)s, 'N', 'g'),
                   %(quoted)s, '…', 'g') AS text
        FROM results r WHERE batch_id = %(batch)s AND {FAILED} ORDER BY sequence LIMIT %(counted)s) failed
    GROUP BY error_code, status_code, text) texts
CROSS JOIN LATERAL (
    SELECT * FROM results r WHERE r.batch_id = %(batch)s AND r.sequence BETWEEN texts.first AND texts.first
    ORDER BY r.sequence LIMIT 1) r
ORDER BY count DESC, first LIMIT %(texts)s
"""


@dataclass(frozen=True)
class Text:
    """What `count` failures say, but for numbers and quoted texts, by the first of them."""

    count: int
    error_code: str | None
    status_code: int | None
    # The message of an error; the body of a response, as JSON text that may be cut.
    text: str
    custom_id: str


@dataclass(frozen=True)
class Failures:
    """The texts, most frequent first; `counted` failures in all, which is MAX_COUNTED when there are more."""

    texts: Sequence[Text]
    counted: int


def count(db: peewee.PostgresqlDatabase, batch_id: int) -> Failures:
    """Counts the failures of a batch. Reads failed results alone, MAX_COUNTED of them at most."""
    names = {"batch": batch_id, "number": NUMBER, "quoted": QUOTED}
    names |= {"chars": TEXT_CHARS, "counted": MAX_COUNTED, "texts": MAX_TEXTS}
    with db.atomic():
        allow(db, TIMEOUT_S)
        rows = db.execute_sql(COUNT, names).fetchall()
    texts = [Text(number, *rest) for number, _, *rest in rows]
    return Failures(texts, rows[0][1] if rows else 0)
