"""Decides from evidence and recorded events: the step that guard and dry run share. Pure."""

from dataclasses import replace

from service.db.recoveries import Event
from watchdog.policy import Decision, Evidence, Intent, Limits, Memory, Step, decide
from watchdog.record.history import History


def recall(
    memory: Memory, known: History | None, history: History, time_s: float, limits: Limits, *, is_more_known: bool
) -> Memory:
    """Adds to the memory what `history` has and `known` had not: others' restarts, budget resets.

    `known` is None at first. `memory` already counts our own restarts, so those of the history are taken over only
    then, and when `is_more_known`.
    """
    if is_given_back(known, history):
        memory = memory.with_budget()
    if known is None or is_more_known:
        memory = memory.with_past(
            history.restart_ages_s,
            history.has_given_up,
            time_s,
            limits,
            history.gave_up_settings,
            history.failed_starts,
        )
    return memory


def is_given_back(known: History | None, history: History) -> bool:
    """True when an operator has reset the budget since `known`."""
    return known is not None and history.last_reset != known.last_reset


def judge(
    evidence: Evidence, history: History | None, intent: Event | None, memory: Memory, limits: Limits
) -> tuple[Evidence, Decision, Memory]:
    """Decides from evidence and recorded events. Returns the evidence with intent and pause added.

    `intent` is the unfinished restart. As with `decide`, the memory returned with a RESTART counts it.
    """
    evidence = replace(
        evidence,
        intent=None if intent is None else Intent(str(intent.key), Step(intent.step)),
        pause_left_s=0.0 if history is None else history.pause_left_s,
    )
    decision, memory = decide(evidence, memory, limits)
    return evidence, decision, memory
