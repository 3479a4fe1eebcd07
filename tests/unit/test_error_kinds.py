"""Failures grouped for a person: what counts as one kind, and what is said of each."""

import pytest

from service.api import error_kinds
from service.db.failures import MAX_COUNTED, Failures, Text

LONG = '{"error": {"message": "This model\'s maximum context length is %d tokens.", "type": "BadRequestError"}}'


@pytest.mark.parametrize(
    ("message", "shape"),
    [
        ("maximum context length is 4096 tokens, got 5012.5", "maximum context length is N tokens, got N"),
        ("The model's limit; the user's 'abc' is no number", "The model's limit; the user's … is no number"),
        ('invalid value "x 1" for `top_p`', "invalid value … for …"),
        ("request 3f2a9c81-77aa of chatcmpl-9e107d9d372bb682 failed", "request N of chatcmpl-N failed"),
        ("plain words, decade, 'open", "plain words, decade, 'open"),
    ],
)
def test_what_differs_between_requests_is_left_out(message: str, shape: str) -> None:
    """Numbers, ids and quoted texts do not make kinds; apostrophes are no quotes, and words of hex letters no ids."""
    assert error_kinds.without_details(message) == shape


def test_kinds_are_counted_with_an_example() -> None:
    """Texts of one kind are added up under the example of the most frequent; the most frequent kind is first."""
    texts = [
        Text(5, "batch_expired", None, "too late", "c9"),
        Text(3, None, 400, LONG % 4096, "c1"),
        Text(4, None, 400, LONG % 8192, "c2"),
        Text(1, None, 500, "not JSON", "c3"),
    ]
    answer = error_kinds.response(Failures(texts, 20), 20)
    assert [(kind.code, kind.status_code, kind.type, kind.count) for kind in answer.kinds] == [
        ("", 400, "BadRequestError", 7),
        ("batch_expired", 0, "", 5),
        ("", 500, "", 1),
    ]
    first = answer.kinds[0]
    assert first.message == "This model's maximum context length is N tokens."
    assert (first.example_custom_id, first.example_message) == (
        "c1",
        "This model's maximum context length is 4096 tokens.",
    )
    assert (answer.other_count, answer.is_partial) == (7, False)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('{"error": {"message": "m", "type": "T"}}', ("T", "m")),
        ('{"message": "m"}', ("", "m")),
        ('{"error": {"type": "T", "message": "it begins \\"and', ("T", 'it begins \\"and')),
        ('{"detail": 1}', ("", '{"detail": 1}')),
        ("[1]", ("", "[1]")),
    ],
)
def test_whatever_a_body_is_it_says_something(body: str, said: tuple[str, str]) -> None:
    """An error in either form, one that was cut, and what is none of vLLM's."""
    assert error_kinds.said(Text(1, None, 400, body, "c")) == said


def test_counts_are_of_all_unless_it_says_so() -> None:
    """Kinds beyond the most frequent are counted together, and failures beyond the bound are mentioned."""
    texts = [Text(1, f"CODE_{'ABCDEFGHIJ'[i // 10]}{'ABCDEFGHIJ'[i % 10]}", None, "m", "c") for i in range(60)]
    answer = error_kinds.response(Failures(texts, MAX_COUNTED), MAX_COUNTED + 1)
    assert (len(answer.kinds), answer.other_count, answer.is_partial) == (50, MAX_COUNTED - 50, True)
    assert not error_kinds.response(Failures(texts, MAX_COUNTED), MAX_COUNTED).is_partial
