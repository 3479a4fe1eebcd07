"""Which models workers serve or have served, as far as heartbeats and the queue tell."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field

import peewee

from service.db import unserved
from service.db.file_batches import FORGOTTEN_S, IS_LIVE


@dataclass(frozen=True)
class Served:
    """`urls`: the endpoints of each model that a worker serves or served when it was last seen; empty: not known.

    `live`: the models that a worker serves now. `awaited`: those that batches wait for. `is_loading`: a worker that is
    about to serve has not said yet which models.
    """

    urls: Mapping[str, Set[str]] = field(default_factory=dict)
    live: Set[str] = frozenset()
    awaited: Set[str] = frozenset()
    is_loading: bool = False


def read(db: peewee.PostgresqlDatabase) -> Served:
    """What is known of all workers whose heartbeats are stored."""
    rows = db.execute_sql(
        f"""
        SELECT model, bool_or({IS_LIVE}),
               array(SELECT DISTINCT jsonb_array_elements_text(urls) FROM unnest(array_agg(h.detail->'urls')) AS urls)
        FROM heartbeats h CROSS JOIN unnest(models) AS model GROUP BY model
        """
    ).fetchall()
    [is_loading] = db.execute_sql(
        "SELECT EXISTS (SELECT FROM heartbeats WHERE models = '{}' AND phase IN ('starting', 'loading')"
        " AND last_seen > clock_timestamp() - make_interval(secs => %s))",
        (FORGOTTEN_S,),
    ).fetchone()
    return Served(
        {model: frozenset(urls) for model, _, urls in rows},
        frozenset(model for model, is_live, _ in rows if is_live),
        unserved.awaited(db),
        is_loading,
    )
