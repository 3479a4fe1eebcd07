"""When a batch will end. Pure: by the speed at which its last results came."""

from collections.abc import Sequence

from service.db.standings import Mark

# No estimate before this part of the requests is done.
LEAST_DONE = 0.02
# Speed is measured over at least this long, and over so many times what workers hold, as requests often finish
# together.
WINDOW_S = 120.0
GENERATIONS = 4
# When nothing came for this part of the window, the batch has become slower than it was.
SILENCE = 0.25


def per_s(marks: Sequence[Mark], done: int, started_s: float, held: int) -> float:
    """Results a second over the last minutes; 0 if there is none. `started_s`: seconds since the first was taken."""
    counted, window_s = _window(marks, done, started_s, held)
    return counted / window_s if window_s > 0 else 0.0


def left_s(marks: Sequence[Mark], total: int, done: int, started_s: float, held: int) -> float | None:
    """Seconds until a batch that moves has ended; None: too little is known."""
    if not marks or done < LEAST_DONE * total:
        return None
    speed = per_s(marks, done, started_s, held)
    if speed <= 0:
        return None
    silent_s = marks[0].age_s
    _, window_s = _window(marks, done, started_s, held)
    if silent_s > SILENCE * window_s:
        speed = speed * window_s / (window_s + silent_s)
        silent_s = 0.0
    return max(0.0, (total - done) / speed - silent_s)


def left_after_s(
    marks: Sequence[Mark], total: int, done: int, started_s: float, before: int, before_per_s: float
) -> float | None:
    """Seconds until a batch has ended that waits for `before` requests of others, which come at this speed, and then
    goes on as fast as it went; None: too little is known."""
    speed = per_s(marks, done, started_s, 0)
    if done < LEAST_DONE * total or speed <= 0 or before_per_s <= 0:
        return None
    return before / before_per_s + (total - done) / speed


def _window(marks: Sequence[Mark], done: int, started_s: float, held: int) -> tuple[int, float]:
    """The results of the shortest window that is long enough, and its seconds; it ends with the last result."""
    last_s = marks[0].age_s if marks else 0.0
    for mark in marks[1:]:
        if mark.age_s - last_s >= WINDOW_S and mark.count >= GENERATIONS * held:
            return mark.count, mark.age_s - last_s
    return done, started_s - last_s
