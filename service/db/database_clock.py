"""Whether leases that have run out, and heartbeats that are old, show that somebody is gone. Pure."""

from dataclasses import dataclass

# A smaller jump, as a fraction of a lease, is harmless: all renew before half of a lease has passed.
TOLERANCE = 0.25


@dataclass
class DatabaseClock:
    """Compares the database's clock, by which leases expire, with a monotonic one.

    It jumps if it is set, or another server takes over. For `lease_s` after a jump there are leases from before it, and
    their end does not show that the holder is gone. Nor does it after an outage of Postgres, which may have been one
    for all: the others may need a little longer to come back. What begins is like what comes back.
    """

    lease_s: float
    # Looks come at least this often, unless this process or Postgres was held up.
    gap_s: float

    _offset_s: float | None = None
    _looked_s: float = 0.0
    _since_s: float = 0.0

    def is_steady(self, database_s: float, now_s: float) -> bool:
        """Returns True once neither a jump of the clock, which shows `database_s` now, nor an outage was seen for
        `lease_s`.
        """
        offset_s = database_s - now_s
        is_first = self._offset_s is None or now_s - self._looked_s > self.gap_s
        if is_first or abs(offset_s - (self._offset_s or 0.0)) > TOLERANCE * self.lease_s:
            self._since_s = now_s
        self._offset_s, self._looked_s = offset_s, now_s
        return now_s - self._since_s >= self.lease_s

    def lost(self) -> None:
        """Notes that Postgres did not answer."""
        self._offset_s = None
