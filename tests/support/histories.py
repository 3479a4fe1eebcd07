"""What clients saw of a service, checked against what one that never failed could have shown them. Pure.

As Jepsen does it: each call has a begin and an end. A call takes effect at some moment between the two, so whatever
ended before another call began must be visible to it; of calls that overlap either may have been first.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

IN_PROGRESS, CANCELLING = "BATCH_STATE_IN_PROGRESS", "BATCH_STATE_CANCELLING"


@dataclass(frozen=True)
class Seen:
    """A batch as a call returned it."""

    batch_id: str
    state: str
    completed: int
    failed: int
    total: int

    @property
    def has_ended(self) -> bool:
        return self.state not in (IN_PROGRESS, CANCELLING)

    @property
    def rank(self) -> int:
        """States in the order in which a batch takes them."""
        return 2 if self.has_ended else int(self.state == CANCELLING)


@dataclass(frozen=True)
class Call:
    """A call about the batch of a key; its times are monotonic.

    `begin_s` is that of the first attempt if earlier ones were answered by nobody: each may have taken effect. `seen`:
    what `create`, `get` and `cancel` returned; None: NOT_FOUND. `listed`: the ids that `list` returned. `answer`: what
    `result` returned for `custom_id`; None: NOT_FOUND.
    """

    kind: Literal["create", "get", "list", "result", "cancel", "delete"]
    begin_s: float
    end_s: float
    key: str = ""
    seen: Seen | None = None
    listed: frozenset[str] = field(default_factory=frozenset)
    custom_id: str = ""
    answer: str | None = None


def violations(history: Sequence[Call]) -> list[str]:
    """What no service that never fails could have shown, one sentence each."""
    by_key: dict[str, list[Call]] = defaultdict(list)
    for call in history:
        by_key[call.key].append(call)
    lists = by_key.pop("", [])
    found: list[str] = []
    keys_of: dict[str, set[str]] = defaultdict(set)
    for key, calls in by_key.items():
        ids = {call.seen.batch_id for call in calls if call.seen}
        if len(ids) > 1:
            found.append(f"{key} has several ids: {sorted(ids)}")
        for batch_id in ids:
            keys_of[batch_id].add(key)
        created_s = min((call.end_s for call in calls if call.kind == "create"), default=float("inf"))
        deletes = [call for call in calls if call.kind == "delete"]
        gone_s = min((call.end_s for call in deletes), default=float("inf"))
        may_be_gone_s = min((call.begin_s for call in deletes), default=float("inf"))
        for call in calls:
            must_be_there = created_s < call.begin_s and call.end_s < may_be_gone_s
            if call.kind in ("get", "cancel"):
                if must_be_there and call.seen is None:
                    found.append(f"{key} was not found {call.begin_s - created_s:.3f} s after it was created")
                if call.seen is not None and call.begin_s > gone_s:
                    found.append(f"{key} was found {call.begin_s - gone_s:.3f} s after it was deleted")
            if call.kind == "result" and call.answer is not None and call.begin_s > gone_s:
                found.append(f"{key} had a result {call.begin_s - gone_s:.3f} s after it was deleted")
        for listing in lists:
            is_listed = bool(ids & listing.listed)
            if created_s < listing.begin_s and listing.end_s < may_be_gone_s and not is_listed:
                found.append(f"{key} was not listed {listing.begin_s - created_s:.3f} s after it was created")
            if is_listed and listing.begin_s > gone_s:
                found.append(f"{key} was listed {listing.begin_s - gone_s:.3f} s after it was deleted")
        found += _went_back(key, [call for call in calls if call.seen])
        found += _changed_results(key, calls, may_be_gone_s)
    found += [f"{batch_id} was given to {sorted(keys)}" for batch_id, keys in keys_of.items() if len(keys) > 1]
    return found


def _went_back(key: str, calls: Sequence[Call]) -> Iterator[str]:
    """Counts and states only go forward, an ended batch stays as it is, and a cancelled one is not in progress."""
    cancelled_s = min((call.end_s for call in calls if call.kind == "cancel"), default=float("inf"))
    sizes = {call.seen.total for call in calls if call.seen}
    if len(sizes) > 1:
        yield f"{key} had different numbers of requests: {sorted(sizes)}"
    ends = {(seen.state, seen.completed, seen.failed) for call in calls if (seen := call.seen) and seen.has_ended}
    if len(ends) > 1:
        yield f"{key} ended in several ways: {sorted(ends)}"
    measures: dict[str, Callable[[Seen], int]] = {
        "state": lambda seen: seen.rank,
        "completed": lambda seen: seen.completed,
        "failed": lambda seen: seen.failed,
    }
    for name, measure in measures.items():
        for call, most in _with_most_before(calls, measure):
            assert call.seen is not None
            if measure(call.seen) < most:
                yield f"{key} went back: {name} was {most} before {call.seen}"
    for call in calls:
        if call.seen and call.seen.state == IN_PROGRESS and call.begin_s > cancelled_s:
            yield f"{key} was in progress {call.begin_s - cancelled_s:.3f} s after it was cancelled"


def _with_most_before(calls: Sequence[Call], measure: Callable[[Seen], int]) -> Iterator[tuple[Call, int]]:
    """Each call with the most that calls had returned which ended before it began."""
    moments = sorted(
        [(call.begin_s, 0, place) for place, call in enumerate(calls)]
        + [(call.end_s, 1, place) for place, call in enumerate(calls)]
    )
    most = 0
    for _, is_end, place in moments:
        seen = calls[place].seen
        assert seen is not None
        if is_end:
            most = max(most, measure(seen))
        else:
            yield calls[place], most


def _changed_results(key: str, calls: Sequence[Call], may_be_gone_s: float) -> Iterator[str]:
    """A result never changes, and stays until its batch is deleted."""
    by_id: dict[str, list[Call]] = defaultdict(list)
    for call in calls:
        if call.kind == "result":
            by_id[call.custom_id].append(call)
    for custom_id, reads in by_id.items():
        answers = {read.answer for read in reads} - {None}
        if len(answers) > 1:
            yield f"{key}: {custom_id} had {len(answers)} different results"
        first_s = min((read.end_s for read in reads if read.answer is not None), default=float("inf"))
        for read in reads:
            if read.answer is None and first_s < read.begin_s and read.end_s < may_be_gone_s:
                yield f"{key}: {custom_id} had no result {read.begin_s - first_s:.3f} s after it had one"
