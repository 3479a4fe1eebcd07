"""The checker of histories sees each way in which a service can contradict itself, and nothing else."""

from dataclasses import replace

import pytest

from tests.support.histories import CANCELLING, IN_PROGRESS, Call, Seen, violations

RUNNING = Seen("batch_1", IN_PROGRESS, 2, 0, 9)
DONE = Seen("batch_1", "BATCH_STATE_COMPLETED", 9, 0, 9)

# A batch is created, read, listed, answered and deleted.
RIGHT = (
    Call("create", 0, 2, "a", replace(RUNNING, completed=0)),
    Call("get", 3, 4, "a", RUNNING),
    Call("list", 3, 4, listed=frozenset({"batch_1"})),
    Call("result", 4, 5, "a", custom_id="c1", answer="x"),
    Call("get", 5, 6, "a", DONE),
    Call("delete", 7, 9, "a"),
    Call("get", 10, 11, "a"),
    Call("list", 10, 11),
    Call("result", 10, 11, "a", custom_id="c1"),
)


def test_a_right_history() -> None:
    """What a service without failures shows is right, also while calls overlap writes, in whichever order they are."""
    assert violations(RIGHT) == []
    during = [
        Call("get", 1, 1.5, "a"),
        Call("get", 1, 2.5, "a", RUNNING),
        Call("list", 1, 2.5),
        Call("get", 7, 8, "a"),
        Call("get", 8, 9.5, "a", DONE),
        Call("list", 8, 9.5, listed=frozenset({"batch_1"})),
        # It began before the end was seen.
        Call("get", 4.5, 6.5, "a", RUNNING),
    ]
    assert violations([*RIGHT, *during]) == []


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (Call("get", 3, 4, "a"), "a was not found 1.000 s after it was created"),
        (Call("list", 3, 4), "a was not listed 1.000 s after it was created"),
        (Call("get", 10, 11, "a", DONE), "a was found 1.000 s after it was deleted"),
        (Call("list", 10, 11, listed=frozenset({"batch_1"})), "a was listed 1.000 s after it was deleted"),
        (Call("result", 10, 11, "a", custom_id="c1", answer="x"), "a had a result 1.000 s after it was deleted"),
        (Call("get", 3, 4, "a", replace(RUNNING, batch_id="batch_2")), "a has several ids: ['batch_1', 'batch_2']"),
        (Call("get", 3, 4, "b", RUNNING), "batch_1 was given to ['a', 'b']"),
        (Call("get", 3, 4, "a", replace(RUNNING, total=8)), "a had different numbers of requests: [8, 9]"),
        (Call("get", 6.2, 6.5, "a", RUNNING), "a went back: completed was 9 before"),
        (Call("get", 6.2, 6.5, "a", replace(DONE, state=CANCELLING)), "a went back: state was 2 before"),
        (Call("get", 3.5, 4.5, "a", replace(RUNNING, failed=1)), "a went back: failed was 1 before"),
        (Call("get", 6.2, 6.5, "a", replace(DONE, state="BATCH_STATE_CANCELLED")), "a ended in several ways: "),
        (Call("result", 4, 5, "a", custom_id="c1", answer="y"), "a: c1 had 2 different results"),
        (Call("result", 6, 6.5, "a", custom_id="c1"), "a: c1 had no result 1.000 s after it had one"),
        (Call("cancel", 2.2, 2.5, "a", replace(RUNNING, state=CANCELLING)), "a was in progress 0.500 s after"),
    ],
)
def test_a_contradiction(call: Call, said: str) -> None:
    """A single call that contradicts the others is found, and the sentence says how."""
    found = violations([*RIGHT, call])
    assert any(each.startswith(said) for each in found), found
