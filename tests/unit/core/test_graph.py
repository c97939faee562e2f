"""Graphs: order, ends, circles, priorities."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from dflow.core.errors import DagCycleError, DagDefinitionError, DuplicateTaskIdError
from dflow.core.graph import INT32_MAX, INT32_MIN, Graph, effective_priorities
from dflow.core.spec import DagSpec, TaskSpec
from tests.property.strategies import dags


def dag(**upstream: str) -> DagSpec:
    return DagSpec(
        dag_id="d",
        tasks=tuple(TaskSpec(task_id=t, operator="X", upstream=tuple(ups.split())) for t, ups in upstream.items()),
    )


def test_neighbours_order_and_ends() -> None:
    graph = Graph(dag(d="b c", a="", c="a", b="a"))
    assert graph.downstream == {"a": ("b", "c"), "b": ("d",), "c": ("d",), "d": ()}
    assert graph.order == ("a", "b", "c", "d")
    assert (graph.roots, graph.leaves) == (("a",), ("d",))


def test_the_order_does_not_depend_on_how_tasks_are_listed() -> None:
    spec = dag(a="", b="a", c="a", d="b c", e="")
    assert Graph(spec).order == Graph(DagSpec(dag_id="d", tasks=spec.tasks[::-1])).order


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        (dag(a="c", b="a", c="b"), DagCycleError, r"circle: (a >> b >> c >> a|b >> c >> a >> b|c >> a >> b >> c)"),
        (dag(a="a"), DagCycleError, "circle: a >> a"),
        (dag(extract="", load="extarct"), DagDefinitionError, "did you mean 'extract'"),
        (dag(a="", b="zzz"), DagDefinitionError, "depends on 'zzz', which is not in the DAG; add that task"),
        (DagSpec(dag_id="d", tasks=dag(a="").tasks * 2), DuplicateTaskIdError, "two tasks 'a'"),
        (
            DagSpec(dag_id="d", tasks=(TaskSpec(task_id="a", operator="X", trigger_rule="all_sucess"),)),
            DagDefinitionError,
            "unknown trigger rule 'all_sucess'; did you mean 'all_success'",
        ),
    ],
)
def test_what_is_refused(spec: DagSpec, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Graph(spec)


def test_teardowns_do_not_decide_unless_they_say_so() -> None:
    def deciding(*, on_failure_fail_dagrun: bool) -> frozenset[str]:
        teardown = TaskSpec(
            task_id="down",
            operator="X",
            upstream=("work",),
            is_teardown=True,
            on_failure_fail_dagrun=on_failure_fail_dagrun,
        )
        return Graph(DagSpec(dag_id="d", tasks=(*dag(work="").tasks, teardown))).deciding

    assert deciding(on_failure_fail_dagrun=False) == {"work"}
    assert deciding(on_failure_fail_dagrun=True) == {"down"}


def test_a_dag_of_teardowns_only_is_decided_by_its_leaves() -> None:
    tasks = (
        TaskSpec(task_id="a", operator="X", is_teardown=True),
        TaskSpec(task_id="b", operator="X", is_teardown=True, upstream=("a",)),
    )
    assert Graph(DagSpec(dag_id="d", tasks=tasks)).deciding == {"b"}


def weighted(rule: str, *weights: int) -> DagSpec:
    """A diamond a >> (b, c) >> d."""
    ups = {"a": (), "b": ("a",), "c": ("a",), "d": ("b", "c")}
    return DagSpec(
        dag_id="d",
        tasks=tuple(
            TaskSpec(task_id=t, operator="X", upstream=ups[t], priority_weight=w, weight_rule=rule)
            for t, w in zip("abcd", weights, strict=True)
        ),
    )


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("downstream", (15, 10, 12, 8)), ("upstream", (1, 3, 5, 15)), ("absolute", (1, 2, 4, 8))],
)
def test_weight_rules_count_each_task_once(rule: str, expected: tuple[int, ...]) -> None:
    assert tuple(effective_priorities(weighted(rule, 1, 2, 4, 8)).values()) == expected


def test_priorities_are_clamped_to_32_bits() -> None:
    assert effective_priorities(weighted("downstream", *[2**31] * 4))["a"] == INT32_MAX
    assert effective_priorities(weighted("downstream", *[-(2**31)] * 4))["a"] == INT32_MIN


def test_unknown_weight_rule() -> None:
    with pytest.raises(DagDefinitionError, match="did you mean 'downstream'"):
        effective_priorities(weighted("downstrem", 1, 1, 1, 1))


@settings(max_examples=60, deadline=None)
@given(spec=dags())
def test_downstream_priority_is_the_sum_over_everything_that_follows(spec: DagSpec) -> None:
    weights = {task.task_id: number * 7 - 20 for number, task in enumerate(spec.tasks)}
    tasks = tuple(
        TaskSpec(task_id=t.task_id, operator="X", upstream=t.upstream, priority_weight=weights[t.task_id])
        for t in spec.tasks
    )
    follows: dict[str, set[str]] = {}
    for task in reversed(tasks):  # t0, t1, ...: upstream comes first
        direct = {other.task_id for other in tasks if task.task_id in other.upstream}
        follows[task.task_id] = direct.union(*(follows[other] for other in direct))
    assert effective_priorities(DagSpec(dag_id="d", tasks=tasks)) == {
        t: weights[t] + sum(weights[other] for other in follows[t]) for t in weights
    }


def test_a_chain_of_ten_thousand() -> None:
    names = [f"t{number:05}" for number in range(10_000)]
    tasks = tuple(
        TaskSpec(task_id=name, operator="X", upstream=tuple(names[number - 1 : number] if number else ()))
        for number, name in enumerate(names)
    )
    assert Graph(DagSpec(dag_id="d", tasks=tasks)).order == tuple(names)
    assert effective_priorities(DagSpec(dag_id="d", tasks=tasks))["t00000"] == 10_000
