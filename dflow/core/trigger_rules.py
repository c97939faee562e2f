"""The 13 trigger rules: one small pure function each, from counts of the direct upstream task instances to an outcome.

The outcomes are Airflow 3's (``trigger_rule_dep.py``). Two things hold for every rule and are relied on by the
planner: a task without upstream task instances runs at once, and once all upstream task instances have ended no rule
waits. Where Airflow would wait for ever on a removed upstream instance, the removed one is ignored.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from dflow.core.errors import DagDefinitionError
from dflow.core.states import TaskState


class Outcome(Enum):
    """What a trigger rule says about a task instance that has not started."""

    RUN = "run"
    WAIT = "wait"
    SKIP = "skip"
    UPSTREAM_FAILED = "upstream_failed"


@dataclass(slots=True, kw_only=True)
class Upstream:
    """Counts of a task's direct upstream task instances, by end state (the fields are named after the states).

    Not frozen: the planner counts in place, one out-edge at a time.
    """

    total: int = 0
    success: int = 0
    failed: int = 0
    upstream_failed: int = 0
    skipped: int = 0
    removed: int = 0
    setups: int = 0  # those of `total` that belong to setup tasks
    setup_success: int = 0
    setup_skipped: int = 0

    def add(self, state: TaskState, count: int, *, is_setup: bool) -> None:
        """Count ``count`` more (or fewer) instances in an end state."""
        setattr(self, state.value, getattr(self, state.value) + count)
        if is_setup and state is TaskState.SUCCESS:
            self.setup_success += count
        elif is_setup and state is TaskState.SKIPPED:
            self.setup_skipped += count

    @property
    def failures(self) -> int:
        """Failed or upstream_failed ones."""
        return self.failed + self.upstream_failed

    @property
    def is_done(self) -> bool:
        """Whether all have ended, in any way."""
        return self.success + self.failed + self.upstream_failed + self.skipped + self.removed >= self.total

    def are_all(self, count: int) -> bool:
        """Whether ``count`` is everything there is, removed ones aside."""
        return count + self.removed >= self.total


Rule = Callable[[Upstream], Outcome]


def _all_success(up: Upstream) -> Outcome:
    if up.failures:
        return Outcome.UPSTREAM_FAILED
    if up.skipped:
        return Outcome.SKIP
    return Outcome.RUN if up.are_all(up.success) else Outcome.WAIT


def _all_failed(up: Upstream) -> Outcome:
    if up.success or up.skipped:
        return Outcome.SKIP
    return Outcome.RUN if up.are_all(up.failures) else Outcome.WAIT


def _all_done(up: Upstream) -> Outcome:
    return Outcome.RUN if up.is_done else Outcome.WAIT


def _all_done_min_one_success(up: Upstream) -> Outcome:
    if up.skipped:
        return Outcome.SKIP
    if not up.is_done:
        return Outcome.WAIT
    return Outcome.RUN if up.success else Outcome.UPSTREAM_FAILED


def _all_done_setup_success(up: Upstream) -> Outcome:
    if not up.is_done:
        return Outcome.WAIT
    if not up.setups or up.setup_success:
        return Outcome.RUN
    return Outcome.SKIP if up.setup_skipped >= up.setups else Outcome.UPSTREAM_FAILED


def _one_success(up: Upstream) -> Outcome:
    if up.success:
        return Outcome.RUN
    if not up.is_done:
        return Outcome.WAIT
    return Outcome.SKIP if up.skipped == up.total else Outcome.UPSTREAM_FAILED


def _one_failed(up: Upstream) -> Outcome:
    if up.failures:
        return Outcome.RUN
    return Outcome.SKIP if up.is_done else Outcome.WAIT


def _one_done(up: Upstream) -> Outcome:
    if up.success or up.failed:  # an upstream_failed one never ran, so it does not count as done here
        return Outcome.RUN
    return Outcome.SKIP if up.is_done else Outcome.WAIT


def _none_failed(up: Upstream) -> Outcome:
    if up.failures:
        return Outcome.UPSTREAM_FAILED
    return Outcome.RUN if up.is_done else Outcome.WAIT


def _none_failed_min_one_success(up: Upstream) -> Outcome:
    if up.failures:
        return Outcome.UPSTREAM_FAILED
    if not up.is_done:
        return Outcome.WAIT
    if up.success:
        return Outcome.RUN
    return Outcome.SKIP if up.skipped == up.total else Outcome.UPSTREAM_FAILED


def _none_skipped(up: Upstream) -> Outcome:
    if up.skipped:
        return Outcome.SKIP
    return Outcome.RUN if up.is_done else Outcome.WAIT


def _all_skipped(up: Upstream) -> Outcome:
    if up.success or up.failures:
        return Outcome.SKIP
    return Outcome.RUN if up.are_all(up.skipped) else Outcome.WAIT


def _always(_up: Upstream) -> Outcome:
    return Outcome.RUN


TRIGGER_RULES: Final[dict[str, Rule]] = {
    "all_success": _all_success,
    "all_failed": _all_failed,
    "all_done": _all_done,
    "all_done_min_one_success": _all_done_min_one_success,
    "all_done_setup_success": _all_done_setup_success,
    "one_success": _one_success,
    "one_failed": _one_failed,
    "one_done": _one_done,
    "none_failed": _none_failed,
    "none_failed_min_one_success": _none_failed_min_one_success,
    "none_skipped": _none_skipped,
    "all_skipped": _all_skipped,
    "always": _always,
}


def rule_for(name: str) -> Rule:
    """Return the rule of that name; raises DagDefinitionError with the nearest name when there is none."""
    try:
        return TRIGGER_RULES[name]
    except KeyError:
        near = difflib.get_close_matches(name, TRIGGER_RULES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(TRIGGER_RULES)}."
        raise DagDefinitionError(f"unknown trigger rule {name!r}; {hint}") from None


def evaluate(rule: Rule, up: Upstream) -> Outcome:
    """Return what ``rule`` says; a task without upstream task instances runs whatever its rule, as in Airflow."""
    return rule(up) if up.total else Outcome.RUN
