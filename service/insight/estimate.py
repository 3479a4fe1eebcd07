"""When a batch will end. Pure: by the tokens a second of its last results, and the tokens that are left of it.

Requests take the place of tokens where these are not known: results without usage, or of an earlier version.
"""

from collections.abc import Sequence

from service.db.standings import Cost, Mark, Work

# No estimate before this part of the requests is done.
LEAST_DONE = 0.02
# Speed is measured over at least this long, and over so many times what workers hold, as requests often finish
# together.
WINDOW_S = 120.0
GENERATIONS = 4
# When nothing came for this part of the window, the batch has become slower than it was.
SILENCE = 0.25


def course(marks: Sequence[Mark], done: int, started_s: float) -> Sequence[Mark]:
    """The marks of a batch with its begin as the last one. `started_s`: seconds since its first request was taken."""
    return [*marks, Mark(done, started_s, 0)] if marks else []


def left(marks: Sequence[Mark], total: int, cost: Cost) -> Work:
    """What is left of a batch, given its course. Estimates count for what they turned out to be worth."""
    done = marks[-1].count if marks else 0
    used = (marks[0].tokens or 0) if marks else 0
    worth = used / cost.done if cost.done > 0 else 0.0
    return Work(total - done, max(0.0, cost.total - cost.done) * worth)


def per_s(marks: Sequence[Mark], held: int = 0) -> Work:
    """What is done per second, over the last minutes or since the last of the marks; nothing if that is not known."""
    if not marks:
        return Work()
    last, begin = marks[0], _begin(marks, held)
    window_s = begin.age_s - last.age_s
    if window_s <= 0:
        return Work()
    tokens = 0 if last.tokens is None or begin.tokens is None else last.tokens - begin.tokens
    return Work(begin.count / window_s, tokens / window_s)


def left_s(marks: Sequence[Mark], left: Work, held: int) -> float | None:
    """Seconds until a batch that moves has ended, given its course; None: too little is known."""
    takes_s = _takes_s(left, per_s(marks, held))
    if takes_s is None or not _is_enough(marks, left):
        return None
    silent_s, window_s = marks[0].age_s, _begin(marks, held).age_s - marks[0].age_s
    if silent_s > SILENCE * window_s:
        return takes_s * (window_s + silent_s) / window_s
    return max(0.0, takes_s - silent_s)


def left_after_s(marks: Sequence[Mark], left: Work, before: Work, before_per_s: Work) -> float | None:
    """Seconds until a batch has ended that waits for others, which go at this speed, and then goes on as fast as it
    went; None: too little is known."""
    others_s, own_s = _takes_s(before, before_per_s), _takes_s(left, per_s(marks))
    if others_s is None or own_s is None or not _is_enough(marks, left):
        return None
    return others_s + own_s


def _is_enough(marks: Sequence[Mark], left: Work) -> bool:
    done = marks[-1].count if marks else 0
    return done >= LEAST_DONE * (done + left.requests)


def _takes_s(work: Work, speed: Work) -> float | None:
    if work.tokens > 0 and speed.tokens > 0:
        return work.tokens / speed.tokens
    return work.requests / speed.requests if speed.requests > 0 else None


def _begin(marks: Sequence[Mark], held: int) -> Mark:
    """Where the shortest window begins that is long enough; it ends with the last result."""
    for mark in marks[1:]:
        if mark.age_s - marks[0].age_s >= WINDOW_S and mark.count >= GENERATIONS * held:
            return mark
    return marks[-1]
