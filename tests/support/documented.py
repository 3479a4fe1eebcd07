"""Calls made up from the OpenAPI document of OpenAI's door, each answer of which has to be as the document says.

Half of them are as the document says, half are wrong in one way or another.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import FlakyStrategyDefinition
from schemathesis import Case, GenerationMode
from schemathesis.checks import CHECKS
from schemathesis.schemas import BaseSchema

# What a call asks for, and which calls make sense together, is no affair of these.
CHECKED = [
    check
    for check in CHECKS.get_all()
    if check.__name__
    in (
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_headers_conformance",
        "response_schema_conformance",
        "negative_data_rejection",
    )
]
# Calls of a sequence.
STEPS = 8
TIMEOUT_S = 30

Seen = Counter[tuple[str, int]]

# Headers that the document does not name, and that something reads all the same. Nothing strips their values.
HEADERS = st.dictionaries(
    st.sampled_from(
        [
            *("x-request-id", "x-stainless-retry-count", "range", "if-range", "traceparent", "authorization", "cookie"),
            *(
                "accept",
                "accept-encoding",
                "origin",
                "user-agent",
                "openai-organization",
                "x-forwarded-for",
                "forwarded",
            ),
        ]
    ),
    st.sampled_from(["\xb2", "1", "bytes=0-", "bytes=-\xb2", "Bearer", "Bearer \xff", 'W/"a"', "null", "9" * 5000])
    | st.text(
        st.characters(min_codepoint=33, max_codepoint=255, exclude_categories=["Cc", "Zs"]), min_size=1, max_size=20
    ),
    max_size=2,
)

# Behind an id.
ENDINGS = st.just("") | st.sampled_from(["", "0" * 17, "0" * 19, "9" * 5000, "\xb2", "\0", " ", "/", "?", "-"])


def read(url: str) -> BaseSchema:
    """The document that is served there."""
    return schemathesis.openapi.from_url(url)


def _settings(examples: int, **more: Any) -> settings:
    return settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck), **more
    )


def call_each(schema: BaseSchema, real: Mapping[str, str], examples: int) -> Seen:
    """Calls each operation this often, half of the time with `real` ids, or with what looks like one.

    Returns how often each status came.
    """
    seen: Seen = Counter()

    def check(case: Case, is_real: bool, ending: str, headers: dict[str, str]) -> None:
        if is_real:
            for part in (case.path_parameters, case.body):
                if isinstance(part, dict):
                    part.update({name: real[name] + ending for name in part if name in real})
        response = case.call(timeout=TIMEOUT_S, headers=headers)
        seen[case.operation.label, response.status_code] += 1
        case.validate_response(response, checks=CHECKED)

    for operation in schema.get_all_operations():
        made = operation.ok()
        cases = made.as_strategy()
        if made.body or made.query:
            cases |= made.as_strategy(generation_mode=GenerationMode.NEGATIVE)
        _settings(examples)(given(case=cases, is_real=st.booleans(), ending=ENDINGS, headers=HEADERS)(check))()
    return seen


def call_in_turn(schema: BaseSchema, examples: int) -> Seen:
    """Makes this many sequences of calls that use what earlier ones have made. Returns how often each status came."""
    seen: Seen = Counter()
    failures: list[BaseException] = []
    done = 0
    base: Any = schema.as_state_machine()

    class Sequence(base):  # type: ignore[misc]
        def get_call_kwargs(self, case: Case) -> dict[str, Any]:
            return {"timeout": TIMEOUT_S}

        def after_call(self, response: Any, case: Case) -> None:
            seen[case.operation.label, response.status_code] += 1

        def validate_response(self, response: Any, case: Case, *_: object, **__: object) -> None:
            try:
                case.validate_response(response, checks=CHECKED)
            except BaseException as failure:
                failures.append(failure)
                raise

        def teardown(self) -> None:
            nonlocal done
            done += 1
            super().teardown()

    # The server keeps what earlier sequences made: the same choices may meet other answers, and other choices then.
    while done < examples:
        try:
            Sequence.run(settings=_settings(examples - done, stateful_step_count=STEPS, phases=[Phase.generate]))
        except FlakyStrategyDefinition:
            if failures:
                raise failures[0] from None
    return seen
