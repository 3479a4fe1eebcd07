"""The Prometheus gauges of OpenAI's door: files, and batches that wait to be checked."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import peewee
from prometheus_client.core import GaugeMetricFamily, Metric

from service.db import file_batches, files
from service.db.availability import DATABASE_ERRORS
from service.db.connection import Database
from service.telemetry.metrics import Fresh, Scraped

# Postgres is queried no more often than this, however many scrapers there are.
FRESH_S = 5.0
# Prometheus waits 10 s for an answer.
TIMEOUT_S = 2.0


@dataclass(eq=False)
class HttpCollector(Scraped):
    """`database` is used for nothing else and has a short timeout. While Postgres is away, files are left out."""

    database: Database
    _stored: Fresh[tuple[int, int, int, float]] = field(init=False)

    def __post_init__(self) -> None:
        self._stored = Fresh(lambda: self.database.call(_take), DATABASE_ERRORS, FRESH_S)

    def collect(self) -> Iterator[Metric]:
        """With one query every FRESH_S at most."""
        found = self._stored.get()
        yield GaugeMetricFamily("vllm_batch_database_up", "1: Postgres answers.", int(found is not None))
        if found is None:
            return
        count, size, waiting, age_s = found
        yield GaugeMetricFamily("vllm_batch_files", "Files stored, also those that are still arriving.", count)
        yield GaugeMetricFamily("vllm_batch_file_bytes", "Bytes of the files stored.", size)
        yield GaugeMetricFamily("vllm_batch_unchecked_batches", "Batches whose file waits to be checked.", waiting)
        yield GaugeMetricFamily(
            "vllm_batch_unchecked_age_seconds", "Age of the oldest batch whose file waits to be checked.", age_s
        )


def _take(db: peewee.PostgresqlDatabase) -> tuple[int, int, int, float]:
    return (*files.totals(db), *file_batches.waiting(db))
