"""What benchmarks store by themselves is what the server stores."""

from benchmarks.claims import storage
from service.db.connection import Database


def test_storage_stores_as_an_upload_does(database: Database) -> None:
    """The benchmark of storage writes requests that workers claim and answer: docs/capacity.md has its figures."""
    assert database.call(storage.store, 3) > 0
    assert storage.run(database, 300) >= 3 * 290
