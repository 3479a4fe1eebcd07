"""Which of the requests that wait here are for idle workers. Pure."""

from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from itertools import groupby

from service.db.chunks import Request
from service.db.sharing import Wish
from service.worker.wakeup import IDLE_S

# A worker that is still idle asks again every second.
WISH_S = 2.0
# For so long after there was too little for all a worker takes no more than it can begin at once.
SCARCE_S = 1.0
# Between two wishes, unless something was claimed meanwhile: in a fleet all others hear each of them.
ASK_INTERVAL_S = 0.2


@dataclass
class _Asked:
    """A wish, and how many requests are still to be given for it; None: not decided yet."""

    wish: Wish
    until_s: float
    due: int | None = None


@dataclass
class Sharing:
    """What others wish for. All times are of the runner's monotonic clock."""

    _asked: dict[str, _Asked] = field(default_factory=dict)
    _scarce_until_s: float = float("-inf")

    def wished(self, wish: Wish, now_s: float) -> None:
        """Notes a wish, which replaces an earlier one of the same worker."""
        self._asked[wish.worker_id] = _Asked(wish, now_s + WISH_S)

    def note_scarcity(self, now_s: float) -> None:
        """There was nothing left to claim while others held some, or some of what is held was given."""
        self._scarce_until_s = now_s + SCARCE_S

    def is_scarce(self, now_s: float) -> bool:
        """True while taking more than can begin at once would take it from others."""
        return now_s < self._scarce_until_s

    def batches(self, now_s: float) -> Set[int]:
        """The batches of which others wish for requests."""
        self._asked = {name: each for name, each in self._asked.items() if now_s < each.until_s and each.due != 0}
        return frozenset().union(*(each.wish.batches for each in self._asked.values()))

    def is_wished(self, request: Request) -> bool:
        """True if somebody wishes for the request."""
        return any(each.wish.covers(request) for each in self._asked.values())

    def wanted(self, waiting: int) -> int:
        """How many requests to give, of those that wait: to each who wished what it can begin, or an equal part.

        More than it can begin, because a fast worker would otherwise have to ask again and again.
        """
        for each in self._asked.values():
            if each.due is None:
                each.due = max(each.wish.room, waiting // (len(self._asked) + 1))
        return min(waiting, sum(each.due or 0 for each in self._asked.values()))

    def parts(self, requests: Sequence[Request]) -> list[list[Request]]:
        """Divides requests among those who wished. Each part is of one chunk."""
        rest, parts = list(requests), []
        for each in self._asked.values():
            able = [request for request in rest if each.wish.covers(request)][: each.due]
            each.due = (each.due or 0) - len(able)
            parts += _by_chunk(able)
            taken = {(request.batch_id, request.index) for request in able}
            rest = [request for request in rest if (request.batch_id, request.index) not in taken]
        return parts + _by_chunk(rest)


def look_again_s(looked_s: float, asked_s: float) -> float:
    """After how many seconds to look again, when a look found nothing to claim and others were last asked at `asked_s`.

    Another worker may have taken what was given for that wish, so one that came too early to ask again asks soon.
    """
    passed_s = looked_s - asked_s
    return ASK_INTERVAL_S - passed_s if 0 < passed_s < ASK_INTERVAL_S else IDLE_S


def _by_chunk(requests: Sequence[Request]) -> list[list[Request]]:
    ordered = sorted(requests, key=lambda request: request.chunk_id)
    return [list(part) for _, part in groupby(ordered, key=lambda request: request.chunk_id)]
