"""Every trigger rule over every combination of up to three upstream instances, and the table of Airflow's outcomes."""

from __future__ import annotations

from itertools import combinations_with_replacement, product

import pytest

from dflow.core.errors import DagDefinitionError
from dflow.core.states import TaskState
from dflow.core.trigger_rules import TRIGGER_RULES, Outcome, Upstream, evaluate, rule_for
from tests.property import reference_planner as reference

LETTERS = {"s": "success", "f": "failed", "u": "upstream_failed", "k": "skipped", "r": "removed", ".": "running"}
OUTCOMES = {"RUN": "run", "WAIT": "wait", "SKIP": "skip", "UF": "upstream_failed"}


def counts(states: list[tuple[str, bool]]) -> Upstream:
    up = Upstream(total=len(states), setups=sum(is_setup for _, is_setup in states))
    for state, is_setup in states:
        if state != "running":
            up.add(TaskState(state), 1, is_setup=is_setup)
    return up


@pytest.mark.parametrize("rule", TRIGGER_RULES)
def test_every_combination_equals_the_reference(rule: str) -> None:
    kinds = list(product(LETTERS.values(), [False, True]))
    for size in range(5):
        for states in combinations_with_replacement(kinds, size):
            got = evaluate(TRIGGER_RULES[rule], counts(list(states)))
            assert got.value == reference.outcome(rule, list(states)), states


# success, failed, upstream_failed, sKipped, removed, "." = not ended; capitals in the last column are setups
TABLE = """
all_success                 | ss RUN | s. WAIT | f. UF | u. UF | k. SKIP | fk UF | sr RUN
all_failed                  | ff RUN | fu RUN | f. WAIT | s. SKIP | k. SKIP | fr RUN
all_done                    | sfuk RUN | s. WAIT | kr RUN
all_done_min_one_success    | sf RUN | s. WAIT | k. SKIP | sk SKIP | ff UF | fu UF | f. WAIT
all_done_setup_success      | sf RUN | s. WAIT | Sf RUN | SF RUN | Kk SKIP | KK SKIP | Fs UF | FK UF | Uk UF | K. WAIT
one_success                 | s. RUN | f. WAIT | kk SKIP | fk UF | ff UF | s RUN
one_failed                  | f. RUN | u. RUN | s. WAIT | sk SKIP | ss SKIP
one_done                    | s. RUN | f. RUN | k. WAIT | u. WAIT | kk SKIP | uk SKIP
none_failed                 | sk RUN | kk RUN | s. WAIT | f. UF | u. UF
none_failed_min_one_success | sk RUN | s. WAIT | kk SKIP | f. UF | uk UF | kr UF
none_skipped                | sf RUN | s. WAIT | k. SKIP
all_skipped                 | kk RUN | k. WAIT | s. SKIP | f. SKIP | u. SKIP
always                      | .. RUN | fu RUN
"""
CASES = [
    (row.split("|")[0].strip(), *case.split()) for row in TABLE.strip().splitlines() for case in row.split("|")[1:]
]


@pytest.mark.parametrize(("rule", "upstream", "outcome"), CASES)
def test_the_table_of_airflow(rule: str, upstream: str, outcome: str) -> None:
    states = [(LETTERS[letter.lower()], letter.isupper()) for letter in upstream]
    assert evaluate(rule_for(rule), counts(states)).value == OUTCOMES[outcome]


def test_the_table_has_every_rule() -> None:
    assert {rule for rule, *_ in CASES} == set(TRIGGER_RULES)
    assert len(TRIGGER_RULES) == 13


@pytest.mark.parametrize("rule", TRIGGER_RULES)
def test_without_upstream_everything_runs(rule: str) -> None:
    assert evaluate(TRIGGER_RULES[rule], Upstream()) is Outcome.RUN


@pytest.mark.parametrize("rule", TRIGGER_RULES)
def test_no_rule_waits_once_all_upstream_has_ended(rule: str) -> None:
    ended = [(letter, is_setup) for letter in "sfukr" for is_setup in (False, True)]
    for states in combinations_with_replacement(ended, 4):
        up = counts([(LETTERS[letter], is_setup) for letter, is_setup in states])
        assert evaluate(TRIGGER_RULES[rule], up) is not Outcome.WAIT


def test_unknown_rules_are_refused_with_the_nearest_one() -> None:
    with pytest.raises(DagDefinitionError, match="did you mean 'all_done'"):
        rule_for("all_don")
    with pytest.raises(DagDefinitionError, match="use one of all_success"):
        rule_for("xyz")
