"""Hypothesis strategies for the values of the core: specs of every shape for serialization, DAGs for the planner."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from typing import Any, Union, get_args, get_origin, get_type_hints

from hypothesis import strategies as st

from dflow.core.spec import DagSpec, TaskSpec
from dflow.core.trigger_rules import TRIGGER_RULES

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
POSITIVE = st.floats(min_value=1e-9, max_value=1e30)
INT32 = st.integers(-(2**31), 2**31 - 1)
INSTANTS = st.datetimes(datetime(1000, 1, 1), timezones=st.just(UTC))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)

# What a field's type does not say. Everything else follows from the type, so a new field is covered from its first day
# (and fails the test of the JSON Schema until it is in there).
CONSTRAINED: dict[str, st.SearchStrategy[Any]] = {
    "dag_id": TEXT.filter(bool),
    "task_id": TEXT.filter(bool),
    "group_id": TEXT.filter(bool),
    "kind": st.sampled_from(["none", "once", "continuous", "cron", "delta"]),
    "trigger_rule": st.sampled_from(sorted(TRIGGER_RULES)),
    "weight_rule": st.sampled_from(["downstream", "upstream", "absolute"]),
    "retries": st.integers(0, 10**6),
    "retry_delay_seconds": st.just(0.0) | POSITIVE,
    "retry_exponential_backoff": st.just(0.0) | POSITIVE,
    "max_retry_delay_seconds": st.none() | POSITIVE,
    "execution_timeout_seconds": st.none() | POSITIVE,
    "dagrun_timeout_seconds": st.none() | POSITIVE,
    "interval_seconds": st.none() | POSITIVE,
    "pool_slots": st.integers(1, 1000),
    "max_active_runs": st.integers(1, 1000),
    "max_active_tasks": st.integers(1, 1000),
    "effective_priority": INT32,
}


def of_type(hint: Any) -> st.SearchStrategy[Any]:
    """Return a strategy for a field's type, dataclasses field by field."""
    if is_dataclass(hint) and isinstance(hint, type):
        hints = get_type_hints(hint)
        return st.builds(
            hint,
            **{f.name: CONSTRAINED[f.name] if f.name in CONSTRAINED else of_type(hints[f.name]) for f in fields(hint)},
        )
    known = {str: TEXT, int: st.integers(), bool: st.booleans(), float: NUMBERS, datetime: INSTANTS, Any: JSON}
    if hint in known:
        return known[hint]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return st.one_of(*(st.none() if each is types.NoneType else of_type(each) for each in arguments))
    if origin is tuple:
        return st.lists(of_type(arguments[0]), max_size=3).map(tuple)
    if origin is Mapping:
        return st.dictionaries(of_type(arguments[0]), of_type(arguments[1]), max_size=3)
    raise TypeError(f"no strategy for {hint}; add one")


SPECS: st.SearchStrategy[DagSpec] = of_type(DagSpec)


@st.composite
def dags(draw: st.DrawFn, max_tasks: int = 8) -> DagSpec:
    """Return a DAG of some tasks with any edges, any rules, empty tasks, setups and teardowns."""
    count = draw(st.integers(1, max_tasks))
    tasks = []
    for number in range(count):
        upstream = draw(st.sets(st.integers(0, number - 1), max_size=4)) if number else set()
        is_teardown = draw(st.integers(0, 6)) == 0
        tasks.append(
            TaskSpec(
                task_id=f"t{number}",
                operator="EmptyOperator",
                upstream=tuple(sorted(f"t{up}" for up in upstream)),
                trigger_rule=draw(st.sampled_from(sorted(TRIGGER_RULES))),
                is_empty=draw(st.integers(0, 4)) == 0,
                is_setup=draw(st.integers(0, 3)) == 0,
                is_teardown=is_teardown,
                on_failure_fail_dagrun=is_teardown and draw(st.booleans()),
                retries=draw(st.integers(0, 2)),
                retry_delay_seconds=draw(st.sampled_from([0.0, 3.0])),
            )
        )
    return DagSpec(dag_id="d", tasks=tuple(tasks), fail_fast=draw(st.integers(0, 2)) == 0)
