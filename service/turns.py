"""Which batches are pulled forward, so that they end before their completion windows do. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# How much longer than estimated the work may take, and how long results may take to be stored.
MARGIN = 1.25
SPARE_S = 30.0
# Of all turns, those that may be pulled forward: `take_turns` leaves one in ten to the fair order.
PULLED = 0.9


@dataclass(frozen=True)
class Expiring:
    """An open batch with a completion window. `needs_s`: how long its requests without a result take alone."""

    batch_id: int
    left_s: float
    needs_s: float

    @property
    def slack_s(self) -> float:
        """The time left for what is left."""
        return self.left_s - self.needs_s


def pulled_forward(batches: Iterable[Expiring], busy_s: float) -> list[int]:
    """The ids of the batches whose turn has to come now, in the order in which they run.

    `busy_s`: how long what is in flight takes. As few others as possible are held up: nothing is pulled forward as long
    as all windows would still be met by beginning later. What cannot be met any more is not pulled forward, and of
    batches that cannot all be met the largest ones are left out.
    """
    kept = _feasible(batches, busy_s)
    due = critical = 0
    total_s = busy_s
    for due, batch in enumerate(kept, 1):
        total_s += batch.needs_s / PULLED
        if batch.left_s <= total_s * MARGIN + SPARE_S:
            critical = due
    return [batch.batch_id for batch in sorted(kept[:critical], key=lambda batch: (batch.slack_s, batch.batch_id))]


def _feasible(batches: Iterable[Expiring], busy_s: float) -> Sequence[Expiring]:
    """As many of them as can end in time, by the end of their windows (Moore and Hodgson)."""
    kept: list[Expiring] = []
    total_s = busy_s
    for batch in sorted(batches, key=lambda batch: (batch.left_s, batch.batch_id)):
        kept.append(batch)
        total_s += batch.needs_s
        # With the same margin to the other side: an estimate that is too high must not give a batch up.
        while kept and total_s > batch.left_s * MARGIN:
            largest = max(kept, key=lambda batch: batch.needs_s)
            kept.remove(largest)
            total_s -= largest.needs_s
    return kept
