"""Logs once when batches wait for models that no worker serves any more, and once when one does again."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from service.api import messages
from service.db.unserved import Unserved
from service.telemetry import logs

# Batches that an event names.
NAMED = 10

# A worker that is restarted is gone for a moment. With the 8 s at most after which a link is lost and up to two rounds
# of housekeeping until it has lasted, a host that lost power is reported within 15 s.
LASTING_S = 4.0

log = logs.get("housekeeping")


@dataclass
class UnservedLog:
    """Keeps the models that it has reported, and since when others are unserved."""

    _reported: set[tuple[str, ...]] = field(default_factory=set)
    _since_s: dict[tuple[str, ...], float] = field(default_factory=dict)

    def note(self, found: Sequence[Unserved], now_s: float) -> None:
        """Takes what is unserved now, by a monotonic clock."""
        self._since_s = {one.models: self._since_s.get(one.models, now_s) for one in found}
        for one in found:
            if one.models not in self._reported and now_s - self._since_s[one.models] >= LASTING_S:
                self._reported.add(one.models)
                log.warning(
                    "models_unserved",
                    models=one.models,
                    batches=len(one.batches),
                    first=[messages.batch_name(batch_id) for batch_id in one.batches[:NAMED]],
                    age_s=round(one.age_s),
                )
        now = {one.models for one in found}
        for models in sorted(self._reported - now):
            log.info("models_not_waited_for", models=models)
        self._reported &= now
